// Checks of the arguments of ADT's operators, for both doors.
#pragma once

#include "core/adt.h"
#include "door/array.h"

namespace fastseq::door {

struct AdtSizes {
  int64_t S, B, N, eps_row;
  Type type;
};

struct AdtArrays {
  Array x, mu, rho, eps;
};

constexpr int64_t kMostCounter = int64_t(1) << 32;  // a word of the counter

inline void check_source(const char* op, int64_t samples, int64_t step) {
  if (samples < 0 || samples > kMostCounter) fail(op, "samples must lie in 0 .. 2^32, got ", samples);
  if (step < 0 || step >= kMostCounter) fail(op, "step must lie in 0 .. 2^32 - 1, got ", step);
}

// like: [B, N], what the noise is for
inline AdtSizes check_adt_noise(const Array& like, int64_t samples, int64_t step) {
  const char* const op = "adt_noise";
  check_source(op, samples, step);
  expect_dims(op, "like", like, "[B, N]", 2);
  return {samples, like.size[0], like.size[1], 0, float_type(op, "like", like)};
}

inline AdtSizes check_adt(const char* op, const AdtArrays& a, int64_t samples, int64_t step, double low, double high) {
  check_source(op, samples, step);
  expect_dims(op, "x", a.x, "[B, N]", 2);
  const int64_t B = a.x.size[0], N = a.x.size[1];
  const Type type = float_type(op, "x", a.x);
  expect(op, "x", a.x, type, "[B, N]", {B, N});
  expect(op, "mu", a.mu, type, "[B, N]", {B, N});
  expect(op, "rho", a.rho, type, "[B, N]", {B, N});
  const bool own = a.eps.dims == 2 && a.eps.size[0] != 1;
  expect(op, "eps", a.eps, type, own ? "[B, N]" : "[1, N]", {own ? B : 1, N});
  if (!(low <= high)) fail(op, "low must be at most high, got ", low, " and ", high);
  return {samples, B, N, own ? N : 0, type};
}

inline AdtSizes check_adt_step(const char* op, const Array& g, const AdtArrays& a, const Array& weight, int64_t step,
                               double low, double high) {
  expect_dims(op, "g", g, "[S, B, N]", 3);
  const AdtSizes z = check_adt(op, a, g.size[0], step, low, high);
  expect(op, "g", g, z.type, "[S, B, N]", {z.S, z.B, z.N});
  expect(op, "weight", weight, z.type, "[B]", {z.B});
  return z;
}

inline void check_totals(const char* op, const Array& totals, const AdtSizes& z) {
  if (totals.given()) expect(op, "totals", totals, z.type, "[2, B, N]", {2, z.B, z.N});
}

template <class R>
core::AdtSample<R> adt_sample_of(const AdtSizes& z, const AdtArrays& a, const core::AdtSource& source, double low,
                                 double high, R* out) {
  return {z.S,           z.B,           z.N,    z.eps_row, a.x.as<R>(), a.mu.as<R>(),
          a.rho.as<R>(), a.eps.as<R>(), source, R(low),    R(high),     out};
}

// Without totals, rate and results.
template <class R>
core::AdtStep<R> adt_step_of(const AdtSizes& z, const Array& g, const AdtArrays& a, const Array& weight,
                             const core::AdtSource& source, double low, double high) {
  core::AdtStep<R> call{};
  call.S = z.S;
  call.B = z.B;
  call.N = z.N;
  call.eps_row = z.eps_row;
  call.g = g.as<R>();
  call.x = a.x.as<R>();
  call.mu = a.mu.as<R>();
  call.rho = a.rho.as<R>();
  call.eps = a.eps.as<R>();
  call.weight = weight.as<R>();
  call.source = source;
  call.low = R(low);
  call.high = R(high);
  return call;
}

}  // namespace fastseq::door
