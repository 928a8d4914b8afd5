// Waiting for words of other blocks.
#pragma once

namespace fastseq::cuda {

// Looks at numbers 0 .. kCount - 1 until none is missing. All that are missing are asked for at once: the wait is one
// trip through the second-level cache after the last has come, not one for each.
template <int kCount, class Missing, class Ask>
FASTSEQ_DEVICE void await_all(Missing missing, Ask ask) {
  for (Waiting wait;; wait.look_again()) {
    bool wanted[kCount], any = false;
    FASTSEQ_UNROLL
    for (int n = 0; n < kCount; ++n) wanted[n] = missing(n), any = any || wanted[n];
    if (!any) return;
    FASTSEQ_UNROLL
    for (int n = 0; n < kCount; ++n) {
      if (wanted[n]) ask(n);
    }
  }
}

}  // namespace fastseq::cuda
