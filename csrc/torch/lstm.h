// What the lstm operators of the torch door share.
#pragma once

#include <tuple>
#include <vector>

#include "door/lstm.h"
#include "torch/view.h"

namespace fastseq::torch_door {

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

inline door::LstmState view_state(const char* op, const Optional& weight_hh, const Tensor& h0, const Tensor& c0,
                                  const Optional& weight_hr, const Optional& lengths, const Optional& batch_sizes,
                                  const Optional& reset, const Optional& h_start, const Optional& c_start) {
  check_isa(op);
  return {view(op, "weight_hh", weight_hh), view(op, "h0", h0),           view(op, "c0", c0),
          view(op, "weight_hr", weight_hr), view(op, "lengths", lengths), view(op, "batch_sizes", batch_sizes),
          view(op, "reset", reset),         view(op, "h_start", h_start), view(op, "c_start", c_start)};
}

inline core::LstmNoise view_noise(const char* op, const Optional& seed, const Optional& rows, int64_t B,
                                  int64_t row_offset, int64_t stream, double probability) {
  const door::Array s = view(op, "seed", seed), r = view(op, "rows", rows);
  door::check_noise(op, r, B, probability);
  if (!s.given()) return {};
  if (s.type != door::Type::i64 || seed->numel() != 1) door::fail(op, "seed must be one int64");
  return {true, static_cast<uint64_t>(*s.as<int64_t>()), r.as<int64_t>(), row_offset, stream, probability};
}

inline std::vector<int64_t> data_size(const door::LstmSizes& z, int64_t width) {
  return z.packed ? std::vector<int64_t>{z.N, width} : std::vector<int64_t>{z.T, z.B, width};
}

}  // namespace fastseq::torch_door
