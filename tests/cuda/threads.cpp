// The exchange of csrc/cuda/exchange.h between threads of the CPU that are late at random, under the thread sanitizer:
// blocks of two threads take in at every step what all blocks have handed on, and hand on what depends on all of it.
// One thread alone says what must come out. Exits with the number of wrong words.
#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdio>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "cuda/exchange.h"

using namespace fastseq::cuda;

namespace {

constexpr int kBlocks = 4, kThreads = 2, kWords = kBlocks * kThreads, kSteps = 1000;
using State = uint32_t[kWords];

// Word `word` of step `step` from all words of the step before.
uint32_t next(const State& before, int word, int step) {
  uint32_t found = 0x9e3779b9u * (word + 1) + step;
  for (const uint32_t other : before) found = (found ^ other) * 0x01000193u + (found >> 15);
  return found;
}

template <class Stamp>
struct Exchange {
  std::atomic<uint32_t> places[2][kWords] = {};

  struct Block {
    std::barrier<> all{kThreads};
    State states[2] = {};
  };
  Block blocks[kBlocks];
  State last;

  static void be_late(std::mt19937& random) {
    const auto drawn = random() % 64;
    if (drawn < 2) std::this_thread::sleep_for(std::chrono::microseconds(random() % 60));
    if (drawn < 16) std::this_thread::yield();
  }

  void run(int word, unsigned seed) {
    Block& block = blocks[word / kThreads];
    std::mt19937 random(seed * kWords + word);
    for (int step = 0; step < kSteps; ++step) {
      State& state = block.states[step & 1];
      for (int from = word % kThreads; step > 0 && from < kWords; from += kThreads) {
        be_late(random);
        const std::atomic<uint32_t>& place = places[slot_of(step - 1)][from];
        uint32_t found;
        while (Stamp::stale(found = place.load(std::memory_order_relaxed), step - 1)) std::this_thread::yield();
        state[from] = Stamp::read(found);
      }
      block.all.arrive_and_wait();
      be_late(random);
      const uint32_t value = next(state, word, step);
      places[slot_of(step)][word].store(Stamp::write(value, step), std::memory_order_relaxed);
      last[word] = Stamp::read(value);
    }
  }
};

template <class Stamp>
int wrong(unsigned seed) {
  State state = {};
  for (int step = 0; step < kSteps; ++step) {
    State after;
    for (int word = 0; word < kWords; ++word) after[word] = Stamp::read(next(state, word, step));
    std::copy(after, after + kWords, state);
  }
  const auto exchange = std::make_unique<Exchange<Stamp>>();
  std::vector<std::thread> threads;
  for (int word = 0; word < kWords; ++word) threads.emplace_back([&, word] { exchange->run(word, seed); });
  for (auto& thread : threads) thread.join();
  int found = 0;
  for (int word = 0; word < kWords; ++word) found += exchange->last[word] != state[word];
  return found;
}

}  // namespace

int main() {
  int found = 0;
  for (unsigned seed = 0; seed < 3; ++seed) found += wrong<Pair>(seed) + wrong<Float>(seed);
  if (found) std::fprintf(stderr, "%d words are not those of one thread\n", found);
  return found;
}
