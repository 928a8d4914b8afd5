// What the lstm operators of the numpy door share.
#pragma once

#include <vector>

#include "door/lstm.h"
#include "python/array.h"

namespace fastseq::python_door {

inline door::LstmState view_state(const char* op, const Optional& weight_hh, const py::array& h0, const py::array& c0,
                                  const Optional& weight_hr, const Optional& lengths, const Optional& batch_sizes,
                                  const Optional& reset, const Optional& h_start, const Optional& c_start) {
  return {view(op, "weight_hh", weight_hh), view(op, "h0", h0),           view(op, "c0", c0),
          view(op, "weight_hr", weight_hr), view(op, "lengths", lengths), view(op, "batch_sizes", batch_sizes),
          view(op, "reset", reset),         view(op, "h_start", h_start), view(op, "c_start", c_start)};
}

inline core::LstmNoise view_noise(const char* op, const std::optional<int64_t>& seed, const Optional& rows, int64_t B,
                                  int64_t row_offset, int64_t stream, double probability) {
  const door::Array r = view(op, "rows", rows);
  door::check_noise(op, r, B, probability);
  if (!seed) return {};
  return {true, static_cast<uint64_t>(*seed), r.as<int64_t>(), row_offset, stream, probability};
}

inline std::vector<int64_t> data_size(const door::LstmSizes& z, int64_t width) {
  return z.packed ? std::vector<int64_t>{z.N, width} : std::vector<int64_t>{z.T, z.B, width};
}

}  // namespace fastseq::python_door
