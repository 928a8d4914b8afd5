// Checks of the lstm operators' arguments, for both doors. Everything that would be undefined behaviour below.
#pragma once

#include <string>

#include "core/lstm.h"
#include "door/array.h"

namespace fastseq::door {

// weight_hh is not given where an operator has recurrent weights of another kind, which it checks itself.
struct LstmState {
  Array weight_hh, h0, c0, weight_hr, lengths, batch_sizes, reset, h_start, c_start;
};

struct LstmSizes {
  int64_t T, B, N, H, P;
  bool packed;
  Type type;
};

inline void check_lengths(const char* op, const LstmState& s, const LstmSizes& z) {
  if (s.lengths.given()) {
    if (z.packed) fail(op, "lengths and batch_sizes exclude each other");
    expect(op, "lengths", s.lengths, Type::i64, "[B]", {z.B});
    const int64_t* const lengths = s.lengths.as<int64_t>();
    for (int64_t b = 0; b < z.B; ++b) {
      if (lengths[b] < 0 || lengths[b] > z.T) {
        fail(op, "lengths must lie in 0 .. T = ", z.T, ", got lengths[", b, "] = ", lengths[b]);
      }
    }
  }
  if (!z.packed) return;
  const int64_t* const sizes = s.batch_sizes.as<int64_t>();
  int64_t rows = z.B, sum = 0;
  for (int64_t t = 0; t < z.T; ++t) {
    if (sizes[t] < 0 || sizes[t] > rows) {
      fail(op, "batch_sizes must not increase and lie in 0 .. B = ", z.B, ", got batch_sizes[", t, "] = ", sizes[t],
           t ? " after " + std::to_string(rows) : std::string());
    }
    sum += rows = sizes[t];
  }
  if (sum != z.N) fail(op, "batch_sizes must sum to the rows of data = ", z.N, ", got ", sum);
}

// `data` is x_gates or gates: [T, B, 4*H], or [N, 4*H] with batch_sizes.
inline LstmSizes check_lstm(const char* op, const char* data_name, const Array& data, const LstmState& s, double tau) {
  expect_dims(op, "h0", s.h0, "[B, P]", 2);
  expect_dims(op, "c0", s.c0, "[B, H]", 2);
  LstmSizes z{};
  z.packed = s.batch_sizes.given();
  z.type = float_type(op, data_name, data);
  z.B = s.c0.size[0];
  z.H = s.c0.size[1];
  z.P = s.h0.size[1];
  if (z.packed) {
    expect_dims(op, "batch_sizes", s.batch_sizes, "[T]", 1);
    expect(op, "batch_sizes", s.batch_sizes, Type::i64, "[T]", {s.batch_sizes.size[0]});
    expect_dims(op, data_name, data, "[N, 4*H] with batch_sizes", 2);
    z.T = s.batch_sizes.size[0];
    z.N = data.size[0];
    expect(op, data_name, data, z.type, "[N, 4*H]", {z.N, 4 * z.H});
  } else {
    expect_dims(op, data_name, data, "[T, B, 4*H]", 3);
    z.T = data.size[0];
    z.B = data.size[1];
    z.N = z.T * z.B;
    expect(op, data_name, data, z.type, "[T, B, 4*H]", {z.T, z.B, 4 * z.H});
  }
  expect(op, "h0", s.h0, z.type, "[B, P]", {z.B, z.P});
  expect(op, "c0", s.c0, z.type, "[B, H]", {z.B, z.H});
  if (s.weight_hh.given()) expect(op, "weight_hh", s.weight_hh, z.type, "[4*H, P]", {4 * z.H, z.P});
  if (s.weight_hr.given()) {
    expect(op, "weight_hr", s.weight_hr, z.type, "[P, H]", {z.P, z.H});
  } else if (z.P != z.H) {
    fail(op, "h0 and c0 must have the same width without weight_hr, got P = ", z.P, " and H = ", z.H);
  }
  if (s.h_start.given()) expect(op, "h_start", s.h_start, z.type, "[P]", {z.P});
  if (s.c_start.given()) expect(op, "c_start", s.c_start, z.type, "[H]", {z.H});
  if (s.reset.given() && z.packed) expect(op, "reset", s.reset, Type::boolean, "[N]", {z.N});
  if (s.reset.given() && !z.packed) expect(op, "reset", s.reset, Type::boolean, "[T, B]", {z.T, z.B});
  if (!(tau > 0)) fail(op, "tau must be greater than 0, got ", tau);
  check_lengths(op, s, z);
  return z;
}

// A further array with the leading sizes of the data.
inline void check_data(const char* op, const char* name, const Array& array, const LstmSizes& z, int64_t width,
                       const char* letter) {
  if (!array.given()) return;
  if (z.packed) {
    expect(op, name, array, z.type, (std::string("[N, ") + letter + "]").c_str(), {z.N, width});
  } else {
    expect(op, name, array, z.type, (std::string("[T, B, ") + letter + "]").c_str(), {z.T, z.B, width});
  }
}

inline void check_noise(const char* op, const Array& rows, int64_t B, double probability) {
  if (rows.given()) expect(op, "rows", rows, Type::i64, "[B]", {B});
  if (!(probability >= 0 && probability <= 1)) fail(op, "noise_probability must lie in [0, 1], got ", probability);
}

struct LstmGrads {
  Array dh, dc, dgates, dh_n, dc_n, gates, h, c;
};

inline LstmSizes check_lstm_backward(const char* op, const LstmGrads& g, const LstmState& s, double tau) {
  const LstmSizes z = check_lstm(op, "gates", g.gates, s, tau);
  if (!g.h.given() || !g.c.given()) fail(op, "h and c of the forward must be given");
  check_data(op, "h", g.h, z, z.P, "P");
  check_data(op, "c", g.c, z, z.H, "H");
  check_data(op, "dh", g.dh, z, z.P, "P");
  check_data(op, "dc", g.dc, z, z.H, "H");
  check_data(op, "dgates", g.dgates, z, 4 * z.H, "4*H");
  if (g.dh_n.given()) expect(op, "dh_n", g.dh_n, z.type, "[B, P]", {z.B, z.P});
  if (g.dc_n.given()) expect(op, "dc_n", g.dc_n, z.type, "[B, H]", {z.B, z.H});
  return z;
}

template <class R>
core::LstmArgs<R> lstm_args(const LstmSizes& z, const LstmState& s, double tau, bool hard, bool reverse) {
  return {z.T,
          z.B,
          z.N,
          z.H,
          z.P,
          s.weight_hh.as<R>(),
          s.weight_hr.as<R>(),
          s.h0.as<R>(),
          s.c0.as<R>(),
          s.lengths.as<int64_t>(),
          s.batch_sizes.as<int64_t>(),
          s.reset.as<bool>(),
          s.h_start.as<R>(),
          s.c_start.as<R>(),
          tau,
          hard,
          reverse};
}

}  // namespace fastseq::door
