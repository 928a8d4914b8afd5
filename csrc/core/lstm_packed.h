// The LSTM recurrence over packed weights, for inference. Definition: fastseq/reference/packed.py.
#pragma once

#include "core/lstm.h"
#include "core/matrix.h"

namespace fastseq::core {

// `forward` as in lstm.h, with null for both of its weights. Integers of h: where there is no projection |h| < 1 and
// each is 127 times its value, so weight_hh must be bounded; else a row of h is scaled by its largest magnitude. What a
// projection reads is bounded always.
struct LstmPacked {
  LstmForward<float> forward;     // x_gates: null where there is an input
  const PackedMatrix* weight_hh;  // 4 gates, [4H, P]
  const PackedMatrix* weight_hr;  // [P, H], or null and then P = H
  // The input product of the layer, made some steps at a time so that it stays in the caches; or null.
  const PackedMatrix* weight_ih = nullptr;  // 4 gates, [4H, I]
  const float* x = nullptr;                 // [N, I]
  const float* bias = nullptr;              // [4H] or null
};

// Bytes of scratch for a team of at most `most`; 64-byte aligned, uninitialised.
size_t lstm_packed_scratch(const LstmPacked& call, int most);
void lstm_packed(const LstmPacked& call, uint8_t* scratch, const Team& team) noexcept;

}  // namespace fastseq::core
