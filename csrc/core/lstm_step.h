// The parts of one LSTM step that exist once per instruction set: the cell, forward and backward, on a register tile's
// worth of rows and one panel's worth of units, and the noise of its gates.
#pragma once

#include <cstdint>

#include "core/gemm.h"

namespace fastseq::core {

// Noise of the gates i and f: Bernoulli(p) * (log U - log(1 - U)). Philox4x32-10 with the seed as key and the counter
// (unit, step, row_offset + rows[row], stream); words 0 and 1 give U and the mask of i, words 2 and 3 of f.
struct LstmNoise {
  bool on;
  uint64_t seed;
  const int64_t* rows;  // [B] number of each row before any sorting, or null for 0..B-1
  int64_t row_offset;
  int64_t stream;      // 2 * layer + direction
  double probability;  // p, in [0, 1]
};

// Pointers to rows point at the first unit of the panel; a gate's units are contiguous, gates are x_gate apart in
// x_gates, pre_gate apart in `pre`, and H apart in gates and dx_gates.
template <class R>
struct CellForward {
  int64_t rows, units, H, x_gate, pre_gate;
  R inverse_tau;
  bool hard;
  const R* pre;                     // [rows][4][pre_gate]    recurrent part of the pre-activations
  const R* x_gates[kMostTileRows];  // input part
  const R* noise;                   // [rows][2][panel_width] or null
  const R* c_in[kMostTileRows];     // state before the step; null means zeros
  R* c_state[kMostTileRows];        // state after the step
  R* c[kMostTileRows];              // the same, kept for backward; [0] null where it is not
  R* gates[kMostTileRows];          // activated; [0] null where they are not kept
  R* out[kMostTileRows];            // o * tanh(c)
};

template <class R>
struct CellBackward {
  int64_t rows, units, H;
  R inverse_tau;
  bool hard;
  const R* dh;                     // [rows][panel_width] gradient of o * tanh(c)
  const R* gates[kMostTileRows];   // activated
  const R* dgates[kMostTileRows];  // their own upstream gradient; [0] null where there is none
  const R* c[kMostTileRows];       // after the step
  const R* c_in[kMostTileRows];    // before it; null means zeros
  const R* dc[kMostTileRows];      // upstream gradient of c; [0] null where there is none
  R* dc_state[kMostTileRows];      // in: gradient of c from the step after; out: for the step before
  R* dx_gates[kMostTileRows];      // gradient of the pre-activations
  R* out[kMostTileRows];           // o * tanh(c); [0] null where it is not wanted
};

}  // namespace fastseq::core
