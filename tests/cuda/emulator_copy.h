// The names of csrc/cuda/copy.cuh on the CPU. What a copy brings is there when its group is waited for and not before;
// what was there before is gone when the copy begins.
#pragma once

#include <cstring>

#include "tests/cuda/emulator.h"

#define FASTSEQ_UNROLL_FOUR

namespace fastseq::cuda {

namespace emulated {

// Writes that the sanitizer sees.
__attribute__((noinline)) inline void write_bytes(void* to, const void* from) {
  for (int n = 0; n < 4; ++n) {
    static_cast<uint32_t*>(to)[n] = from ? static_cast<const uint32_t*>(from)[n] : 0xffffffffu;
  }
}

}  // namespace emulated

inline void copy_begin(void* shared, const void* from) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(from)) % 16) {
    emulated::fail("16 bytes are copied where they cannot begin");
  }
  emulated::write_bytes(shared, nullptr);
  emulated::current->copies.begun.push_back([=] { emulated::write_bytes(shared, from); });
}
inline void copies_close() {
  emulated::Copies& own = emulated::current->copies;
  own.closed.push_back(std::move(own.begun));
  own.begun.clear();
}
template <int kLater>
void copies_wait() {
  auto& closed = emulated::current->copies.closed;
  for (; closed.size() > kLater; closed.pop_front()) {
    for (const auto& copy : closed.front()) copy();
  }
}
inline uint32_t read_if(bool there, const uint32_t* p) { return there ? *p : 0; }
inline uint32_t read_if(bool there, const uint16_t* p) { return there ? *p : 0; }
inline Words read_sixteen(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) emulated::fail("16 bytes are read from where they cannot begin");
  Words v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline uint32_t masked_or(uint32_t v, uint32_t mask, uint32_t low) { return (v & mask) | low; }
inline void keep_least(uint64_t* shared, uint64_t v) {
  uint64_t held = __atomic_load_n(shared, __ATOMIC_RELAXED);
  while (v < held && !__atomic_compare_exchange_n(shared, &held, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}
inline int take_places(int32_t* taken, int count) { return __atomic_fetch_add(taken, count, __ATOMIC_RELAXED); }

}  // namespace fastseq::cuda
