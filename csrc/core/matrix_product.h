// The product of many rows with a packed matrix, in parts that a team shares as it likes: rows are prepared, panels of
// the lower factors are made, what they made is prepared, panels of results are made. Rows are numbered slots.
#pragma once

#include <algorithm>
#include <cstring>

#include "core/matrix_rows.h"

namespace fastseq::core {

class Product {
 public:
  Product(const PackedMatrix& matrix, const MatrixTable& kernels, int64_t most)
      : w(matrix), table(kernels), slots(most), panels(matrix.gate[0].piece.panels()) {
    x.init(w.K);
    if (w.down.N) x.groupings.add(w.down);
    for (int g = 0; g < w.gates; ++g) {
      Integers& meets = w.gate[g].rank ? upper[g] : x;
      if (w.gate[g].rank) meets.init(w.gate[g].rank);
      meets.groupings.add(w.gate[g].piece);
    }
  }
  void place(Places& places) {
    x.place(places, slots, true);
    rows = places.take<const float*>(slots);
    values = places.take<float>(slots * w.down.N);
    for (Integers& u : upper) u.place(places, slots, true);
    bias = places.take<float>(panels * w.gates * kMatrixPanel);
  }
  // [N] or null, by panel and gate. `fill`: this is the one of those with the same memory who writes it.
  void set_bias(const float* from, bool fill = true) {
    if (!from) bias = nullptr;
    if (!from || !fill) return;
    const int64_t H = w.N / w.gates;
    float* to = bias;
    for (int64_t n = 0; n < H; n += kMatrixPanel) {
      const int64_t there = std::min(kMatrixPanel, H - n);
      for (int g = 0; g < w.gates; ++g, to += kMatrixPanel) {
        std::fill(std::copy_n(from + g * H + n, there, to), to + kMatrixPanel, 0.0f);
      }
    }
  }

  void prepare(int64_t slot, const float* row) const {
    rows[slot] = row;
    if (x.used()) x.quantize(table, slot, row);
  }
  int64_t lower_panels() const { return w.down.N ? w.down.panels() : 0; }
  void lower(int64_t panel, Range part) const {
    for (int64_t m = part.begin; m < part.end; m += table.rows) {
      const TileRows t = of_input(m, part.end);
      multiply(table, w.down, panel, 1, 1, t, nullptr, values + m * w.down.N + panel * kMatrixPanel, w.down.N, 0);
    }
  }
  void prepare_upper(int64_t slot) const {
    for (int g = 0; g < w.gates; ++g) {
      if (upper[g].used()) upper[g].quantize(table, slot, values + slot * w.down.N + w.gate[g].offset);
    }
  }
  // The same panel of every gate: slot s of gate g at y + s * row + g * gate.
  void panel(int64_t panel, Range part, float* y, int64_t row, int64_t gate) const {
    const float* const plus = bias ? bias + panel * w.gates * kMatrixPanel : nullptr;
    for (int64_t m = part.begin; m < part.end; m += table.rows) {
      const TileRows t = of_input(m, part.end);
      float* const c = y + m * row;
      if (w.alike && !w.gate[0].rank) {
        multiply(table, w.gate[0].piece, panel, w.gates, w.gates, t, plus, c, row, gate);
        continue;
      }
      for (int g = 0; g < w.gates; ++g) {
        const GateRows& rows_of = w.gate[g];
        const TileRows from = rows_of.rank ? of_values(m, part.end, g) : t;
        multiply(table, rows_of.piece, panel, 1, 1, from, plus ? plus + g * kMatrixPanel : nullptr, c + g * gate, row,
                 0);
      }
    }
  }

  const PackedMatrix& w;
  const MatrixTable& table;
  const int64_t slots, panels;

 private:
  TileRows of_input(int64_t first, int64_t end) const {
    TileRows t;
    t.count = std::min<int64_t>(table.rows, end - first);
    t.integers = &x;
    for (int64_t i = 0; i < t.count; ++i) {
      t.x[i] = rows[first + i];
      t.number[i] = first + i;
    }
    return t;
  }
  TileRows of_values(int64_t first, int64_t end, int gate) const {
    TileRows t = of_input(first, end);
    t.integers = &upper[gate];
    for (int64_t i = 0; i < t.count; ++i) t.x[i] = values + (first + i) * w.down.N + w.gate[gate].offset;
    return t;
  }

  Integers x;                    // of the rows
  const float** rows = nullptr;  // [slots]
  float* values = nullptr;       // [slots][down.N] what the lower factors make
  Integers upper[4];             // of them, by gate
  float* bias = nullptr;         // [panels][gates][16]
};

}  // namespace fastseq::core
