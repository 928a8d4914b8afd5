// Checks of the arguments of the residual quantizer, for both doors.
#pragma once

#include <algorithm>
#include <vector>

#include "core/vq_residual.h"
#include "door/array.h"

namespace fastseq::door {

struct VqResidualSizes {
  int64_t N, D, M, K;  // K of all codebooks together
  Type type;
};

inline VqResidualSizes check_residual(const char* op, const Array& x, const std::vector<Array>& codebooks,
                                      const Array& mask, const Array& levels) {
  expect_dims(op, "x", x, "[N, D]", 2);
  VqResidualSizes s{x.size[0], x.size[1], static_cast<int64_t>(codebooks.size()), 0, float_type(op, "x", x)};
  expect(op, "x", x, s.type, "[N, D]", {s.N, s.D});
  if (s.M < 1 || s.D < 1)
    fail(op, "there must be at least one codebook and one dimension, got M = ", s.M, ", D = ", s.D);
  for (int64_t m = 0; m < s.M; ++m) {
    const std::string name = "codebooks[" + std::to_string(m) + "]";
    expect_dims(op, name.c_str(), codebooks[m], "[K, D]", 2);
    const int64_t K = codebooks[m].size[0];
    expect(op, name.c_str(), codebooks[m], s.type, "[K, D]", {K, s.D});
    if (K < 1 || K > INT32_MAX) fail(op, name, " must have 1 to 2**31 - 1 codes, got ", K);
    s.K += K;
  }
  if (mask.given()) expect(op, "mask", mask, Type::boolean, "[N]", {s.N});
  if (levels.given()) expect(op, "levels", levels, Type::i64, "[N]", {s.N});
  return s;
}

// Codebooks that stand one after the other in codes [K, D].
inline std::vector<Array> split(const char* op, const Array& codes, const std::vector<int64_t>& sizes) {
  expect_dims(op, "codes", codes, "[K, D]", 2);
  const Type type = float_type(op, "codes", codes);
  expect(op, "codes", codes, type, "[K, D]", {codes.size[0], codes.size[1]});
  std::vector<Array> found;
  int64_t first = 0;
  for (const int64_t K : sizes) {
    if (K < 1 || K > codes.size[0] - first) fail(op, "sizes must be those of the codebooks in codes, got ", K);
    Array part = codes;
    part.size[0] = K;
    const int64_t bytes = first * codes.size[1] * (type == Type::f32 ? 4 : 8);
    part.data = static_cast<const char*>(codes.data) + bytes;
    found.push_back(part);
    first += K;
  }
  if (first != codes.size[0]) fail(op, "sizes must sum to the rows of codes = ", codes.size[0], ", got ", first);
  return found;
}

template <class R>
void join(const std::vector<Array>& codebooks, R* out) {
  for (const Array& codebook : codebooks) {
    out = std::copy_n(codebook.as<R>(), codebook.size[0] * codebook.size[1], out);
  }
}

inline void check_residual_backward(const char* op, const VqResidualSizes& s, const std::vector<Array>& codebooks,
                                    const Array& dquantized, const Array& dcommitment, const Array& index,
                                    int64_t gradient) {
  if (dquantized.given()) expect(op, "dquantized", dquantized, s.type, "[N, D]", {s.N, s.D});
  if (dcommitment.given()) expect(op, "dcommitment", dcommitment, s.type, "[M, N]", {s.M, s.N});
  expect(op, "index", index, Type::i64, "[N, M]", {s.N, s.M});
  if (gradient < 0 || gradient > 1) fail(op, "gradient must be 0 or 1, got ", gradient);
  const auto* const k = index.as<int64_t>();
  for (int64_t i = 0; i < s.N * s.M; ++i) {
    const int64_t K = codebooks[i % s.M].size[0];
    if (k[i] < -1 || k[i] >= K) fail(op, "index must lie in -1 .. K - 1 = ", K - 1, ", got ", k[i], " at ", i);
  }
}

template <class R>
std::vector<core::VqLevel<R>> residual_levels(const VqResidualSizes& s, const std::vector<Array>& codebooks, R* counts,
                                              R* sums) {
  std::vector<core::VqLevel<R>> found;
  for (const Array& codebook : codebooks) {
    const int64_t K = codebook.size[0];
    found.push_back({K, codebook.as<R>(), counts, sums});
    if (counts) counts += K, sums += K * s.D;
  }
  return found;
}

}  // namespace fastseq::door
