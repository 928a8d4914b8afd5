// Checks of gemm's arguments, for both doors.
#pragma once

#include "core/gemm.h"
#include "door/array.h"

namespace fastseq::door {

struct GemmSizes {
  int64_t M, N, K;
  Type type;
};

inline GemmSizes check_gemm(const Array& a, const Array& b, const Array& bias, bool transpose_a, bool transpose_b) {
  const char* const op = "gemm";
  expect_dims(op, "a", a, transpose_a ? "[K, M]" : "[M, K]", 2);
  expect_dims(op, "b", b, transpose_b ? "[N, K]" : "[K, N]", 2);
  const GemmSizes s{a.size[transpose_a ? 1 : 0], b.size[transpose_b ? 0 : 1], a.size[transpose_a ? 0 : 1],
                    float_type(op, "a", a)};
  if (transpose_a) {
    expect(op, "a", a, s.type, "[K, M]", {s.K, s.M});
  } else {
    expect(op, "a", a, s.type, "[M, K]", {s.M, s.K});
  }
  if (transpose_b) {
    expect(op, "b", b, s.type, "[N, K]", {s.N, s.K});
  } else {
    expect(op, "b", b, s.type, "[K, N]", {s.K, s.N});
  }
  if (bias.given()) expect(op, "bias", bias, s.type, "[N]", {s.N});
  return s;
}

template <class R>
core::GemmArgs<R> gemm_args(const GemmSizes& s, const Array& a, const Array& b, const Array& bias, bool transpose_a,
                            bool transpose_b, R* c) {
  return {s.M,
          s.N,
          s.K,
          {a.as<R>(), transpose_a ? s.M : s.K, nullptr},
          {b.as<R>(), transpose_b ? s.K : s.N, nullptr},
          transpose_a,
          transpose_b,
          bias.as<R>(),
          c};
}

}  // namespace fastseq::door
