// What an ensemble says: B rows, M members, K classes (M, K at least 1), rightmost dimension contiguous. A row is read
// by one thread in one order, and the totals are summed in the order of rows: equal bits for any team, and for a row in
// any batch. Meaning, of NaN and infinite logits too: fastseq.reference.ensemble_stats.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/parallel.h"

namespace fastseq::core {

//   logits             [B, M, K]          in
//   labels             [B] or null        in    each in 0 .. K - 1, or `ignore`
//   probability        [B, K] or null     out
//   prediction         [B]                out
//   confidence         [B]                out
//   member_prediction  [B, M]             out
//   disagreement, nll, brier  [B] each    out
//   histogram          float64 [3, bins]  out
//   totals             float64 [5 + M]    out
template <class R>
struct EnsembleStats {
  int64_t B, M, K, bins, ignore;
  const R* logits;
  const int64_t* labels;
  R* probability;
  int64_t* prediction;
  R* confidence;
  int64_t* member_prediction;
  R *disagreement, *nll, *brier;
  double *histogram, *totals;
};

constexpr int64_t kStatsRows = 32;  // whose logarithms are computed together
// Elements of scratch for the exponentials of one member, in whole vectors.
inline int64_t ensemble_stats_row(int64_t K) { return round_up(K) + 16; }
// Elements of scratch for a team of at most `most`; uninitialised, 64-byte aligned.
template <class R>
size_t ensemble_stats_scratch(const EnsembleStats<R>& args, int most);
template <class R>
void ensemble_stats(const EnsembleStats<R>& args, R* scratch, const Team& team) noexcept;

}  // namespace fastseq::core
