// The LSTM recurrence whose recurrent weights are, gate by gate, a product of two thin factors that is never formed, or
// a full matrix. Definitions: fastseq/reference/lstm_lowrank.py and lstm_mixed.py. The rest is as in lstm.h.
#pragma once

#include "core/lstm.h"

namespace fastseq::core {

// Gate g is up[g] @ down[first .. first + rank - 1], or weight.
template <class R>
struct LowRankGate {
  const R* weight;  // [H, H], and then rank is 0; null for factors
  const R* up;      // [H, rank], rows `stride` apart
  int64_t stride, rank, first;
};

template <class R>
struct LowRankWeights {
  const R* down;  // [count, H]
  int64_t count;
  bool shared;  // all gates have all rows of down; else each has its own, one gate after the other
  LowRankGate<R> gates[4];
};

// `recurrence.args` has no weights of its own.
template <class R>
struct LowRankForward {
  LowRankWeights<R> weights;
  LstmForward<R> recurrence;
};

template <class R>
struct LowRankBackward {
  LowRankWeights<R> weights;
  LstmBackward<R> recurrence;
  bool products;  // the gradients of the weights are wanted
  R* dup[4];      // laid out as up: out, of gates that have it
  R* dweight[4];  // [H, H] out, of full gates
  R* ddown;       // [count, H] out
};

template <class R>
size_t lstm_lowrank_scratch(const LowRankForward<R>& call, int most);
template <class R>
size_t lstm_lowrank_scratch(const LowRankBackward<R>& call, int most);

template <class R>
void lstm_lowrank_forward(const LowRankForward<R>& call, R* scratch, const Team& team) noexcept;
template <class R>
void lstm_lowrank_backward(const LowRankBackward<R>& call, R* scratch, const Team& team) noexcept;

}  // namespace fastseq::core
