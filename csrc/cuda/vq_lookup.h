// Vector quantization of few rows in one launch, through a stack of codebooks: level m looks up what the codes of the
// levels before it left of each row. Definitions: fastseq/reference/vq.py, and of more than one level vq_residual.py.
// G groups, N rows, D columns, M levels, K_m codes. Everything lies on one device, rightmost dimension contiguous;
// nothing may alias anything. Equal bits for any number of parts, and from run to run.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/vq_number.h"

namespace fastseq::cuda {

constexpr int kVqMostLevels = 32;
constexpr int64_t kVqMostD = 512;  // rows and codes of a block in float32 fill the shared memory of a small GPU
constexpr int kVqMostParts = 64;

struct VqLevel {
  int64_t K;          // 1 .. 2**31 - 1
  const void* codes;  // code [G, K, D]
};

struct VqLookup {
  int64_t G, N, D;  // each at least 1
  int levels;       // M, 1 .. kVqMostLevels
  VqLevel level[kVqMostLevels];
  const void* x;         // row [G, N, D]
  const bool* mask;      // [G, N] or null: the rows that count
  const int64_t* depth;  // [N] or null: how many levels each row uses
  Number row, code;      // what x and quantized are, and the codes
  bool dot;              // see vq_scores
  int bits;              // of an index: 16, 32 or 64
  void* index;           // [G, N, M]           out  -1 where a level is not used
  float* distance;       // [G, M, N] or null   out  squared, of what was left and its code; 0 where not used
  float* score;          // [G, M, N] or null   out  +inf where not used or where the row is not finite
  void* quantized;       // row [G, N, D] or null  out  sum of the codes in the order of the levels
};

// Parts in which the codes are best looked at, 1 .. kVqMostParts; 0 where the current device has no room for even one.
// Needs the sizes of a call alone.
int vq_lookup_parts(const VqLookup& call);
// Bytes, of which nothing may be expected or kept.
size_t vq_lookup_scratch(const VqLookup& call, int parts);
// Null, or why nothing was launched. stream: a cudaStream_t.
const char* vq_lookup(const VqLookup& call, int parts, void* scratch, void* stream) noexcept;

}  // namespace fastseq::cuda
