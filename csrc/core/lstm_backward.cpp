// Backward over time: the gradient of each step's pre-activations times the recurrent weights gives the gradient of the
// state before it, and the cell's derivative follows while the tile is in the nearest cache. At most one barrier per
// step (two with projection). The weights' gradients are one product each after the loop.
#include <cstring>

#include "core/flush.h"
#include "core/gemm.h"
#include "core/lstm_cells.h"

namespace fastseq::core {
namespace {

template <class R>
struct Backward {
  CellsBackward<R> cells;
  Split split;
  Tiling tiling;
  R* weight_hh = nullptr;  // panels of [4H][width] over P
  R* weight_hr = nullptr;  // panels of [P][width] over H
  R* local = nullptr;      // per thread: a tile of products of `group` panels, a tile of dh
  int64_t group = 1;       // panels in one product, where few rows alone would not fill the pipeline
  int64_t local_size = 0;
  const LstmBackward<R>& call = cells.call;
  const LstmArgs<R>& a = cells.a;
  const Table<R>& table = cells.table;
  const Rows& rows = cells.rows;

  void pack_weights(int rank, int size) const;
  void from_last(int64_t last, Range panels, Range part, R* out) const;
  void inner_tile(int64_t t, int64_t panel, Range part, R* mine) const;
};

template <class R>
void Backward<R>::pack_weights(int rank, int size) const {
  const int64_t width = tiling.width;
  const Range state = share(tiling.panels(a.P), rank, size);
  for (int64_t p = state.begin; p < state.end; ++p) {
    const int64_t unit = p * width, count = std::min(width, a.P - unit);
    table.pack_columns({{a.weight_hh, a.P, nullptr}, 0, unit, count, 4 * a.H, width, weight_hh + unit * 4 * a.H});
  }
  const Range inside = share(a.weight_hr ? tiling.panels(a.H) : 0, rank, size);
  for (int64_t p = inside.begin; p < inside.end; ++p) {
    const int64_t unit = p * width, count = std::min(width, a.H - unit);
    table.pack_columns({{a.weight_hr, a.H, nullptr}, 0, unit, count, a.P, width, weight_hr + unit * a.P});
  }
}

// The gradient that reaches the state before step `last` through its pre-activations: [rows][panels][width].
template <class R>
void Backward<R>::from_last(int64_t last, Range panels, Range part, R* out) const {
  const int64_t width = tiling.width, going_on = std::min(part.end, rows.count(last));
  if (going_on <= part.begin) return;
  TileArgs<R> rest;
  rest.rows = going_on - part.begin;
  rest.panels = panels.end - panels.begin;
  rest.K = 4 * a.H;
  for (int64_t i = 0; i < rest.rows; ++i) rest.a[i] = call.dx_gates + rows.element(last, part.begin + i) * 4 * a.H;
  rest.b = weight_hh + panels.begin * width * 4 * a.H;
  rest.b_panel = 4 * a.H * width;
  rest.c = out;
  rest.c_row = rest.panels * width;
  rest.c_panel = width;
  product(table, rest);
}

// With projection: dh of the whole row is ready; its product with weight_hr is the gradient of o * tanh(c).
template <class R>
void Backward<R>::inner_tile(int64_t t, int64_t panel, Range part, R* mine) const {
  const int64_t width = tiling.width, end = std::min(part.end, rows.count(t));
  if (end <= part.begin) return;
  TileArgs<R> inside;
  cells.ahead(t, panel * width, std::min(width, a.H - panel * width), part);
  inside.rows = end - part.begin;
  inside.panels = 1;
  inside.K = a.P;
  for (int64_t i = 0; i < inside.rows; ++i) inside.a[i] = cells.dh_step + (part.begin + i) * a.P;
  inside.b = weight_hr + panel * width * a.P;
  inside.b_panel = width * a.P;
  inside.c = mine;
  inside.c_row = inside.c_panel = width;
  product(table, inside);
  cells.run(t, panel * width, part, mine);
}

template <class R>
void run_steps(const Backward<R>& b, int rank, int size, Barrier& barrier) {
  const Rows& rows = b.rows;
  const LstmArgs<R>& a = b.a;
  const bool projected = a.weight_hr != nullptr, whole = b.call.dh_start != nullptr;
  const int64_t width = b.tiling.width;
  R* const mine = b.local + rank * b.local_size;
  R* const dh = mine + b.group * b.tiling.tile_rows * width;
  for (int64_t s = 0; s <= a.T; ++s) {
    const int64_t t = rows.step(a.T - 1 - s), last = rows.step(a.T - s);  // after the loop over time: t is outside
    const int64_t n = std::max(rows.count(t), rows.count(last));
    const auto finish = [&](int64_t panel, Range part, const R* from_last, int64_t from_row) {
      b.cells.state(t, last, panel * width, part, from_last, from_row, dh);
      if (projected) return;
      b.cells.cut_c(last, panel * width, part);
      b.cells.run(t, panel * width, part, dh);
    };
    if (b.group > 1) {
      const Range panels = share(b.tiling.panels(a.P), rank, size), part{0, n};
      const int64_t groups = n == 0 ? 0 : (panels.end - panels.begin + b.group - 1) / b.group;
      for (int64_t g = 0; g < groups; ++g) {
        int64_t panel = panels.begin + (s & 1 ? groups - 1 - g : g) * b.group;  // the order of Tiling::each
        const int64_t count = std::min(b.group, panels.end - panel);
        if (!projected) b.cells.ahead(t, panel * width, std::min(count * width, a.H - panel * width), part);
        b.from_last(last, {panel, panel + count}, part, mine);
        for (int64_t p = 0; p < count; ++p, ++panel) finish(panel, part, mine + p * width, count * width);
      }
    } else {
      b.tiling.each(whole, b.tiling.panels(a.P), n, s, rank, size, [&](int64_t panel, int64_t tile) {
        const Range part = b.tiling.tile(tile, n);
        if (!projected) b.cells.ahead(t, panel * width, std::min(width, a.H - panel * width), part);
        b.from_last(last, {panel, panel + 1}, part, mine);
        finish(panel, part, mine, width);
      });
    }
    if (!b.split.by_rows) barrier.wait();
    if (!projected) continue;
    b.tiling.each(whole, b.tiling.panels(a.H), n, s, rank, size, [&](int64_t panel, int64_t tile) {
      const Range part = b.tiling.tile(tile, n);
      b.cells.cut_c(last, panel * width, part);
      b.inner_tile(t, panel, part, mine);
    });
    if (!b.split.by_rows) barrier.wait();
  }
}

template <class R>
void body(const void* context, int rank, int size, Barrier& barrier) {
  const auto& b = *static_cast<const Backward<R>*>(context);
  const FlushDenormals flush;
  b.pack_weights(rank, size);
  b.cells.begin(rank, size);
  barrier.wait();
  run_steps(b, rank, size, barrier);
}

template <class R>
GemmArgs<R> gemm_hh(const LstmArgs<R>& a, const R* dx_gates, const R* const* h_in, R* out) {
  return {4 * a.H, a.P, a.N, {dx_gates, 4 * a.H, nullptr}, {nullptr, 0, h_in}, true, false, nullptr, out};
}
template <class R>
GemmArgs<R> gemm_hr(const LstmArgs<R>& a, const R* dh, const R* inner, R* out) {
  return {a.P, a.H, a.N, {dh, a.P, nullptr}, {inner, a.H, nullptr}, true, false, nullptr, out};
}

// Panels in one product: several where one of few rows would not fill the pipeline.
template <class R>
int64_t group_of(const LstmArgs<R>& a, const Table<R>& table) {
  return 2 * a.B <= table.tile_rows ? 4 : 1;
}
int64_t local_size(const Tiling& tiling, int64_t group) {
  return round_up((group + 1) * tiling.tile_rows * tiling.width);
}

}  // namespace

template <class R>
size_t lstm_backward_scratch(const LstmArgs<R>& a, bool weights, int most) {
  const Table<R>& table = table_of<R>(kernels());
  const Tiling tiling(Split(a, sums(a), most), table);
  int64_t size = index_size(a, a.N) + tiling.panels(a.P) * 4 * a.H * tiling.width;
  if (a.weight_hr) size += tiling.panels(a.H) * a.P * tiling.width + round_up(a.B * a.P);
  if (a.weight_hr && weights) size += round_up(a.N * a.P) + round_up(a.N * a.H);
  size += round_up(std::max(a.P, a.H)) + most * local_size(tiling, group_of(a, table));
  if (!weights) return size;
  size_t product = gemm_scratch(gemm_hh<R>(a, nullptr, nullptr, nullptr), most);
  if (a.weight_hr) product = std::max(product, gemm_scratch(gemm_hr<R>(a, nullptr, nullptr, nullptr), most));
  return size + product;
}

template <class R>
void lstm_backward(const LstmBackward<R>& call, R* scratch, const Team& team) noexcept {
  const LstmArgs<R>& a = call.args;
  const Table<R>& table = table_of<R>(kernels());
  int64_t* const index = reinterpret_cast<int64_t*>(take(scratch, index_size(a, a.N)));
  const Rows rows(a, index);
  const Split split(a, sums(a), team.most);
  const Tiling tiling(split, table);
  Backward<R> b{{call, table, rows, nullptr}, split, tiling};
  b.weight_hh = take(scratch, tiling.panels(a.P) * 4 * a.H * tiling.width);
  if (a.weight_hr) {
    b.weight_hr = take(scratch, tiling.panels(a.H) * a.P * tiling.width);
    b.cells.dh_step = take(scratch, round_up(a.B * a.P));
  }
  if (a.weight_hr && call.dweight_hr) {
    b.cells.dh_all = take(scratch, round_up(a.N * a.P));
    b.cells.inner = take(scratch, round_up(a.N * a.H));
  }
  R* const zeros = take(scratch, round_up(std::max(a.P, a.H)));
  std::fill(zeros, zeros + std::max(a.P, a.H), R(0));
  b.cells.zeros = zeros;
  b.group = group_of(a, table);
  b.local_size = local_size(tiling, b.group);
  b.local = take(scratch, team.most * b.local_size);
  b.cells.zero_padding();
  team.run(split.size, body<R>, &b);
  if (call.dweight_hh) {
    const R** const h_in = reinterpret_cast<const R**>(index + Rows::need(a.T, a.B));
    entering<R>(rows, a, call.h, zeros, h_in);
    gemm(gemm_hh<R>(a, call.dx_gates, h_in, call.dweight_hh), scratch, team);
  }
  if (call.dweight_hr) gemm(gemm_hr<R>(a, b.cells.dh_all, b.cells.inner, call.dweight_hr), scratch, team);
}

template size_t lstm_backward_scratch(const LstmArgs<float>&, bool, int);
template size_t lstm_backward_scratch(const LstmArgs<double>&, bool, int);
template void lstm_backward(const LstmBackward<float>&, float*, const Team&) noexcept;
template void lstm_backward(const LstmBackward<double>&, double*, const Team&) noexcept;

}  // namespace fastseq::core
