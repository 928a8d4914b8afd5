// The names of csrc/cuda/device.cuh on the CPU: kernels run as they are, each of their threads a fiber, in an order
// that a seed decides. What PTX says of an instruction is written here on its own, not with the maps of fragment.h.
// With the thread sanitizer every fiber is a thread of its own, and nothing but sync_block orders them: it finds a
// barrier that is missing within a block, and data that go between blocks in any other way than by relaxed atomics.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define FASTSEQ_UNSEEN __attribute__((no_sanitize("thread")))
#else
#define FASTSEQ_UNSEEN
#endif

#define FASTSEQ_DEVICE inline
#define FASTSEQ_UNROLL
#define FASTSEQ_ROLL

namespace fastseq::cuda {

namespace emulated {

struct Lane {  // what a lane gives to an instruction of its warp
  uint32_t a[4], b[2];
  float d[4];
  const uint16_t* row;
};
struct Warp {
  Lane lanes[2][32];  // for even and odd instructions: a lane may be one ahead of another
  int arrived = 0;
  int kind = 0;
  int64_t done = 0;
};
struct Block {
  int x, y, z;
  std::unique_ptr<unsigned char[]> shared;
  unsigned char* base;  // of shared, where 16 bytes can begin
  Block** cluster;      // its blocks
  int cluster_size;
  int cluster_arrived = 0;  // these two of its first block
  int64_t cluster_done = 0;
  std::vector<Warp> warps;
  int threads, arrived = 0;
  int64_t done = 0;
};
struct Copies {  // into shared memory that a thread has begun, see emulator_copy.h
  std::vector<std::function<void()>> begun;
  std::deque<std::vector<std::function<void()>>> closed;
};
struct Fiber {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  Block* block = nullptr;
  int thread = 0;
  int64_t instructions = 0;
  Copies copies;
  bool finished = false;
  void* sanitized = nullptr;
};

inline Fiber* current = nullptr;
inline ucontext_t scheduler;
inline void* sanitized_scheduler = nullptr;
inline int64_t events = 0;                            // whatever lets a waiting fiber go on
inline std::vector<std::function<void()>> under_way;  // words that one block pushes into another
inline bool late = false;                             // whether they come later than they are pushed
inline const std::function<void()>* body = nullptr;

FASTSEQ_UNSEEN inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

FASTSEQ_UNSEEN inline void happened() { ++events; }

FASTSEQ_UNSEEN inline void leave() {
  Fiber& self = *current;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(sanitized_scheduler, __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(&self.context, &scheduler);
}

FASTSEQ_UNSEEN inline void enter(Fiber& fiber) {
  current = &fiber;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(fiber.sanitized, __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(&scheduler, &fiber.context);
}

inline void order_before(const void* what) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(const_cast<void*>(what));
#endif
  (void)what;
}
inline void order_after(const void* what) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(const_cast<void*>(what));
#endif
  (void)what;
}

// Meets the other lanes of the warp, who must be at an instruction of the same kind; `give` fills this lane's part.
template <class Give>
FASTSEQ_UNSEEN const Lane* meet(int kind, Give give) {
  Fiber& self = *current;
  Warp& warp = self.block->warps[self.thread / 32];
  Lane* const lanes = warp.lanes[self.instructions++ & 1];
  give(lanes[self.thread % 32]);
  if (warp.arrived == 0) warp.kind = kind;
  if (warp.kind != kind) fail("the lanes of a warp are at different instructions");
  const int64_t before = warp.done;
  if (++warp.arrived == 32) {
    warp.arrived = 0, ++warp.done, ++events;
  }
  while (warp.done == before) leave();
  return lanes;
}

FASTSEQ_UNSEEN inline void start() {
  (*body)();
  order_before(&scheduler);
  current->finished = true;
  ++events;
  leave();
}

// A context of its own for `start`; apart, because getcontext may return twice.
__attribute__((noinline)) inline void prepare(Fiber& fiber) {
  constexpr size_t kStack = 96 << 10;
  fiber.stack.reset(new unsigned char[kStack]);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = kStack;
  makecontext(&fiber.context, start, 0);
#if defined(__SANITIZE_THREAD__)
  fiber.sanitized = __tsan_create_fiber(0);
#endif
}

// Runs `of` once for every thread of every block of the grid. All blocks are there at a time, as a cooperative launch
// has it; those along x are a cluster. A fiber that waits is passed over; it is an error when all wait for ever.
FASTSEQ_UNSEEN inline void run(int x, int y, int z, int threads, size_t shared, unsigned seed,
                               const std::function<void()>& of) {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Block*> every(x * y * z);
  std::vector<std::unique_ptr<Fiber>> fibers;
  body = &of;
#if defined(__SANITIZE_THREAD__)
  sanitized_scheduler = __tsan_get_current_fiber();
#endif
  for (int n = 0; n < x * y * z; ++n) {
    blocks.push_back(std::make_unique<Block>());
    Block& block = *blocks.back();
    block.x = n % x, block.y = n / x % y, block.z = n / x / y, block.threads = threads;
    block.shared.reset(new unsigned char[shared + 16]);
    block.base = block.shared.get() + (-reinterpret_cast<uintptr_t>(block.shared.get()) & 15);
    every[n] = &block, block.cluster = &every[n - block.x], block.cluster_size = x;
    std::memset(block.shared.get(), 0xff, shared + 16);  // NaN of every kind
    block.warps.resize(threads / 32);
    for (int thread = 0; thread < threads; ++thread) {
      fibers.push_back(std::make_unique<Fiber>());
      Fiber& fiber = *fibers.back();
      fiber.block = &block, fiber.thread = thread;
      prepare(fiber);
    }
  }
  std::mt19937 random(seed);
#if !defined(__SANITIZE_THREAD__)  // for it nobody may act but the fiber that pushes
  late = seed != 0;
#endif
  std::vector<Fiber*> left;
  for (auto& fiber : fibers) left.push_back(fiber.get());
  int64_t idle = 0;
  while (!left.empty()) {
    const int64_t before = events;
    if (seed) std::shuffle(left.begin(), left.end(), random);
    for (Fiber* fiber : left) {
      if (seed && random() % 4 == 0) continue;  // this one is late
      enter(*fiber);
    }
    std::shuffle(under_way.begin(), under_way.end(), random);
    for (size_t some = under_way.size() - under_way.size() / 3; some > 0; --some) {
      under_way.back()(), under_way.pop_back();
    }
    std::erase_if(left, [](Fiber* fiber) { return fiber->finished; });
    idle = events == before ? idle + 1 : 0;
    if (idle > 1000) fail("all threads wait for ever");
  }
  order_after(&scheduler);
#if defined(__SANITIZE_THREAD__)
  for (auto& fiber : fibers) __tsan_destroy_fiber(fiber->sanitized);
#endif
}

}  // namespace emulated

template <class V>
V anew(V v) {
  return v;
}
inline uint32_t after(uint32_t, uint32_t v, int) { return v; }
inline uint32_t read_number(const uint16_t* p, bool there) { return there ? *p : 0; }
inline float read_number(const float* p, bool there) { return there ? *p : 0; }
FASTSEQ_UNSEEN inline int thread_index() { return emulated::current->thread; }
FASTSEQ_UNSEEN inline int block_x() { return emulated::current->block->x; }
FASTSEQ_UNSEEN inline int block_y() { return emulated::current->block->y; }
FASTSEQ_UNSEEN inline int block_z() { return emulated::current->block->z; }
FASTSEQ_UNSEEN inline unsigned char* shared_bytes() { return emulated::current->block->base; }

namespace emulated {

// Waits until `all` threads have come.
FASTSEQ_UNSEEN inline void meet_all(const void* where, int all, int& arrived, int64_t& done) {
  order_before(where);
  const int64_t before = done;
  if (++arrived == all) arrived = 0, ++done, ++events;
  while (done == before) leave();
  order_after(where);
}

}  // namespace emulated

FASTSEQ_UNSEEN inline void sync_block() {
  emulated::Block& block = *emulated::current->block;
  emulated::meet_all(&block, block.threads, block.arrived, block.done);
}
FASTSEQ_UNSEEN inline void sync_cluster() {
  const emulated::Block& own = *emulated::current->block;
  emulated::Block& first = *own.cluster[0];
  const int all = own.cluster_size * own.threads;
  emulated::meet_all(&first.cluster_done, all, first.cluster_arrived, first.cluster_done);
}

FASTSEQ_UNSEEN inline void sync_warp() {
  const void* const warp = &emulated::current->block->warps[emulated::current->thread / 32];
  emulated::order_before(warp);
  emulated::meet(0, [](emulated::Lane&) {});
  emulated::order_after(warp);
}

template <class V>
FASTSEQ_UNSEEN V of_lane(V value, int lane) {
  static_assert(sizeof(V) == 4);
  const emulated::Lane* const lanes =
      emulated::meet(1, [&](emulated::Lane& own) FASTSEQ_UNSEEN { std::memcpy(own.a, &value, 4); });
  V found;
  std::memcpy(&found, lanes[lane].a, 4);
  return found;
}
FASTSEQ_UNSEEN inline bool of_any(bool value) {
  const emulated::Lane* const lanes = emulated::meet(1, [&](emulated::Lane& own) FASTSEQ_UNSEEN { own.a[0] = value; });
  bool found = false;
  for (int lane = 0; lane < 32; ++lane) found = found || lanes[lane].a[0];
  return found;
}
template <class V>
V across(V value, int mask) {
  return of_lane(value, (emulated::current->thread % 32) ^ mask);
}

struct alignas(8) Two {
  uint32_t x, y;
};
struct alignas(16) Words {
  uint32_t x, y, z, w;
};
struct alignas(16) Four {
  float x, y, z, w;
};
inline uint32_t read_word(const uint32_t* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
inline void write_word(uint32_t* p, uint32_t v) {
  __atomic_store_n(p, v, __ATOMIC_RELAXED);
  emulated::happened();
}
inline Words read_words(const uint32_t* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) emulated::fail("16 bytes are read from where they cannot begin");
  return {read_word(p), read_word(p + 1), read_word(p + 2), read_word(p + 3)};
}
inline void write_words(uint32_t* p, uint32_t first, uint32_t second) {
  if (reinterpret_cast<uintptr_t>(p) % 8) emulated::fail("8 bytes are written where they cannot begin");
  write_word(p, first), write_word(p + 1, second);
}
inline void write_words(uint32_t* p, const Words& v) {
  if (reinterpret_cast<uintptr_t>(p) % 16) emulated::fail("16 bytes are written where they cannot begin");
  write_word(p, v.x), write_word(p + 1, v.y), write_word(p + 2, v.z), write_word(p + 3, v.w);
}
struct Waiting {
  void look_again() { emulated::leave(); }
};

// A read that the sanitizer sees, of what the kernel keeps in shared memory.
__attribute__((noinline)) inline uint32_t seen_pair(const uint16_t* at) { return at[0] | uint32_t{at[1]} << 16; }

FASTSEQ_UNSEEN inline void load_blocks(uint32_t (&r)[4], const uint16_t* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulated::fail("a row of a block begins where none can");
  const emulated::Lane* const lanes = emulated::meet(2, [&](emulated::Lane& own) FASTSEQ_UNSEEN { own.row = row; });
  const int lane = emulated::current->thread % 32;
  const uint16_t* from[4];
  for (int block = 0; block < 4; ++block) from[block] = lanes[8 * block + lane / 4].row + 2 * (lane % 4);
  for (int block = 0; block < 4; ++block) r[block] = seen_pair(from[block]);
}
inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(shared) - emulated::current->block->base);
}
inline void load_blocks(uint32_t (&r)[4], uint32_t row) {
  load_blocks(r, reinterpret_cast<const uint16_t*>(emulated::current->block->base + row));
}

// The manual's fragment of an 8 x 8 matrix: two neighbours of row laneid / 4.
FASTSEQ_UNSEEN inline uint32_t transposed(uint32_t two) {
  const emulated::Lane* const lanes = emulated::meet(4, [&](emulated::Lane& own) FASTSEQ_UNSEEN { own.a[0] = two; });
  const int lane = emulated::current->thread % 32, row = lane >> 2, column = (lane & 3) << 1;
  const auto number = [&](int r, int c) { return (lanes[4 * r + c / 2].a[0] >> 16 * (c & 1)) & 0xffff; };
  return number(column, row) | number(column + 1, row) << 16;
}

// d += a b, where number k of the depth is number k % per_word of a word: `add` has the arithmetic of two numbers.
template <class Sum, class Add>
FASTSEQ_UNSEEN void multiply_add(Sum (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int per_word, Add add) {
  const emulated::Lane* const lanes = emulated::meet(3, [&](emulated::Lane& own) FASTSEQ_UNSEEN {
    std::memcpy(own.a, a, sizeof a);
    own.b[0] = b0, own.b[1] = b1;
  });
  // the groups of four lanes and the places in them, as the manual names them
  const int lane = emulated::current->thread % 32, group = lane >> 2, in_group = lane & 3, half = 4 * per_word;
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? group : group + 8, column = 2 * in_group + (i & 1);
    for (int k = 0; k < 2 * half; ++k) {
      const int holder = k % half / per_word, high = k >= half;
      const int shift = 32 / per_word * (k % per_word);
      const uint32_t left = lanes[4 * (row & 7) + holder].a[(row >= 8) + 2 * high];
      const uint32_t right = lanes[4 * column + holder].b[high];
      add(d[i], left >> shift, right >> shift);
    }
  }
}
template <class Low>
FASTSEQ_UNSEEN void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_add(d, a, b0, b1, 2, [](float& sum, uint32_t left, uint32_t right) FASTSEQ_UNSEEN {
    sum = std::fma(Low::wide(static_cast<uint16_t>(left)), Low::wide(static_cast<uint16_t>(right)), sum);
  });
}

struct Bfloat16 {
  using Sum = float;
  static constexpr int kPerWord = 2;
  static constexpr uint32_t kInfinity = 0x7f80;
  static float wide(uint16_t v) {
    const uint32_t bits = static_cast<uint32_t>(v) << 16;
    float found;
    std::memcpy(&found, &bits, 4);
    return found;
  }
  static uint16_t narrow(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return v != v ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  static uint32_t pair(float first, float second) { return narrow(first) | uint32_t{narrow(second)} << 16; }
  static void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    cuda::multiply_add<Bfloat16>(d, a, b0, b1);
  }
};
struct Float16 {
  using Sum = float;
  static constexpr int kPerWord = 2;
  static constexpr uint32_t kInfinity = 0x7c00;
  static float wide(uint16_t v) {
    _Float16 found;
    std::memcpy(&found, &v, 2);
    return static_cast<float>(found);
  }
  static uint16_t narrow(float v) {
    const auto rounded = static_cast<_Float16>(v);
    uint16_t found;
    std::memcpy(&found, &rounded, 2);
    return found;
  }
  static uint32_t pair(float first, float second) { return narrow(first) | uint32_t{narrow(second)} << 16; }
  static void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    cuda::multiply_add<Float16>(d, a, b0, b1);
  }
};

template <class Low>
struct Int8 : Low {
  using Sum = int32_t;
  static constexpr int kPerWord = 4;
  static void multiply_add(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    cuda::multiply_add(d, a, b0, b1, 4, [](int32_t& sum, uint32_t left, uint32_t right) FASTSEQ_UNSEEN {
      sum += static_cast<int8_t>(left) * static_cast<int8_t>(right);
    });
  }
};

inline int nearest(float x) { return static_cast<int>(std::nearbyint(x)); }
inline float logistic(float x) { return 1.0f / (1.0f + std::exp2(x)); }
inline float multiplied_added(float a, float b, float c) { return std::fma(a, b, c); }
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float found;
  std::memcpy(&found, &bits, 4);
  return found;
}

}  // namespace fastseq::cuda
