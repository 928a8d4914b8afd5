// Cross-entropy of every slot: N rows, M slots, K classes (at least 1), rightmost dimension contiguous. A row of logits
// is read by one thread in one order, and the totals by the caller's: equal bits for any team, and for a row in any
// batch. What NaN and infinite logits give is what fastseq.reference.mimo_nll gives.
#pragma once

#include <cstdint>

#include "core/parallel.h"

namespace fastseq::core {

//   logits  [N, M, K]  in
//   labels  [N, M]     in    each in 0 .. K - 1, or `ignore`
//   loss    []         out   sum over slots of the mean over rows that are not ignored
//   nll     [N, M]     out   0 where ignored
//   lse     [N, M]     out   logsumexp
template <class R>
struct MimoNll {
  int64_t N, M, K;
  const R* logits;
  const int64_t* labels;
  double smoothing;
  int64_t ignore;
  R *loss, *nll, *lse;
};
template <class R>
void mimo_nll(const MimoNll<R>& args, const Team& team) noexcept;

//   dloss    [] or null      in
//   dnll     [N, M] or null  in
//   lse      [N, M]          in    of these logits
//   weight   [M]             scratch
//   dlogits  [N, M, K]       out   may not alias logits
template <class R>
struct MimoNllBackward {
  int64_t N, M, K;
  const R *dloss, *dnll, *logits;
  const int64_t* labels;
  const R* lse;
  double smoothing;
  int64_t ignore;
  R *weight, *dlogits;
};
template <class R>
void mimo_nll_backward(const MimoNllBackward<R>& args, const Team& team) noexcept;

}  // namespace fastseq::core
