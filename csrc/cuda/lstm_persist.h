// The LSTM recurrence in one launch: every multiprocessor keeps its rows of weight_hh on the chip over all steps, and h
// goes from each to all others. Definition: fastseq/reference/lstm.py. T steps, B rows, H hidden, N elements: step t of
// row b is element offsets[t] + b, or t * B + b. Gates are ordered i, f, g, o. Everything lies on one device, rightmost
// dimension contiguous; nothing may alias anything unless said. Numbers marked low are bfloat16 or float16, all alike;
// products are added in float32. Equal bits from run to run.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastseq::cuda {

// What forward and backward share, and both directions of a pair.
struct PersistShape {
  int64_t T, B, H;         // each at least 1
  const int64_t* lengths;  // [B] or null: row b has lengths[b] steps, held within 0 .. T
  const int64_t* offsets;  // [T] of packed data, or null; then lengths are given
  float inverse_tau;       // of i and f
  bool hard;               // i and f are 1 where their pre-activation is positive, else 0
  bool bfloat16;           // what low means, else float16
  bool int8;               // weight_hh is int8 with a scale, and h is rounded to 1/127 for the product: forward only
};

// One direction. Elements beyond a row's length become zeros where offsets is null.
struct PersistForward {
  const void* x_gates;    // low [N, 4H]  input part of the pre-activations: biases and noise added
  const void* weight_hh;  // low or int8 [4H, H]
  const float* scale;     // [4H], of each row of weight_hh where that is int8
  const void* h0;         // low [B, H]
  const float* c0;        // [B, H]
  void* h;                // low [N, H]   out
  float* c;               // [N, H]       out, or null
  void* gates;            // low [N, 4H]  out, activated, or null; may be x_gates
  void* h_n;              // low [B, H]   out
  float* c_n;             // [B, H]       out
  bool reverse;
};

struct PersistBackward {
  const void* dh;     // low [N, H] or null, as the next two
  const void* dh_n;   // low [B, H]
  const float* dc_n;  // [B, H]
  const void* gates;  // low [N, 4H] from forward
  const float* c;     // [N, H] from forward
  const void* weight_hh;
  const float* c0;
  void* dx_gates;  // low [N, 4H] out; may be gates
  void* dh0;       // low [B, H]  out
  float* dc0;      // [B, H]      out
  bool reverse;
};

// A compiled shape of the kernels: what one block of threads owns. It serves H <= depth and up to `rows` rows; more
// rows are more groups of blocks, which never wait for each other.
struct PersistTile {
  int64_t units, rows, depth, threads;
  bool cluster;        // the blocks of a group are a cluster, of 1, 2, 4, 8 or 16: for sm_90 and later
  int64_t int8_depth;  // depth with int8 weights; 0 where there are no such kernels
};
int persist_tiles();
PersistTile persist_tile(int tile);

// Bytes of scratch on the device, 16-byte aligned, uninitialised; of a call with this many directions.
size_t persist_forward_scratch(const PersistShape& shape, int tile, int directions);
size_t persist_backward_scratch(const PersistShape& shape, int tile, int directions);

// Blocks of threads that a call needs at a time, all of them or those of one cluster, and how many the current device
// can hold; 0 where the kernel cannot run on it at all. A call that needs more is refused, never started.
int64_t persist_blocks(const PersistShape& shape, int tile, int directions);
int64_t persist_forward_room(const PersistShape& shape, int tile);
int64_t persist_backward_room(const PersistShape& shape, int tile);

// Starts the work on the stream of the current device. Null, or what went wrong: text that lasts until the next call of
// this thread. One or two directions, in one launch.
const char* persist_forward(const PersistShape& shape, const PersistForward* directions, int count, int tile,
                            void* scratch, void* stream) noexcept;
const char* persist_backward(const PersistShape& shape, const PersistBackward* directions, int count, int tile,
                             void* scratch, void* stream) noexcept;

}  // namespace fastseq::cuda
