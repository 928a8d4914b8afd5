// Cross-entropy of every slot: N rows, M slots, K classes (at least 1), rightmost dimension contiguous. A row of logits
// is read by one thread in one order, and the totals by the caller's: equal bits for any team, and for a row in any
// batch. NaN and infinite logits give what fastseq.reference.mimo_nll says; denormal numbers count as zeros.
#pragma once

#include <cstdint>

#include "core/parallel.h"

namespace fastseq::core {

//   logits  [N, M, K]  in
//   labels  [N, M]     in    each in 0 .. K - 1, or `ignore`
//   loss    []         out   sum over slots of the mean over rows that are not ignored
//   nll     [N, M]     out   0 where ignored
//   top     [N, M]     out   the largest logit
//   logsum  [N, M]     out   log of the sum of exp(logit - top)
template <class R>
struct MimoNll {
  int64_t N, M, K;
  const R* logits;
  const int64_t* labels;
  double smoothing;
  int64_t ignore;
  R *loss, *nll, *top, *logsum;
};
template <class R>
void mimo_nll(const MimoNll<R>& args, const Team& team) noexcept;

//   dloss    [] or null      in
//   dnll     [N, M] or null  in
//   top      [N, M]          in    of these logits, as logsum
//   logsum   [N, M]          in
//   weight   [M]             scratch
//   dlogits  [N, M, K]       out   0 in rows whose label is ignored; may not alias logits
template <class R>
struct MimoNllBackward {
  int64_t N, M, K;
  const R *dloss, *dnll, *logits;
  const int64_t* labels;
  const R *top, *logsum;
  double smoothing;
  int64_t ignore;
  R *weight, *dlogits;
};
template <class R>
void mimo_nll_backward(const MimoNllBackward<R>& args, const Team& team) noexcept;

}  // namespace fastseq::core
