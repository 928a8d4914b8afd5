// Denormal numbers as zeros, for the length of one call on one thread.
#pragma once

#include <cstdint>

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
#elif defined(__aarch64__)
  FlushDenormals() : saved_(control()) { set_control(saved_ | kFlushToZero); }
  ~FlushDenormals() { set_control(saved_); }

 private:
  static constexpr uint64_t kFlushToZero = 1 << 24;  // operands and results
  static uint64_t control() {
    uint64_t value;
    asm volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void set_control(uint64_t value) { asm volatile("msr fpcr, %0" : : "r"(value)); }
  uint64_t saved_;
#else
  FlushDenormals() {}
#endif
};

}  // namespace fastseq::core
