// Rows and codes of the quantizers' kernels, which are of any of three types, and indices of any of three widths.
#pragma once

#include "cuda/vq_number.h"

namespace fastseq::cuda {

struct Single {
  static FASTSEQ_DEVICE float wide(float v) { return v; }
  static FASTSEQ_DEVICE float narrow(float v) { return v; }
};
template <class Of>
using Stored = decltype(Of::narrow(0.0f));
template <class Of>
FASTSEQ_DEVICE float read_as(const void* from, int64_t at) {
  return Of::wide(static_cast<const Stored<Of>*>(from)[at]);
}
// Calls f with what numbers are.
template <class F>
FASTSEQ_DEVICE void with_type(Number number, F f) {
  if (number == Number::f32) {
    f(Single());
  } else if (number == Number::bf16) {
    f(Bfloat16());
  } else {
    f(Float16());
  }
}

FASTSEQ_DEVICE float infinity() { return float_of(0x7f800000u); }
FASTSEQ_DEVICE bool is_finite(float v) { return fabsf(v) < infinity(); }

// Scores as words that are ordered as they are, and never zero; zeros of either sign are equal.
FASTSEQ_DEVICE uint32_t ordered(float score) {
  const uint32_t bits = bits_of(score + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
FASTSEQ_DEVICE float score_of(uint32_t word) { return float_of(word >> 31 ? word & 0x7fffffffu : ~word); }

// `bits` wide, at place `at` of those of `to`.
FASTSEQ_DEVICE void write_index(void* to, int bits, int64_t at, int k) {
  if (bits == 64) {
    static_cast<int64_t*>(to)[at] = k;
  } else if (bits == 32) {
    static_cast<int32_t*>(to)[at] = k;
  } else {
    static_cast<int16_t*>(to)[at] = static_cast<int16_t>(k);
  }
}

}  // namespace fastseq::cuda
