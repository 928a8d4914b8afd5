// Checks of the arguments of vector quantization, for both doors.
#pragma once

#include <cmath>

#include "core/vq.h"
#include "door/array.h"

namespace fastseq::door {

struct VqSizes {
  int64_t G, N, K, D;
  Type type;
};

inline VqSizes check_vq(const char* op, const Array& x, const Array& codebook, const Array& mask) {
  expect_dims(op, "x", x, "[G, N, D]", 3);
  expect_dims(op, "codebook", codebook, "[G, K, D]", 3);
  const VqSizes s{x.size[0], x.size[1], codebook.size[1], x.size[2], float_type(op, "x", x)};
  expect(op, "x", x, s.type, "[G, N, D]", {s.G, s.N, s.D});
  expect(op, "codebook", codebook, s.type, "[G, K, D]", {s.G, s.K, s.D});
  if (s.K < 1 || s.D < 1) fail(op, "codebook must have K and D of at least 1, got ", shape(codebook.size, 3));
  if (s.K > INT32_MAX) fail(op, "codebook must have fewer than 2**31 codes, got ", s.K);
  if (mask.given()) expect(op, "mask", mask, Type::boolean, "[G, N]", {s.G, s.N});
  return s;
}

inline void check_best(const char* op, const VqSizes& s, int64_t best, int64_t bits, int64_t screen) {
  if (screen < 0 || screen > 2) fail(op, "screen must be 0 (never), 1 (always) or 2 (automatic), got ", screen);
  if (best < 1 || best > s.K) fail(op, "best must lie in 1 .. K = ", s.K, ", got ", best);
  if (bits != 16 && bits != 32 && bits != 64) fail(op, "bits must be 16, 32 or 64, got ", bits);
  if (bits == 16 && s.K > INT16_MAX + 1) fail(op, "an index of 16 bits cannot hold K = ", s.K, " codes");
}

// index [G, N] of x [G, N, D]: whole numbers in -1 .. K - 1
inline VqSizes check_index(const char* op, const char* name, const Array& x, const Array& index, int64_t K) {
  expect_dims(op, name, x, "[G, N, D]", 3);
  const VqSizes s{x.size[0], x.size[1], K, x.size[2], float_type(op, name, x)};
  expect(op, name, x, s.type, "[G, N, D]", {s.G, s.N, s.D});
  expect(op, "index", index, Type::i64, "[G, N]", {s.G, s.N});
  if (K < 1) fail(op, "K must be at least 1, got ", K);
  const auto* const k = index.as<int64_t>();
  for (int64_t i = 0; i < s.G * s.N; ++i) {
    if (k[i] < -1 || k[i] >= K) fail(op, "index must lie in -1 .. K - 1 = ", K - 1, ", got ", k[i], " at ", i);
  }
  return s;
}

template <class R>
core::VqShape<R> vq_shape(const VqSizes& s, const Array& x, const Array& codebook, const Array& mask, bool dot) {
  return {s.G, s.N, s.K, s.D, x.as<R>(), codebook.as<R>(), mask.as<bool>(), dot};
}

}  // namespace fastseq::door
