// Rows as the parts of a packed matrix take them: floats, or integers with a scale, and for those the sums of each
// group.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "core/gemm.h"
#include "core/isa.h"
#include "core/matrix.h"

namespace fastseq::core {

constexpr int64_t kMostParts = 5;  // that meet one row: four gates and the lower factors

// The ways in which parts divide K into groups, each once.
struct Groupings {
  int count = 0;
  int64_t group[kMostParts], at[kMostParts];
  int64_t total = 0;  // sums of a row

  void add(const Piece& p) {
    if (!is_integer(p.storage) || place(p) >= 0) return;
    group[count] = p.group;
    at[count++] = total;
    total += p.groups();
  }
  int64_t place(const Piece& p) const {
    for (int n = 0; n < count; ++n) {
      if (group[n] == p.group) return at[n];
    }
    return -1;
  }
};

// Hands out pieces of memory, each at a multiple of 64 bytes; without memory it only counts.
struct Places {
  uint8_t* memory;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    const int64_t at = used;
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return memory ? reinterpret_cast<T*>(memory + at) : nullptr;
  }
};

// Integers of rows of K.
struct Integers {
  int64_t K = 0, width = 0;
  Groupings groupings;
  int8_t* q = nullptr;      // [rows][width], zeros beyond K
  int32_t* sums = nullptr;  // [rows][groupings.total]
  float* scale = nullptr;   // [rows], or null where all have the scale that is in the matrix already

  bool used() const { return groupings.count > 0; }
  void init(int64_t columns) {
    K = columns;
    width = (columns + kIntegerPad - 1) / kIntegerPad * kIntegerPad;
  }
  void place(Places& places, int64_t rows, bool scaled) {
    if (!used()) return;
    q = places.take<int8_t>(rows * width);
    sums = places.take<int32_t>(rows * groupings.total);
    if (scaled) scale = places.take<float>(rows);
  }
  int8_t* row(int64_t r) const { return q + r * width; }

  void sum(const MatrixTable& table, int64_t r) const {
    for (int n = 0; n < groupings.count; ++n) {
      table.sum_integers(row(r), K, groupings.group[n], sums + r * groupings.total + groupings.at[n]);
    }
  }
  // By its largest magnitude. Below 2^-118 the row counts as zeros, since denormal numbers would decide, and they are
  // flushed; where it is not finite, all that the row meets becomes NaN.
  void quantize(const MatrixTable& table, int64_t r, const float* x) const {
    constexpr float kLeast = 0x1p-118f, kNaN = std::numeric_limits<float>::quiet_NaN();
    const float most = table.magnitude(x, K);
    const bool finite = most <= std::numeric_limits<float>::max();
    const bool zero = most < kLeast || !finite;
    table.to_integers(x, K, zero ? 0.0f : 127.0f / most, row(r));
    std::fill(row(r) + K, row(r) + width, int8_t(0));
    scale[r] = !finite ? kNaN : zero ? 0.0f : most / 127.0f;
    sum(table, r);
  }
  // Of numbers within -1 .. 1: 127 times each.
  void quantize_fixed(const MatrixTable& table, int64_t r, const float* x) const {
    table.to_integers(x, K, 127.0f, row(r));
    std::fill(row(r) + K, row(r) + width, int8_t(0));
    sum(table, r);
  }
};

// The rows of a register tile.
struct TileRows {
  int64_t count = 0;
  const float* x[kMostMatrixRows];
  const Integers* integers = nullptr;
  int64_t number[kMostMatrixRows];  // among the integers
};

// Panels of a part, from `panel` on, times these rows, plus bias [panels][16] or null; result (i, p) at c + i * c_row +
// p * c_panel. parts 4: `panels` counts those of four parts that lie side by side, of which this is the first.
inline void multiply(const MatrixTable& table, const Piece& p, int64_t panel, int64_t panels, int64_t parts,
                     const TileRows& rows, const float* bias, float* c, int64_t c_row, int64_t c_panel) {
  MatrixTile t;
  t.storage = p.storage;
  t.rows = rows.count;
  t.panels = panels;
  t.K = p.K;
  t.group = p.group;
  t.block = block_k(p.K);
  t.b = p.data + panel * p.stride;
  t.b_panel = p.stride / parts;
  t.scale = p.scale ? p.scale + panel * p.scale_stride : nullptr;
  t.scale_panel = p.scale_stride / parts;
  t.bias = bias;
  t.c = c;
  t.c_row = c_row;
  t.c_panel = c_panel;
  t.a_scale[0] = nullptr;
  if (is_integer(p.storage)) {
    const Integers& from = *rows.integers;
    const int64_t at = from.groupings.place(p);
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t r = rows.number[i];
      t.a[i] = from.row(r);
      t.sums[i] = from.sums + r * from.groupings.total + at;
      if (from.scale) t.a_scale[i] = from.scale + r;
    }
  } else {
    for (int64_t i = 0; i < rows.count; ++i) t.a[i] = rows.x[i];
  }
  table.tile(t);
}

}  // namespace fastseq::core
