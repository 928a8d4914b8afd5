// How a low-rank step is cut. Its weights are two products in a row, so the threads would wait twice per step. Instead
// each block of units, once its cells are done, is multiplied at once with its part of the next product; after the
// barrier every thread adds up what the blocks gave, in ascending order. Blocks do not depend on the team, and so
// neither does a sum. Where no other thread has a part in a row the blocks add to its sum directly: the same numbers.
#pragma once

#include <algorithm>

#include "core/isa.h"
#include "core/lstm_lowrank.h"
#include "core/lstm_rows.h"

namespace fastseq::core {

// Units in blocks of whole panels of any instruction set.
struct Blocks {
  static constexpr int64_t kLeast = 64, kMost = 16;  // units of a block; blocks
  int64_t H, units, count;
  explicit Blocks(int64_t h) : H(h) {
    units = std::max<int64_t>(1, (h + kLeast * kMost - 1) / (kLeast * kMost)) * kLeast;
    count = (h + units - 1) / units;
  }
  Range block(int64_t n) const { return {n * units, std::min(H, (n + 1) * units)}; }
};

// What forward and backward decide alike.
template <class R>
struct LowRankPlan {
  const LowRankWeights<R>& weights;
  const Table<R>& table;
  Blocks blocks;
  Split split;
  Tiling tiling;
  bool direct;  // each row belongs to one thread
  int64_t width = tiling.width;

  LowRankPlan(const LstmArgs<R>& a, const LowRankWeights<R>& w, bool sums, int most)
      : weights(w),
        table(table_of<R>(kernels())),
        blocks(a.H),
        split(a, step_weights(w, a.H), sums, most),
        tiling(split, table),
        direct(split.by_rows || split.size == 1) {}

  // Elements that a step multiplies with a row.
  static int64_t step_weights(const LowRankWeights<R>& w, int64_t H) {
    int64_t found = w.count * H;
    for (const LowRankGate<R>& gate : w.gates) found += H * (gate.weight ? H : gate.rank);
    return found;
  }
  bool full(int g) const { return weights.gates[g].weight != nullptr; }
  // Of the product that gives the pre-activations of gate g.
  int64_t K(int g) const { return full(g) ? blocks.H : weights.gates[g].rank; }
  int64_t padded_units() const { return tiling.panels(blocks.H) * width; }
  int64_t block_panels() const { return tiling.panels(blocks.units); }
};

// The sums over blocks of one step after another, in panels of `width`. Each block gives one or more addends, which
// have numbers; they are added up in ascending order.
template <class R>
struct BlockSums {
  const Table<R>& table;
  int64_t panels, addends, rows;
  bool direct;         // each row belongs to one thread, which adds up in place
  R* parts = nullptr;  // [2][rows][panels][addends][width], or direct: [2][rows][panels][width]
  R* one = nullptr;    // a one

  int64_t kept() const { return direct ? 1 : addends; }
  int64_t row_size() const { return panels * kept() * table.panel_width; }
  int64_t size() const { return size(table, panels, addends, rows, direct); }
  static int64_t size(const Table<R>& table, int64_t panels, int64_t addends, int64_t rows, bool direct) {
    return round_up(2 * rows * panels * (direct ? 1 : addends) * table.panel_width);
  }
  R* row(int64_t step, int64_t r) const { return parts + ((step & 1) * rows + r) * row_size(); }

  // The product `t` of some rows, from r on, as an addend of the panels from `panel` on, for step number `step`.
  void add(TileArgs<R>& t, int64_t step, int64_t r, int64_t addend, int64_t panel) const {
    const int64_t width = table.panel_width;
    t.a_step = 1;
    t.c = row(step, r) + panel * kept() * width + (direct ? 0 : addend * width);
    t.c_row = row_size();
    t.c_panel = kept() * width;
    t.init = direct && addend > 0 ? Init::result : Init::zero;
    table.tile(t);
  }
  // The sum of a row, [panels][width]: in place, or in `out`.
  const R* sum(int64_t step, int64_t r, R* out) const {
    if (direct) return row(step, r);
    TileArgs<R> t;
    t.rows = 1;
    t.panels = panels;
    t.K = addends;
    t.a[0] = one;
    t.a_step = 0;
    t.b = row(step, r);
    t.b_panel = t.K * table.panel_width;
    t.c = out;
    t.c_row = 0;
    t.c_panel = table.panel_width;
    t.init = Init::zero;
    table.tile(t);
    return out;
  }
};

}  // namespace fastseq::core
