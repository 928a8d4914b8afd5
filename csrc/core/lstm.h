// The LSTM recurrence with soft or hard gates, forward and backward. Definition: fastseq/reference/lstm.py.
// T steps, B rows, H hidden, P = H or the projected size, N rows of data. Gates are ordered i, f, g, o. Rightmost
// dimension contiguous everywhere. Nothing may alias anything unless said. Results do not depend on the team's size.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/lstm_step.h"
#include "core/parallel.h"

namespace fastseq::core {

// What forward and backward share.
//   lengths      [B] or null    dense: N = T * B, step t of row b at t * B + b; row b has lengths[b] steps, 0 .. T
//   batch_sizes  [T] or null    packed: rows 0 .. batch_sizes[t] - 1 of step t follow each other; never increasing
//   reset        [N] or null    true: the step begins a new segment, no state crosses from the step before it
//   h_start, c_start  [P], [H] or null (zeros)   the state that a segment begins with
template <class R>
struct LstmArgs {
  int64_t T, B, N, H, P;
  const R* weight_hh;  // [4H, P]
  const R* weight_hr;  // [P, H], or null and then P = H
  const R* h0;         // [B, P]
  const R* c0;         // [B, H]
  const int64_t* lengths;
  const int64_t* batch_sizes;
  const bool* reset;
  const R* h_start;
  const R* c_start;
  double tau;  // temperature of i and f, > 0
  bool hard;   // i and f are 1 where their pre-activation is positive, else 0
  bool reverse;
};

template <class R>
struct LstmForward {
  LstmArgs<R> args;
  LstmNoise noise;
  const R* x_gates;  // [N, 4H]  input part of the pre-activations, biases added
  R* h;              // [N, P]   out; steps beyond a row's length become zero, as in c and gates
  R* c;              // [N, H]   out, or null
  R* gates;          // [N, 4H]  out, activated, or null; may be x_gates
  R* h_n;            // [B, P]   out
  R* c_n;            // [B, H]   out
};

// The gates of a forward from its inputs and its outputs h and c.
template <class R>
struct LstmGates {
  LstmArgs<R> args;
  LstmNoise noise;
  const R* x_gates;
  const R* h;
  const R* c;
  R* gates;  // [N, 4H] out
};

template <class R>
struct LstmBackward {
  LstmArgs<R> args;
  const R *dh, *dc, *dgates, *dh_n, *dc_n;  // shaped as the outputs of forward; each may be null
  const R *gates, *h, *c;                   // from forward
  R* dx_gates;                              // [N, 4H] out
  R* dweight_hh;                            // [4H, P] out, or null
  R* dweight_hr;                            // [P, H]  out, or null
  R *dh0, *dc0;                             // [B, P], [B, H] out
  R *dh_start, *dc_start;                   // [P], [H] out, or both null, as where args has no start state
};

// Elements of scratch for a team of at most `most`; uninitialised, 64-byte aligned.
template <class R>
size_t lstm_forward_scratch(const LstmArgs<R>& args, int most);
template <class R>
size_t lstm_gates_scratch(const LstmArgs<R>& args, int most);
template <class R>
size_t lstm_backward_scratch(const LstmArgs<R>& args, bool weights, int most);

template <class R>
void lstm_forward(const LstmForward<R>& call, R* scratch, const Team& team) noexcept;
template <class R>
void lstm_gates(const LstmGates<R>& call, R* scratch, const Team& team) noexcept;
template <class R>
void lstm_backward(const LstmBackward<R>& call, R* scratch, const Team& team) noexcept;

// Noise alone: [T, B, 2H], i then f.
template <class R>
void lstm_noise(const LstmNoise& noise, int64_t T, int64_t B, int64_t H, R* out, const Team& team) noexcept;

}  // namespace fastseq::core
