// Denormal numbers as zeros, for the length of one call on one thread.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fastseq::core {

// Decaying states turn into denormal numbers, and an operation on one costs as much as a hundred others.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushDenormals() {}
#endif
};

}  // namespace fastseq::core
