// What the kernels need of a device, by name: tests run the same kernels on the CPU with names of their own.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define FASTSEQ_DEVICE __device__ __forceinline__
#define FASTSEQ_UNROLL _Pragma("unroll")
#define FASTSEQ_ROLL _Pragma("unroll 1")

namespace fastseq::cuda {

FASTSEQ_DEVICE int thread_index() { return threadIdx.x; }
FASTSEQ_DEVICE int block_x() { return blockIdx.x; }
FASTSEQ_DEVICE int block_y() { return blockIdx.y; }
FASTSEQ_DEVICE int block_z() { return blockIdx.z; }
FASTSEQ_DEVICE void sync_block() { __syncthreads(); }
FASTSEQ_DEVICE void sync_warp() { __syncwarp(); }

FASTSEQ_DEVICE unsigned char* shared_bytes() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

FASTSEQ_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// v as if it were new to the compiler: it keeps nothing in registers that it has computed from v before; and it keeps v
// itself in one, as it knows no other way to it.
FASTSEQ_DEVICE int64_t anew(int64_t v) {
  asm volatile("" : "+l"(v));
  return v;
}
FASTSEQ_DEVICE int anew(int v) {
  asm volatile("" : "+r"(v));
  return v;
}
FASTSEQ_DEVICE float anew(float v) {
  asm volatile("" : "+f"(v));
  return v;
}

// v, which nobody looks at before `what` is known; `zero` is 0, but the compiler must not see that. It may else wait
// for v, which was asked for in the step before, at the beginning of a step.
FASTSEQ_DEVICE uint32_t after(uint32_t what, uint32_t v, int zero) { return v | (what & static_cast<uint32_t>(zero)); }

// The value of the lane across the bits of mask. All lanes of the warp call it.
template <class V>
FASTSEQ_DEVICE V across(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// The value of a lane; whether that of any lane is true.
FASTSEQ_DEVICE int of_lane(int value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
FASTSEQ_DEVICE bool of_any(bool value) { return __any_sync(0xffffffffu, value); }

struct alignas(8) Two {
  uint32_t x, y;
};
struct alignas(16) Words {
  uint32_t x, y, z, w;
};
struct alignas(16) Four {
  float x, y, z, w;
};

// Relaxed atomics of the whole device, which never come from the first-level cache.
FASTSEQ_DEVICE uint32_t read_word(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
FASTSEQ_DEVICE Words read_words(const uint32_t* p) {  // 16-byte aligned
  Words v;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
FASTSEQ_DEVICE void write_word(uint32_t* p, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
FASTSEQ_DEVICE void write_words(uint32_t* p, uint32_t first, uint32_t second) {  // 8-byte aligned
  asm volatile("st.relaxed.gpu.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(first), "r"(second) : "memory");
}
FASTSEQ_DEVICE void write_words(uint32_t* p, const Words& v) {  // 16-byte aligned
  asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// A number where `there`, else 0; asked for here, and not before, whatever the compiler thinks of it. Nothing tells the
// compiler that this is a read of memory: only of what was there before the kernel, or what this thread writes later.
FASTSEQ_DEVICE uint32_t read_number(const uint16_t* p, bool there) {
  uint32_t v;
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\nmov.u32 %0, 0;\n@p ld.global.u16 %0, [%1];\n}"
               : "=&r"(v)
               : "l"(p), "r"(static_cast<uint32_t>(there)));
  return v;
}

FASTSEQ_DEVICE float read_number(const float* p, bool there) {
  float v;
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\nmov.f32 %0, 0f00000000;\n@p ld.global.f32 %0, [%1];\n}"
               : "=&f"(v)
               : "l"(p), "r"(static_cast<uint32_t>(there)));
  return v;
}

// What a thread does between two looks at a word. With FASTSEQ_WATCHDOG a wait of seconds ends the kernel with an
// error.
struct Waiting {
  uint32_t looks = 0;
  FASTSEQ_DEVICE void look_again() {
#if defined(FASTSEQ_WATCHDOG)
    if (++looks == 1u << 24) __trap();
#endif
  }
};

// Four 8 x 8 blocks of 16-bit numbers from shared memory; lane l gives the address of row l % 8 of block l / 8.
FASTSEQ_DEVICE void load_blocks(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
FASTSEQ_DEVICE void load_blocks(uint32_t (&r)[4], const uint16_t* row) { load_blocks(r, shared_address(row)); }

// Of an 8 x 8 block of 16-bit numbers, lane l gives numbers 2 * (l % 4) and the next of row l / 4, and has those of the
// transpose.
FASTSEQ_DEVICE uint32_t transposed(uint32_t two) {
  uint32_t found;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(found) : "r"(two));
  return found;
}

// Clusters, from sm_90 on: blocks of threads that write into each other's shared memory. Where numbers arrive, a
// barrier beside them counts their bytes: nobody looks at the numbers before, and no fence is needed.
using Arrivals = uint64_t;

// All threads of the cluster meet; what each wrote before is seen by all after.
FASTSEQ_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
// One thread, before sync_cluster.
FASTSEQ_DEVICE void prepare(Arrivals* a) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(shared_address(a))
               : "memory");
}
// One thread: so many bytes make the next use complete. Some may have come already.
FASTSEQ_DEVICE void expect(Arrivals* a, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(a)), "r"(bytes)
               : "memory");
}
// Whether the use of this parity, counted from 0, is complete; may take its time to answer.
FASTSEQ_DEVICE bool arrived(Arrivals* a, int parity) {
  uint32_t found;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;\n}"
      : "=r"(found)
      : "r"(shared_address(a)), "r"(parity)
      : "memory");
  return found;
}
// The same place of shared memory in another block of the cluster.
FASTSEQ_DEVICE uint32_t place_of(const void* own, int block) {
  uint32_t found;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(found) : "r"(shared_address(own)), "r"(block));
  return found;
}
// Words into the shared memory of a block of the cluster, which its barrier counts; places are named by our own.
FASTSEQ_DEVICE void push_word(int block, uint32_t* to, uint32_t v, Arrivals* a) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(place_of(to, block)),
               "r"(v), "r"(place_of(a, block))
               : "memory");
}
FASTSEQ_DEVICE void push_words(int block, uint32_t* to, uint32_t first, uint32_t second, Arrivals* a) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(place_of(to, block)),
      "r"(first), "r"(second), "r"(place_of(a, block))
      : "memory");
}
FASTSEQ_DEVICE void push_words(int block, uint32_t* to, const Words& v, Arrivals* a) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   place_of(to, block)),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(place_of(a, block))
               : "memory");
}

// Numbers as they lie in memory, and as they are multiplied: so many in a word of 32 bits, with sums of this type.
struct Bfloat16 {
  using Sum = float;
  static constexpr int kPerWord = 2;
  static constexpr uint32_t kInfinity = 0x7f80;
  static FASTSEQ_DEVICE float wide(uint16_t v) { return __uint_as_float(static_cast<uint32_t>(v) << 16); }
  static FASTSEQ_DEVICE uint16_t narrow(float v) { return static_cast<uint16_t>(pair(v, 0.0f)); }
  static FASTSEQ_DEVICE uint32_t pair(float first, float second) {  // the second in the upper half
    uint32_t found;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(found) : "f"(second), "f"(first));
    return found;
  }
  static FASTSEQ_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};
struct Float16 {
  using Sum = float;
  static constexpr int kPerWord = 2;
  static constexpr uint32_t kInfinity = 0x7c00;
  static FASTSEQ_DEVICE float wide(uint16_t v) { return __half2float(__ushort_as_half(v)); }
  static FASTSEQ_DEVICE uint16_t narrow(float v) { return static_cast<uint16_t>(pair(v, 0.0f)); }
  static FASTSEQ_DEVICE uint32_t pair(float first, float second) {
    uint32_t found;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(found) : "f"(second), "f"(first));
    return found;
  }
  static FASTSEQ_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// As Low in memory, but multiplied as integers of 8 bits.
template <class Low>
struct Int8 : Low {
  using Sum = int32_t;
  static constexpr int kPerWord = 4;
  static FASTSEQ_DEVICE void multiply_add(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

FASTSEQ_DEVICE int nearest(float x) { return __float2int_rn(x); }  // ties to even
// 1 / (1 + 2^x), to some 2^-21. A step waits for this: without the care for results below 2^-126, which become zero
// here. Volatile, so that no branch is made around it: one that is chosen by chance costs more.
FASTSEQ_DEVICE float logistic(float x) {
  float power, found;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  asm volatile("rcp.approx.ftz.f32 %0, %1;" : "=f"(found) : "f"(1.0f + power));
  return found;
}
FASTSEQ_DEVICE float multiplied_added(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FASTSEQ_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
FASTSEQ_DEVICE float float_of(uint32_t x) { return __uint_as_float(x); }

}  // namespace fastseq::cuda
