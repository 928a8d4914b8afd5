// Clusters on the CPU: what one block of threads pushes into the shared memory of another, and the barriers that count
// it.
#pragma once

#include "tests/cuda/emulator.h"

namespace fastseq::cuda {

// A barrier that counts bytes: a use is complete when the one thread has said how many, and so many have come.
struct Arrivals {
  int32_t missing;  // below 0: more came than are expected yet
  int16_t uses;
  bool open;  // nobody has said how many
};
static_assert(sizeof(Arrivals) == 8);

namespace emulated {

FASTSEQ_UNSEEN inline void count(Arrivals* a, int32_t bytes) {
  a->missing += bytes;
  if (!a->open && a->missing == 0) ++a->uses, a->open = true;
  ++events;
}

// The block's own shared memory, or that of another block of the cluster at the same place.
template <class V>
FASTSEQ_UNSEEN V* place_of(V* own, int block) {
  Block* const here = current->block;
  if (block < 0 || block >= here->cluster_size) fail("there is no such block in the cluster");
  const auto at = reinterpret_cast<unsigned char*>(own) - here->base;
  return reinterpret_cast<V*>(here->cluster[block]->base + at);
}

// Writes that the sanitizer sees, of the fiber that pushes.
template <size_t N>
void push(int block, uint32_t* own, const uint32_t (&words)[N], Arrivals* counter) {
  uint32_t* const to = place_of(own, block);
  Arrivals* const a = place_of(counter, block);
  if (reinterpret_cast<uintptr_t>(to) % (4 * N)) fail("words are pushed where they cannot begin");
  const auto write = [=] {
    for (size_t n = 0; n < N; ++n) to[n] = words[n];
    order_before(a);
    count(a, -static_cast<int32_t>(4 * N));
  };
  if (late) {
    under_way.emplace_back(write);
  } else {
    write();
  }
}

}  // namespace emulated

FASTSEQ_UNSEEN inline void prepare(Arrivals* a) { *a = {0, 0, true}; }
FASTSEQ_UNSEEN inline void expect(Arrivals* a, uint32_t bytes) {
  if (!a->open) emulated::fail("two uses of a barrier at a time");
  a->open = false;
  emulated::count(a, static_cast<int32_t>(bytes));
}
FASTSEQ_UNSEEN inline bool arrived(Arrivals* a, int parity) {
  if (a->uses % 2 == parity) return false;
  emulated::order_after(a);
  return true;
}
inline void push_word(int block, uint32_t* to, uint32_t v, Arrivals* a) {
  const uint32_t words[] = {v};
  emulated::push(block, to, words, a);
}
inline void push_words(int block, uint32_t* to, uint32_t first, uint32_t second, Arrivals* a) {
  const uint32_t words[] = {first, second};
  emulated::push(block, to, words, a);
}
inline void push_words(int block, uint32_t* to, const Words& v, Arrivals* a) {
  const uint32_t words[] = {v.x, v.y, v.z, v.w};
  emulated::push(block, to, words, a);
}

}  // namespace fastseq::cuda
