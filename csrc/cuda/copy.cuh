// Copies into shared memory that go on while their thread does other things; beside device.cuh, and like it replaced
// by tests.
#pragma once

#include "cuda/device.cuh"

#define FASTSEQ_UNROLL_FOUR _Pragma("unroll 4")

namespace fastseq::cuda {

// 16 bytes; both places are 16-byte aligned.
FASTSEQ_DEVICE void copy_begin(void* shared, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(from) : "memory");
}
// What the thread has begun since the last call is one group, if nothing at all.
FASTSEQ_DEVICE void copies_close() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All groups of the thread have arrived but the last kLater.
template <int kLater>
FASTSEQ_DEVICE void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
}

// A number that nothing writes while the kernel runs, or zero. No branch: many can be asked for together.
FASTSEQ_DEVICE uint32_t read_if(bool there, const uint32_t* p) {
  uint32_t v;
  asm("{\n.reg .pred q;\nsetp.ne.b32 q, %2, 0;\nmov.b32 %0, 0;\n@q ld.global.nc.b32 %0, [%1];\n}"
      : "=r"(v)
      : "l"(p), "r"(static_cast<int>(there)));
  return v;
}
FASTSEQ_DEVICE uint32_t read_if(bool there, const uint16_t* p) {
  uint16_t v;
  asm("{\n.reg .pred q;\nsetp.ne.b32 q, %2, 0;\nmov.b16 %0, 0;\n@q ld.global.nc.b16 %0, [%1];\n}"
      : "=h"(v)
      : "l"(p), "r"(static_cast<int>(there)));
  return v;
}

// Sixteen bytes, 16-byte aligned, that nothing writes while the kernel runs.
FASTSEQ_DEVICE Words read_sixteen(const void* p) {
  Words v;
  asm("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// (v & mask) | low, as one instruction.
FASTSEQ_DEVICE uint32_t masked_or(uint32_t v, uint32_t mask, uint32_t low) {
  uint32_t found;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(found) : "r"(v), "r"(mask), "r"(low));
  return found;
}

// Keeps the least of what is given by any thread of the block.
FASTSEQ_DEVICE void keep_least(uint64_t* shared, uint64_t v) {
  atomicMin(reinterpret_cast<unsigned long long*>(shared), static_cast<unsigned long long>(v));
}

// The first of so many places in a list that all threads of the device, or of the block, share; in any order.
FASTSEQ_DEVICE int take_places(int32_t* taken, int count) { return atomicAdd(taken, count); }

}  // namespace fastseq::cuda
