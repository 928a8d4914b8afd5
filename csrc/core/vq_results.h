// What every way of looking up does with the rows it has and the codes it found.
#pragma once

#include <algorithm>
#include <limits>

#include "core/isa.h"
#include "core/parallel.h"
#include "core/vq.h"

namespace fastseq::core {

// Of `count` elements, up to the next boundary of 64.
template <class T>
int64_t bytes(int64_t count) {
  return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
}

template <class R>
void write_index(const VqNearest<R>& a, int64_t at, int64_t k) {
  if (a.bits == 64) {
    static_cast<int64_t*>(a.index)[at] = k;
  } else if (a.bits == 32) {
    static_cast<int32_t*>(a.index)[at] = static_cast<int32_t>(k);
  } else {
    static_cast<int16_t*>(a.index)[at] = static_cast<int16_t>(k);
  }
}

// Row n of group g has code k, with that score, as its `rank`-th.
template <class R>
void finish(const VqNearest<R>& a, const Table<R>& table, int64_t g, int64_t n, int64_t rank, int64_t k, R score) {
  const VqShape<R>& s = a.shape;
  const int64_t row = g * s.N + n, at = row * a.best + rank;
  write_index(a, at, k);
  if (a.score) a.score[at] = score;
  if (!a.distance && !a.codes) return;
  R* const copy = a.codes ? a.codes + row * s.D : nullptr;
  const R d = table.vq_distance(s.x + row * s.D, s.codebook + (g * s.K + k) * s.D, s.D, copy);
  if (a.distance) a.distance[at] = d;
}

// Numbers of the rows that count, [G, N], and how many, [G]; writes the results of the others.
template <class R>
void sort_rows(const VqNearest<R>& a, int64_t* valid_rows, int64_t* valid, Range groups) {
  const VqShape<R>& s = a.shape;
  for (int64_t g = groups.begin; g < groups.end; ++g) {
    int64_t count = 0;
    for (int64_t n = 0; n < s.N; ++n) {
      const int64_t row = g * s.N + n;
      if (s.mask[row]) {
        valid_rows[g * s.N + count++] = n;
        continue;
      }
      for (int64_t r = 0; r < a.best; ++r) {
        write_index(a, row * a.best + r, -1);
        if (a.distance) a.distance[row * a.best + r] = R(0);
        if (a.score) a.score[row * a.best + r] = std::numeric_limits<R>::infinity();
      }
      if (a.codes) std::fill_n(a.codes + row * s.D, s.D, R(0));
    }
    valid[g] = count;
  }
}

}  // namespace fastseq::core
