// Checks of the operators on rows of several examples, for both doors.
#pragma once

#include "core/mimo.h"
#include "door/array.h"

namespace fastseq::door {

// index [M, N] in 0 .. B-1
inline core::MimoShape check_mimo(const char* op, const Array& index, int64_t A, int64_t B, int64_t S) {
  expect_dims(op, "index", index, "[M, N]", 2);
  const int64_t M = index.size[0], N = index.size[1];
  expect(op, "index", index, Type::i32, "[M, N]", {M, N});
  if (M < 1) fail(op, "index must be [M, N] with M of at least 1, got ", shape(index.size, 2));
  if (B < 0 || B > INT32_MAX) fail(op, "B must lie in 0 .. 2**31 - 1, got ", B);
  const auto* const at = index.as<int32_t>();
  for (int64_t i = 0; i < M * N; ++i) {
    if (at[i] < 0 || at[i] >= B) {
      fail(op, "index must lie in 0 .. B - 1 = ", B - 1, ", got index[", i / N, ", ", i % N, "] = ", at[i]);
    }
  }
  return {A, B, N, S, M, at};
}

inline core::MimoShape check_gather(const Array& x, const Array& index, const Array& labels) {
  const char* const op = "mimo_gather";
  expect_dims(op, "x", x, "[A, B, S, C]", 4);
  expect(op, "x", x, x.type, "[A, B, S, C]", {x.size[0], x.size[1], x.size[2], x.size[3]});
  if (labels.given()) {
    expect_dims(op, "labels", labels, "[B, L]", 2);
    expect(op, "labels", labels, labels.type, "[B, L]", {x.size[1], labels.size[1]});
  }
  return check_mimo(op, index, x.size[0], x.size[1], x.size[2]);
}

struct MimoSizes {
  core::MimoShape shape;
  int64_t width;
  Type type;
};

// parts [A, B, S, M*G]
inline MimoSizes check_combine(const Array& parts, const Array& index, const Array& bias) {
  const char* const op = "mimo_combine";
  expect_dims(op, "parts", parts, "[A, B, S, M*G]", 4);
  const Type type = float_type(op, "parts", parts);
  const core::MimoShape s = check_mimo(op, index, parts.size[0], parts.size[1], parts.size[2]);
  const int64_t G = parts.size[3] / s.M;
  expect(op, "parts", parts, type, "[A, B, S, M*G]", {s.A, s.B, s.S, s.M * G});
  if (bias.given()) expect(op, "bias", bias, type, "[G]", {G});
  return {s, G, type};
}

// d [A, N, S, C * slots]
inline MimoSizes check_adjoint(const char* op, const Array& d, const Array& index, int64_t B, bool slots) {
  const char* const meaning = slots ? "[A, N, S, M*C]" : "[A, N, S, G]";
  expect_dims(op, "d", d, meaning, 4);
  const Type type = float_type(op, "d", d);
  const core::MimoShape s = check_mimo(op, index, d.size[0], B, d.size[2]);
  const int64_t width = d.size[3] / (slots ? s.M : 1);
  expect(op, "d", d, type, meaning, {s.A, s.N, s.S, slots ? s.M * width : width});
  return {s, width, type};
}

struct MimoProjectSizes {
  core::MimoShape shape;
  int64_t C, G;
  Type type;
};

inline MimoProjectSizes check_project(const char* op, const Array& x, const Array& weight, const Array& index) {
  expect_dims(op, "x", x, "[A, B, S, C]", 4);
  expect_dims(op, "weight", weight, "[G, M*C]", 2);
  const Type type = float_type(op, "x", x);
  const core::MimoShape s = check_mimo(op, index, x.size[0], x.size[1], x.size[2]);
  const int64_t C = x.size[3], G = weight.size[0];
  expect(op, "x", x, type, "[A, B, S, C]", {s.A, s.B, s.S, C});
  expect(op, "weight", weight, type, "[G, M*C]", {G, s.M * C});
  return {s, C, G, type};
}

}  // namespace fastseq::door
