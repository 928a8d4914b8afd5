// ADT's explicit distribution of perturbations (fastseq.reference.adt_*): inputs x + eps * tanh(mu + softplus(rho) * r)
// within [low, high], and a step on mu and rho. The noise r is made of counters wherever it is needed and never stored.
//
// S samples, B rows, N numbers of a row, rightmost dimension contiguous. A number is worked on by itself: equal bits
// for any team, and for a row in any batch at the same place. Denormal numbers count as zeros.
#pragma once

#include <cstdint>

#include "core/parallel.h"

namespace fastseq::core {

// N(0, 1). Philox4x32-10 with the seed as key and the counter (c, sample, row, step); its four words give number
// 128 * (c / 32) + c % 32 of the row and those that are 32, 64 and 96 further.
constexpr int kAdtCounters = 32, kAdtBlock = 4 * kAdtCounters;
struct AdtSource {
  uint64_t seed;
  int64_t step;
};

//   out  [S, B, N]  out
template <class R>
struct AdtNoise {
  int64_t S, B, N;
  AdtSource source;
  R* out;
};
template <class R>
void adt_noise(const AdtNoise<R>& args, const Team& team) noexcept;

//   x, mu, rho  [B, N]     in
//   eps         [1, N] with eps_row = 0, or [B, N] with eps_row = N  in   at least 0
//   out         [S, B, N]  out
template <class R>
struct AdtSample {
  int64_t S, B, N, eps_row;
  const R *x, *mu, *rho, *eps;
  AdtSource source;
  R low, high;
  R* out;
};
template <class R>
void adt_sample(const AdtSample<R>& args, const Team& team) noexcept;

// The gradient d of mu and rho of (g * out).sum() + (weight * entropy).sum(), and a step of `rate` up: along the sign
// of d, or along t / (|t| + 1e-8) with t = totals + d where there are totals. A number with eps = 0 has no entropy.
//   g              [S, B, N]         in
//   weight         [B]               in    of the entropy of each number of a row
//   totals         [2, B, N] or null in    of mu, then of rho
//   d              [2, B, N] or null out   totals + d, or d; may be totals
//   mu_up, rho_up  [B, N] or null    out   both or none; may be mu and rho
template <class R>
struct AdtStep {
  int64_t S, B, N, eps_row;
  const R *g, *x, *mu, *rho, *eps, *weight;
  AdtSource source;
  R low, high, rate;
  const R* totals;
  R *d, *mu_up, *rho_up;
};
template <class R>
void adt_step(const AdtStep<R>& args, const Team& team) noexcept;

}  // namespace fastseq::core
