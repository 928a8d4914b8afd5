// A whole layer in one direction: the input product and the recurrence, and the backward of both. One buffer of
// [N, 4H] serves the pre-activations, the activated gates and, in backward, their gradients.
#pragma once

#include "core/lstm.h"

namespace fastseq::core {

template <class R>
struct LayerInput {
  int64_t I;
  const R* x;          // [N, I]
  const R* weight_ih;  // [4H, I]
  const R* bias;       // [4H] or null
};

// `recurrence.x_gates` is ignored; the rest as in lstm.h.
template <class R>
struct LstmLayerForward {
  LayerInput<R> input;
  LstmForward<R> recurrence;
};

// `recurrence.dx_gates` is ignored. Where `recurrence.gates` is null they are rebuilt from h, c and `noise`.
template <class R>
struct LstmLayerBackward {
  LayerInput<R> input;
  LstmNoise noise;
  LstmBackward<R> recurrence;
  R* dx;          // [N, I]  out, or null
  R* dweight_ih;  // [4H, I] out, or null
  R* dbias;       // [4H]    out, or null
};

template <class R>
size_t lstm_layer_scratch(const LstmLayerForward<R>& call, int most);
template <class R>
size_t lstm_layer_scratch(const LstmLayerBackward<R>& call, int most);

template <class R>
void lstm_layer_forward(const LstmLayerForward<R>& call, R* scratch, const Team& team) noexcept;
template <class R>
void lstm_layer_backward(const LstmLayerBackward<R>& call, R* scratch, const Team& team) noexcept;

}  // namespace fastseq::core
