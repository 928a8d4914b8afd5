// Backward over time with low-rank weights: per step one product of few values with `down`, the derivatives of the
// cells, one product of their units with `up` for the step before, and one barrier. The gradients of the weights are
// products over all elements after the loop.
#include "core/flush.h"
#include "core/lstm_cells.h"
#include "core/lstm_lowrank.h"
#include "core/lstm_lowrank_blocks.h"

namespace fastseq::core {
namespace {

// Gradients of v: of each gate its own ranks in panels of their own, one gate after the other; or those that all share.
template <class R>
struct Sizes {
  int64_t first[4], rank[4], panel[4];
  int segments, addends;
  int64_t panels = 0, dv, from, dh, local;
  Sizes(const LstmArgs<R>& a, const LowRankPlan<R>& plan) {
    segments = plan.weights.shared ? 1 : 4;
    addends = static_cast<int>(plan.blocks.count) * 4 / segments;
    for (int n = 0; n < segments; ++n) {
      first[n] = plan.weights.gates[n].first;
      rank[n] = plan.weights.gates[n].rank;
      panel[n] = panels;
      panels += plan.tiling.panels(rank[n]);
    }
    dv = panels * plan.width;
    from = plan.block_panels() * plan.tiling.tile_rows * plan.width;
    dh = plan.tiling.tile_rows * plan.width;
    local = round_up(from + dh + (plan.direct ? 0 : a.B * dv));
  }
  int segment(int g) const { return segments == 1 ? 0 : g; }
};

template <class R>
struct Backward {
  CellsBackward<R> cells;
  const LowRankPlan<R>& plan;
  Sizes<R> sizes;
  BlockSums<R> sums;    // gradients of v after each step
  R* up[4] = {};        // for each block, panels of [its units][width] over ranks
  R* down[4] = {};      // of a segment: panels of [rank][width] over units
  R* weight[4] = {};    // of a full gate: panels of [H][width] over units
  R* dv_all = nullptr;  // [N, dv], where gradients of weights are wanted
  R* local = nullptr;   // per thread: gradients of h of a block for a tile of rows, of a panel, sums of all rows
  const LstmBackward<R>& call = cells.call;
  const LstmArgs<R>& a = cells.a;
  const Table<R>& table = cells.table;
  const Rows& rows = cells.rows;
  const LowRankWeights<R>& weights = plan.weights;
  const Blocks& blocks = plan.blocks;
  const Tiling& tiling = plan.tiling;

  void pack_gate(int g, Range units) const;
  void pack_weights(int rank, int size) const;
  void from_last(int64_t last, Range units, Range part, const R* const* dv, R* out) const;
  void to_next(int64_t step, int64_t t, int64_t block, Range part) const;
  void cell_block(int64_t step, int64_t block, Range part, R* mine) const;
};

template <class R>
void Backward<R>::pack_gate(int g, Range units) const {
  const int64_t width = plan.width, begin = units.begin, count = units.end - begin;
  const LowRankGate<R>& gate = weights.gates[g];
  if (plan.full(g)) {
    table.pack_columns({{gate.weight, a.H, nullptr}, 0, begin, count, a.H, width, weight[g] + begin * a.H});
  } else if (gate.rank) {
    R* const out = up[g] + begin * tiling.panels(gate.rank) * width;
    table.pack_columns({{gate.up, gate.stride, nullptr}, begin, 0, gate.rank, count, width, out});
  }
  if (g < sizes.segments && sizes.rank[g]) {
    R* const out = down[g] + begin * sizes.rank[g];
    table.pack_columns({{weights.down, a.H, nullptr}, sizes.first[g], begin, count, sizes.rank[g], width, out});
  }
}

template <class R>
void Backward<R>::pack_weights(int rank, int size) const {
  const Range mine = share(blocks.count * 4, rank, size);
  for (int64_t n = mine.begin; n < mine.end; ++n) pack_gate(static_cast<int>(n % 4), blocks.block(n / 4));
}

// The gradient that reaches the state before step `last` through its pre-activations: [rows][panels][width].
template <class R>
void Backward<R>::from_last(int64_t last, Range units, Range part, const R* const* dv, R* out) const {
  TileArgs<R> t;
  t.rows = part.end - part.begin;
  t.panels = tiling.panels(units.end - units.begin);
  t.c = out;
  t.c_row = t.panels * plan.width;
  t.c_panel = plan.width;
  Init init = Init::zero;
  const auto multiply = [&](int64_t K, const R* b) {
    t.K = K;
    t.b = b;
    t.b_panel = K * plan.width;
    product(table, t, init);
    init = Init::result;
  };
  for (int n = 0; n < sizes.segments; ++n) {
    if (!sizes.rank[n]) continue;
    for (int64_t i = 0; i < t.rows; ++i) t.a[i] = dv[i] + sizes.panel[n] * plan.width;
    multiply(sizes.rank[n], down[n] + units.begin * sizes.rank[n]);
  }
  for (int g = 0; g < 4; ++g) {
    if (!plan.full(g)) continue;
    for (int64_t i = 0; i < t.rows; ++i)
      t.a[i] = call.dx_gates + rows.element(last, part.begin + i) * 4 * a.H + g * a.H;
    multiply(a.H, weight[g] + units.begin * a.H);
  }
  if (init == Init::zero) std::fill(out, out + t.rows * t.c_row, R(0));
}

// The part of a block's units in the gradients of v.
template <class R>
void Backward<R>::to_next(int64_t step, int64_t t, int64_t block, Range part) const {
  const Range units = blocks.block(block);
  for (int g = 0; g < 4; ++g) {
    const int64_t rank = weights.gates[g].rank, panels = tiling.panels(rank);
    if (!rank) continue;
    TileArgs<R> next;
    next.rows = part.end - part.begin;
    next.panels = panels;
    next.K = units.end - units.begin;
    for (int64_t i = 0; i < next.rows; ++i) {
      next.a[i] = call.dx_gates + rows.element(t, part.begin + i) * 4 * a.H + g * a.H + units.begin;
    }
    next.b = up[g] + units.begin * panels * plan.width;
    next.b_panel = next.K * plan.width;
    sums.add(next, step, part.begin, sizes.segments == 1 ? 4 * block + g : block, sizes.panel[sizes.segment(g)]);
  }
}

// Step number `step` goes to t, from `last`, whose gradients of v are in place or among the thread's own.
template <class R>
void Backward<R>::cell_block(int64_t step, int64_t block, Range part, R* mine) const {
  const int64_t t = rows.step(a.T - 1 - step), last = rows.step(a.T - step), width = plan.width;
  const Range units = blocks.block(block);
  const int64_t row_size = tiling.panels(units.end - units.begin) * width;
  const Range going_on{part.begin, std::min(part.end, rows.count(last))};
  R* const dh = mine + sizes.from;
  const R* const own = dh + sizes.dh;
  cells.ahead(t, units.begin, units.end - units.begin, part);
  if (going_on.begin < going_on.end) {
    const R* dv[kMostTileRows];
    for (int64_t r = going_on.begin, i = 0; r < going_on.end; ++r, ++i) {
      dv[i] = plan.direct ? sums.row(step - 1, r) : own + r * sizes.dv;
      if (dv_all && block == 0) std::memcpy(dv_all + rows.element(last, r) * sizes.dv, dv[i], sizes.dv * sizeof(R));
    }
    from_last(last, units, going_on, dv, mine);
  }
  for (int64_t unit = units.begin; unit < units.end; unit += width) {
    cells.state(t, last, unit, part, mine + unit - units.begin, row_size, dh);
    cells.cut_c(last, unit, part);
    cells.run(t, unit, part, dh);
  }
  const Range live{part.begin, std::min(part.end, rows.count(t))};
  if (live.begin < live.end) to_next(step, t, block, live);
}

template <class R>
void body(const void* context, int rank, int size, Barrier& barrier) {
  const auto& b = *static_cast<const Backward<R>*>(context);
  const FlushDenormals flush;
  R* const mine = b.local + rank * b.sizes.local;
  R* const own = mine + b.sizes.from + b.sizes.dh;
  b.pack_weights(rank, size);
  b.cells.begin(rank, size);
  barrier.wait();
  for (int64_t s = 0; s <= b.a.T; ++s) {
    const int64_t n_last = b.rows.count(b.rows.step(b.a.T - s));
    const int64_t n = std::max(b.rows.count(b.rows.step(b.a.T - 1 - s)), n_last);
    for (int64_t r = 0; r < n_last && !b.plan.direct; ++r) b.sums.sum(s - 1, r, own + r * b.sizes.dv);
    const int64_t order = b.plan.direct ? 0 : s;  // blocks must ascend where they add up in place
    const bool whole = b.call.dh_start != nullptr;
    b.tiling.each(whole, b.blocks.count, n, order, rank, size,
                  [&](int64_t block, int64_t tile) { b.cell_block(s, block, b.tiling.tile(tile, n), mine); });
    if (!b.plan.split.by_rows) barrier.wait();
  }
}

// The products over all elements, with v = down @ h for the h that entered each: as many as there are gates of a kind.
template <class R>
GemmArgs<R> shape(int64_t M, int64_t N, int64_t K, bool transposed_a) {
  return {M, N, K, {}, {}, transposed_a, !transposed_a, nullptr, nullptr};
}

template <class R>
size_t products_scratch(const LstmArgs<R>& a, const LowRankPlan<R>& plan, const Sizes<R>& sizes, int most) {
  size_t found = gemm_scratch(shape<R>(a.N, plan.weights.count, a.H, false), most);
  for (int g = 0; g < 4; ++g) {
    found = std::max(found, gemm_scratch(shape<R>(a.H, plan.K(g), a.N, true), most));
    if (g < sizes.segments) found = std::max(found, gemm_scratch(shape<R>(sizes.rank[g], a.H, a.N, true), most));
  }
  if (sizes.dv == plan.weights.count) {
    found = std::max(found, gemm_scratch(shape<R>(plan.weights.count, a.H, a.N, true), most));
  }
  return found;
}

template <class R>
void weight_gradients(const LowRankBackward<R>& call, const Backward<R>& b, const R* const* h_in, R* v, R* scratch,
                      const Team& team) {
  const LstmArgs<R>& a = b.a;
  const LowRankWeights<R>& w = call.weights;
  GemmArgs<R> product = shape<R>(a.N, w.count, a.H, false);
  product.a.rows = h_in;
  product.b = {w.down, a.H, nullptr};
  product.c = v;
  gemm(product, scratch, team);
  for (int g = 0; g < 4; ++g) {
    product = shape<R>(a.H, b.plan.K(g), a.N, true);
    product.a = {call.recurrence.dx_gates + g * a.H, 4 * a.H, nullptr};
    if (b.plan.full(g)) {
      product.b.rows = h_in;
      product.c = call.dweight[g];
    } else {
      product.b = {v + w.gates[g].first, w.count, nullptr};
      product.c = call.dup[g];
      product.c_stride = w.gates[g].stride;
    }
    gemm(product, scratch, team);
  }
  const bool together = b.sizes.dv == w.count;  // no panel is padded: all ranks follow each other
  for (int n = 0; n < (together ? 1 : b.sizes.segments); ++n) {
    product = shape<R>(together ? w.count : b.sizes.rank[n], a.H, a.N, true);
    product.a = {b.dv_all + b.sizes.panel[n] * b.plan.width, b.sizes.dv, nullptr};
    product.b.rows = h_in;
    product.c = call.ddown + b.sizes.first[n] * a.H;
    gemm(product, scratch, team);
  }
}

template <class R>
BlockSums<R> sums_of(const LstmArgs<R>& a, const LowRankPlan<R>& plan, const Sizes<R>& sizes) {
  return {plan.table, sizes.panels, sizes.addends, a.B, plan.direct};
}

}  // namespace

template <class R>
size_t lstm_lowrank_scratch(const LowRankBackward<R>& call, int most) {
  const LstmArgs<R>& a = call.recurrence.args;
  const LowRankPlan<R> plan(a, call.weights, sums(a), most);
  const Sizes<R> sizes(a, plan);
  int64_t size = index_size(a, a.N) + round_up(1) + round_up(a.H) + sums_of(a, plan, sizes).size();
  for (int g = 0; g < 4; ++g) {
    size += plan.full(g) ? plan.padded_units() * a.H : round_up(a.H * plan.tiling.panels(plan.K(g)) * plan.width);
    if (g < sizes.segments) size += plan.padded_units() * sizes.rank[g];
  }
  size += most * sizes.local;
  if (!call.products) return size;
  return size + round_up(a.N * sizes.dv) + round_up(a.N * call.weights.count) + products_scratch(a, plan, sizes, most);
}

template <class R>
void lstm_lowrank_backward(const LowRankBackward<R>& call, R* scratch, const Team& team) noexcept {
  const LstmArgs<R>& a = call.recurrence.args;
  const LowRankPlan<R> plan(a, call.weights, sums(a), team.most);
  const Sizes<R> sizes(a, plan);
  int64_t* const index = reinterpret_cast<int64_t*>(take(scratch, index_size(a, a.N)));
  const Rows rows(a, index);
  R* const zeros = take(scratch, round_up(a.H));
  std::fill(zeros, zeros + a.H, R(0));
  Backward<R> b{{call.recurrence, plan.table, rows, zeros}, plan, sizes, sums_of(a, plan, sizes)};
  b.sums.one = take(scratch, round_up(1));
  *b.sums.one = R(1);
  b.sums.parts = take(scratch, b.sums.size());
  for (int g = 0; g < 4; ++g) {
    if (plan.full(g)) {
      b.weight[g] = take(scratch, plan.padded_units() * a.H);
    } else {
      b.up[g] = take(scratch, round_up(a.H * plan.tiling.panels(plan.K(g)) * plan.width));
    }
    if (g < sizes.segments) b.down[g] = take(scratch, plan.padded_units() * sizes.rank[g]);
  }
  if (call.products) {
    b.dv_all = take(scratch, round_up(a.N * sizes.dv));
    if (a.lengths) std::fill(b.dv_all, b.dv_all + a.N * sizes.dv, R(0));
  }
  b.local = take(scratch, team.most * sizes.local);
  b.cells.zero_padding();
  team.run(plan.split.size, body<R>, &b);
  if (!call.products) return;
  R* const v = take(scratch, round_up(a.N * call.weights.count));
  const R** const h_in = reinterpret_cast<const R**>(index + Rows::need(a.T, a.B));
  entering<R>(rows, a, call.recurrence.h, zeros, h_in);
  weight_gradients(call, b, h_in, v, scratch, team);
}

template size_t lstm_lowrank_scratch(const LowRankBackward<float>&, int);
template size_t lstm_lowrank_scratch(const LowRankBackward<double>&, int);
template void lstm_lowrank_backward(const LowRankBackward<float>&, float*, const Team&) noexcept;
template void lstm_lowrank_backward(const LowRankBackward<double>&, double*, const Team&) noexcept;

}  // namespace fastseq::core
