// Sizes of a lookup, from its call and the number of parts.
#pragma once

#include <algorithm>

#include "cuda/vq_lookup.h"

namespace fastseq::cuda {

constexpr int kVqRows = 16, kVqCodes = 32;  // of a block of threads, and of a tile

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
