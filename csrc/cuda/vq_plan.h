// Sizes of a lookup: of a block of threads, and from a call and its number of parts.
#pragma once

#include <algorithm>

#include "cuda/fragment.h"
#include "cuda/vq_lookup.h"

namespace fastseq::cuda {

// Of a block of threads: four warps with four rows each, and one beside them; codes of a tile.
constexpr int kVqThreads = 160, kVqRows = 16, kVqCodes = 32;

// Columns of a row or code in shared memory: zeros behind the last, and so many that lanes which read four columns of
// codes one below the other do not meet in a bank.
FASTSEQ_BOTH constexpr int vq_stride(int64_t D) { return 4 * static_cast<int>((D + 3) / 4 | 1); }
// Bytes: rows, a tile, what its scores begin with, and the codes that rows were given.
constexpr size_t vq_shared(int64_t D, int levels) {
  return sizeof(float) * ((kVqRows + kVqCodes) * vq_stride(D) + kVqCodes) + sizeof(int) * levels * kVqRows;
}
static_assert(vq_shared(kVqMostD, kVqMostLevels) <= 99 << 10, "the smallest GPU has room");

inline int64_t row_groups(const VqLookup& call) { return (call.N + kVqRows - 1) / kVqRows; }

// Every part has a tile of the largest codebook.
inline int64_t most_parts(const VqLookup& call) {
  int64_t most = 0;
  for (int m = 0; m < call.levels; ++m) most = std::max(most, (call.level[m].K + kVqCodes - 1) / kVqCodes);
  return most;
}

// Words of 32 bits through which blocks speak: two of a row, level and part, of which there is an even number.
inline size_t lookup_words(const VqLookup& call, int parts) {
  return size_t{2} * call.G * call.levels * row_groups(call) * kVqRows * ((parts + 1) / 2 * 2);
}

}  // namespace fastseq::cuda
