// Sums over the rows of a matrix.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/parallel.h"

namespace fastseq::core {

template <class R>
struct ColumnSum {
  const R* data;  // [rows, columns], rows `stride` apart
  int64_t rows, columns, stride;
  R* out;
};

// The body of a team. Each thread has its own columns and adds the rows in order, block by block to keep the error
// small, so the sum does not depend on the number of threads.
template <class R>
void column_sum(const void* context, int rank, int size, Barrier&) {
  const auto& s = *static_cast<const ColumnSum<R>*>(context);
  const Range mine = share(s.columns, rank, size);
  constexpr int64_t kBlock = 256, kRows = 64;
  for (int64_t begin = mine.begin; begin < mine.end; begin += kBlock) {
    const int64_t count = std::min(kBlock, mine.end - begin);
    R total[kBlock] = {};
    for (int64_t first = 0; first < s.rows; first += kRows) {
      R sum[kBlock] = {};
      for (int64_t row = first; row < std::min(first + kRows, s.rows); ++row) {
        const R* const in = s.data + row * s.stride + begin;
        for (int64_t i = 0; i < count; ++i) sum[i] += in[i];
      }
      for (int64_t i = 0; i < count; ++i) total[i] += sum[i];
    }
    std::copy(total, total + count, s.out + begin);
  }
}

}  // namespace fastseq::core
