// Threads that wait for each other at a barrier and fall asleep nearly each time, while the last arrives at random,
// with writes on their way to memory that hold back what it tells the others: a wake-up that gets lost stops them for
// ever. Prints how often they met; exits with 1 once nobody moves.
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include "core/parallel.h"

namespace {

constexpr int kThreads = 2;
constexpr long kMeetings = 100000;
constexpr unsigned kLines = 1 << 20;  // of 64 bytes: more than caches hold

struct alignas(64) Line {
  volatile unsigned value;
};

}  // namespace

int main() {
  fastseq::core::Barrier barrier(kThreads, 0);
  std::atomic<long> met{0};
  std::vector<Line> memory(kLines);
  const auto work = [&](unsigned seed) {
    for (long n = 0; n < kMeetings; ++n) {
      seed = seed * 1664525u + 1013904223u;
      for (unsigned i = 0; i < (seed >> 8) % 32768; ++i) asm volatile("" ::: "memory");
      for (unsigned i = 0; i < 48; ++i) memory[(seed >> 8) * (2 * i + 1) % kLines].value = i;
      barrier.wait();
      met.fetch_add(1, std::memory_order_relaxed);
    }
  };
  std::vector<std::thread> threads;
  for (int n = 0; n < kThreads; ++n) threads.emplace_back(work, 17u * static_cast<unsigned>(n) + 1u);
  for (long seen = -1, now; (now = met.load()) < kThreads * kMeetings; seen = now) {
    if (now == seen) {
      std::printf("stuck after %ld\n", now);
      std::fflush(stdout);
      _exit(1);
    }
    std::this_thread::sleep_for(std::chrono::seconds(5));
  }
  for (std::thread& thread : threads) thread.join();
  std::printf("met %ld\n", met.load());
}
