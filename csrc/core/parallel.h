// How a kernel asks its host for threads: a team that exists for one whole call, with a barrier of exactly its members.
#pragma once

#include <atomic>
#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fastseq::core {

// A barrier for the threads of one team, and the numbers by which they share work between two waits. It spins, because
// a step of a small LSTM is shorter than a sleep, and sleeps once spinning has lasted so long that another thread of
// the team must have lost its processor.
class Barrier {
 public:
  explicit Barrier(int size, int spins = kSpins) : size_(size), spins_(spins) {}

  void wait() noexcept {
    if (size_ == 1) return next_.store(0, std::memory_order_relaxed);
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      // Sequentially consistent: notify_all looks whether anybody sleeps, and must not look before the store is seen,
      // or one who falls asleep between the two is never woken.
      phase_.store(phase + 1, std::memory_order_seq_cst);
      phase_.notify_all();
      return;
    }
    for (int spins = 0; spins < spins_; ++spins) {
      if (phase_.load(std::memory_order_acquire) != phase) return;
#if defined(__SSE2__)
      _mm_pause();
#elif defined(__aarch64__)
      asm volatile("isb");  // waits for some tens of cycles, which yield does not
#endif
    }
    while (phase_.load(std::memory_order_acquire) == phase) phase_.wait(phase, std::memory_order_acquire);
  }

  // The next number, from 0 on, that no thread of the team has drawn since the last wait(). Work cut into more pieces
  // than threads is shared so: a thread whose processor is slower, or busy elsewhere, draws fewer.
  int64_t draw() noexcept { return next_.fetch_add(1, std::memory_order_relaxed); }

 private:
  static constexpr int kSpins = 2000;  // some tens of microseconds
  alignas(64) std::atomic<uint32_t> phase_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  int size_, spins_;
};

// The host's answer. `run` calls body(context, rank, size, barrier) once on each of `size` threads, at most `most` and
// perhaps fewer, and returns when all have returned. A body may call wait() any number of times, the same on each rank.
struct Team {
  using Body = void (*)(const void* context, int rank, int size, Barrier& barrier);
  int most;
  void (*run)(int size, Body body, const void* context);
};

// One thread, the caller.
inline void run_alone(int, Team::Body body, const void* context) {
  Barrier barrier(1);
  body(context, 0, 1, barrier);
}

// Elements of scratch up to the next boundary of 64 bytes, of any element type.
inline int64_t round_up(int64_t n) { return (n + 15) / 16 * 16; }

// The share of `rank` in `count` items, as even as can be.
struct Range {
  int64_t begin, end;
};
inline Range share(int64_t count, int rank, int size) { return {count * rank / size, count * (rank + 1) / size}; }

}  // namespace fastseq::core
