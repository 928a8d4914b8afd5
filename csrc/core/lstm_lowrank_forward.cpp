// Forward over time with low-rank weights: per step one product of few values with `up`, the cells, one product of
// their units with `down` for the step after, and one barrier.
#include "core/flush.h"
#include "core/lstm_cells.h"
#include "core/lstm_lowrank.h"
#include "core/lstm_lowrank_blocks.h"

namespace fastseq::core {
namespace {

template <class R>
struct Sizes {
  int64_t panels, v, pre, noise, local;
  Sizes(const LstmArgs<R>& a, const LowRankPlan<R>& plan)
      : panels(plan.tiling.panels(plan.weights.count)),
        v(panels * plan.width),
        pre(plan.block_panels() * plan.tiling.tile_rows * 4 * plan.width),
        noise(plan.tiling.tile_rows * 2 * plan.width),
        local(round_up(pre + noise + (plan.direct ? 0 : a.B * v))) {}
};

template <class R>
struct Forward {
  CellsForward<R> cells;
  const LowRankPlan<R>& plan;
  Sizes<R> sizes;
  BlockSums<R> v;      // down @ h after each step
  BlockSums<R> first;  // down @ h0 of each row, then down @ h_start
  R* up[4] = {};       // panels of [K][width] over units, where K is the rank, or H of a full gate
  R* down = nullptr;   // for each block, panels of [its units][width] over values of v
  R* zeros = nullptr;  // a row of zeros
  R* local = nullptr;  // per thread: pre-activations of a block for a tile of rows, noise of a panel, v of all rows
  const LstmForward<R>& call = cells.call;
  const LstmArgs<R>& a = cells.a;
  const Table<R>& table = cells.table;
  const Rows& rows = cells.rows;
  const LowRankWeights<R>& weights = plan.weights;
  const Blocks& blocks = plan.blocks;
  const Tiling& tiling = plan.tiling;

  void pack_weights(int rank, int size) const;
  void first_v(int rank, int size) const;
  const R* v_of(int64_t step, int64_t t, int64_t r, const R* sums) const;
  void cell_block(int64_t step, int64_t t, int64_t block, Range part, R* mine) const;
  void gate_product(int g, Range units, const TileArgs<R>& rows_of, R* pre) const;
};

template <class R>
void Forward<R>::pack_weights(int rank, int size) const {
  const int64_t width = plan.width;
  const Range mine = share(blocks.count * 5, rank, size);
  for (int64_t n = mine.begin; n < mine.end; ++n) {
    const Range units = blocks.block(n / 5);
    const int64_t count = units.end - units.begin;
    if (n % 5 == 4) {
      const Matrix<R> lines{weights.down, a.H, nullptr};
      table.pack_rows({lines, 0, units.begin, weights.count, count, width, down + units.begin * sizes.v});
      continue;
    }
    const int g = static_cast<int>(n % 5);
    const LowRankGate<R>& gate = weights.gates[g];
    const Matrix<R> lines{plan.full(g) ? gate.weight : gate.up, plan.full(g) ? a.H : gate.stride, nullptr};
    if (plan.K(g)) table.pack_rows({lines, units.begin, 0, count, plan.K(g), width, up[g] + units.begin * plan.K(g)});
  }
}

// down @ h of a state that no step left.
template <class R>
void Forward<R>::first_v(int rank, int size) const {
  const Range mine = share(a.B + 1, rank, size);
  for (int64_t begin = mine.begin; begin < mine.end; begin += tiling.tile_rows) {
    for (int64_t n = 0; n < blocks.count; ++n) {
      const Range units = blocks.block(n);
      TileArgs<R> t;
      t.rows = std::min(tiling.tile_rows, mine.end - begin);
      t.panels = v.panels;
      t.K = units.end - units.begin;
      for (int64_t i = 0; i < t.rows; ++i) {
        const int64_t b = begin + i;
        t.a[i] = (b < a.B ? a.h0 + b * a.H : a.h_start ? a.h_start : zeros) + units.begin;
      }
      t.b = down + units.begin * sizes.v;
      t.b_panel = t.K * plan.width;
      first.add(t, 0, begin, n, 0);
    }
  }
}

// down @ h for the h that enters step t, in place or among the thread's own `sums`.
template <class R>
const R* Forward<R>::v_of(int64_t step, int64_t t, int64_t r, const R* sums) const {
  if (rows.cut(t, r)) return first.row(0, a.B);
  if (r >= rows.count(rows.before(t))) return first.row(0, rows.batch(r));
  return v.direct ? v.row(step - 1, r) : sums + r * sizes.v;
}

// The pre-activations of gate g: [panels][tile_rows][4][width] in `pre`. rows_of: the number of rows and their values.
template <class R>
void Forward<R>::gate_product(int g, Range units, const TileArgs<R>& rows_of, R* pre) const {
  const int64_t width = plan.width;
  TileArgs<R> t = rows_of;
  t.panels = tiling.panels(units.end - units.begin);
  t.K = plan.K(g);
  t.b = up[g] + units.begin * t.K;
  t.b_panel = t.K * width;
  t.c = pre + g * width;
  t.c_row = 4 * width;
  t.c_panel = tiling.tile_rows * 4 * width;
  product(table, t);
}

template <class R>
void Forward<R>::cell_block(int64_t step, int64_t t, int64_t block, Range part, R* mine) const {
  const int64_t width = tiling.width, count = part.end - part.begin;
  const Range units = blocks.block(block);
  R* const noise = mine + sizes.pre;
  const R* const sums = noise + sizes.noise;
  cells.ahead(t, units.begin, units.end - units.begin, part);
  for (int g = 0; g < 4; ++g) {
    TileArgs<R> values;
    values.rows = count;
    if (plan.full(g)) {
      rows.entering(a, call.h, zeros, t, part, values.a);
    } else {
      for (int64_t i = 0; i < count; ++i) values.a[i] = v_of(step, t, part.begin + i, sums) + weights.gates[g].first;
    }
    gate_product(g, units, values, mine);
  }
  for (int64_t unit = units.begin; unit < units.end; unit += width) {
    const R* const pre = mine + (unit - units.begin) * tiling.tile_rows * 4;
    cells.run(t, unit, std::min(width, units.end - unit), part, pre, noise);
  }
  TileArgs<R> next;
  next.rows = count;
  next.panels = v.panels;
  next.K = units.end - units.begin;
  for (int64_t i = 0; i < count; ++i) next.a[i] = call.h + rows.element(t, part.begin + i) * a.H + units.begin;
  next.b = down + units.begin * sizes.v;
  next.b_panel = next.K * width;
  v.add(next, step, part.begin, block, 0);
}

template <class R>
void body(const void* context, int rank, int size, Barrier& barrier) {
  const auto& f = *static_cast<const Forward<R>*>(context);
  const FlushDenormals flush;
  R* const mine = f.local + rank * f.sizes.local;
  R* const sums = mine + f.sizes.pre + f.sizes.noise;
  f.pack_weights(rank, size);
  f.cells.first_state(rank, size);
  barrier.wait();
  f.first_v(rank, size);
  barrier.wait();
  for (int64_t s = 0; s < f.a.T; ++s) {
    const int64_t t = f.rows.step(s), n = f.rows.count(t), going_on = std::min(n, f.rows.count(f.rows.before(t)));
    for (int64_t r = 0; r < going_on && !f.v.direct; ++r) f.v.sum(s - 1, r, sums + r * f.sizes.v);
    const int64_t order = f.v.direct ? 0 : s;  // blocks must ascend where they add up in place
    f.tiling.each(false, f.blocks.count, n, order, rank, size,
                  [&](int64_t block, int64_t tile) { f.cell_block(s, t, block, f.tiling.tile(tile, n), mine); });
    if (!f.plan.split.by_rows) barrier.wait();
  }
}

template <class R>
Forward<R> forward_of(const LowRankForward<R>& call, const LowRankPlan<R>& plan, const Rows& rows) {
  const LstmArgs<R>& a = call.recurrence.args;
  const Sizes<R> sizes(a, plan);
  const int64_t count = plan.blocks.count;
  return {{call.recurrence, plan.table, rows},
          plan,
          sizes,
          {plan.table, sizes.panels, count, a.B, plan.direct},
          {plan.table, sizes.panels, count, a.B + 1, true}};
}

}  // namespace

template <class R>
size_t lstm_lowrank_scratch(const LowRankForward<R>& call, int most) {
  const LstmArgs<R>& a = call.recurrence.args;
  const LowRankPlan<R> plan(a, call.weights, false, most);
  const Sizes<R> sizes(a, plan);
  int64_t size = index_size(a) + round_up(a.H * sizes.v) + round_up(1) + round_up(a.H) + most * sizes.local;
  for (int g = 0; g < 4; ++g) size += plan.padded_units() * plan.K(g);
  return size + BlockSums<R>::size(plan.table, sizes.panels, plan.blocks.count, a.B, plan.direct) +
         BlockSums<R>::size(plan.table, sizes.panels, plan.blocks.count, a.B + 1, true);
}

template <class R>
void lstm_lowrank_forward(const LowRankForward<R>& call, R* scratch, const Team& team) noexcept {
  const LstmArgs<R>& a = call.recurrence.args;
  const LowRankPlan<R> plan(a, call.weights, false, team.most);
  const Rows rows(a, reinterpret_cast<int64_t*>(take(scratch, index_size(a))));
  Forward<R> f = forward_of(call, plan, rows);
  f.down = take(scratch, round_up(a.H * f.sizes.v));
  f.v.one = take(scratch, round_up(1));
  f.zeros = take(scratch, round_up(a.H));
  for (int g = 0; g < 4; ++g) f.up[g] = take(scratch, plan.padded_units() * plan.K(g));
  f.v.parts = take(scratch, f.v.size());
  f.first.parts = take(scratch, f.first.size());
  f.local = scratch;
  *f.v.one = R(1);
  std::fill(f.zeros, f.zeros + a.H, R(0));
  zero_padding(call.recurrence);
  team.run(plan.split.size, body<R>, &f);
}

template size_t lstm_lowrank_scratch(const LowRankForward<float>&, int);
template size_t lstm_lowrank_scratch(const LowRankForward<double>&, int);
template void lstm_lowrank_forward(const LowRankForward<float>&, float*, const Team&) noexcept;
template void lstm_lowrank_forward(const LowRankForward<double>&, double*, const Team&) noexcept;

}  // namespace fastseq::core
