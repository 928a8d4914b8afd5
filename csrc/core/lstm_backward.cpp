// Backward over time: the gradient of each step's pre-activations, packed, times the recurrent weights gives the
// gradient of the state before it, and the cell's derivative follows while the tile is in the nearest cache. One
// barrier per step (two with projection). The weights' gradients are one product each after the loop, in the same team.
#include <cstring>

#include "core/flush.h"
#include "core/gemm.h"
#include "core/isa.h"
#include "core/lstm.h"
#include "core/lstm_rows.h"

namespace fastseq::core {
namespace {

template <class R>
struct Backward {
  const LstmBackward<R>& call;
  const LstmArgs<R>& a;
  const Table<R>& table;
  const Rows& rows;
  Split split;
  Tiling tiling;
  R* weight_hh = nullptr;  // panels of [4H][width] over P
  R* weight_hr = nullptr;  // panels of [P][width] over H
  R* d[2] = {};            // gradient of the pre-activations of a step, packed
  R* dh_packed = nullptr;  // gradient of h of a step, packed, with projection only
  R* dh_all = nullptr;     // [N, P] the same for all steps, and
  R* inner = nullptr;      // [N, H] o * tanh(c), for the gradient of weight_hr
  R* zeros = nullptr;      // a row of zeros
  R* local = nullptr;      // per thread: a tile of products of `group` panels, a tile of dh
  int64_t group = 1;       // panels in one product, where few rows alone would not fill the pipeline
  int64_t local_size = 0;

  const R* c_before(int64_t t, int64_t r) const;
  void begin(int rank, int size) const;
  void from_last(int64_t last, Range panels, int64_t tile, const R* d_last, R* out) const;
  void state_tile(int64_t t, int64_t last, int64_t panel, int64_t tile, const R* from_last, int64_t from_row,
                  R* dh) const;
  void cell_tile(int64_t t, int64_t panel, int64_t tile, const R* dh, R* d_out) const;
  void inner_tile(int64_t t, int64_t panel, int64_t tile, R* d_out, R* mine) const;
  void cut_c(int64_t last, int64_t panel, int64_t tile) const;
};

template <class R>
const R* Backward<R>::c_before(int64_t t, int64_t r) const {
  if (rows.cut(t, r)) return a.c_start;
  const int64_t before = rows.before(t);
  return r < rows.count(before) ? call.c + rows.element(before, r) * a.H : a.c0 + rows.batch(r) * a.H;
}

template <class R>
void Backward<R>::begin(int rank, int size) const {
  const int64_t width = tiling.width;
  const Range state = share(tiling.panels(a.P), rank, size);
  for (int64_t p = state.begin; p < state.end; ++p) {
    const int64_t unit = p * width, count = std::min(width, a.P - unit);
    table.pack_columns({{a.weight_hh, a.P, nullptr}, 0, unit, count, 4 * a.H, width, true, weight_hh + unit * 4 * a.H});
  }
  const Range inside = share(a.weight_hr ? tiling.panels(a.H) : 0, rank, size);
  for (int64_t p = inside.begin; p < inside.end; ++p) {
    const int64_t unit = p * width, count = std::min(width, a.H - unit);
    table.pack_columns({{a.weight_hr, a.H, nullptr}, 0, unit, count, a.P, width, true, weight_hr + unit * a.P});
  }
  const Range batch = share(a.B, rank, size);
  const auto copy = [&](R* out, const R* in, int64_t n) {
    if (batch.begin == batch.end) return;
    if (in) {
      std::memcpy(out + batch.begin * n, in + batch.begin * n, (batch.end - batch.begin) * n * sizeof(R));
    } else {
      std::memset(out + batch.begin * n, 0, (batch.end - batch.begin) * n * sizeof(R));
    }
  };
  copy(call.dh0, call.dh_n, a.P);  // each row's place holds the gradient of its latest state until the row is done
  copy(call.dc0, call.dc_n, a.H);
}

// The gradient that reaches the state before step `last` through its pre-activations: [cap][panels][width].
template <class R>
void Backward<R>::from_last(int64_t last, Range panels, int64_t tile, const R* d_last, R* out) const {
  const int64_t width = tiling.width, row = tile * tiling.cap, count = panels.end - panels.begin;
  const int64_t going_on = std::clamp<int64_t>(rows.count(last) - row, 0, tiling.cap);
  if (going_on == 0) return;
  const TileArgs<R> rest{going_on,        count,
                         4 * a.H,         d_last + row * 4 * a.H,
                         tiling.cap,      weight_hh + panels.begin * width * 4 * a.H,
                         4 * a.H * width, out,
                         count * width,   width,
                         Init::zero,      nullptr};
  product(table, rest);
}

// dh of step t from its own gradient and from the step processed after it, `last`: [cap][width]. Where a segment ends
// between the two the latter goes to the start state, where the row begins at `last` to the initial state. t may lie
// outside 0 .. T-1: then only the latter two happen.
template <class R>
void Backward<R>::state_tile(int64_t t, int64_t last, int64_t panel, int64_t tile, const R* from_last, int64_t from_row,
                             R* dh) const {
  const int64_t width = tiling.width, unit = panel * width, units = std::min(width, a.P - unit);
  const int64_t row = tile * tiling.cap, n = rows.count(t), n_last = rows.count(last);
  const int64_t going_on = std::clamp<int64_t>(n_last - row, 0, tiling.cap);
  const int64_t next = rows.before(t), n_next = rows.count(next);
  for (int64_t i = 0; i < tiling.cap && row + i < n_next; ++i) {
    const int64_t e = rows.element(next, row + i);
    if (!a.weight_hr) prefetch<4>(call.gates + e * 4 * a.H + unit, a.H, units);
    if (!a.weight_hr) prefetch<1>(call.c + e * a.H + unit, 0, units);
    if (call.dh) prefetch<1>(call.dh + e * a.P + unit, 0, units);
  }
  for (int64_t i = 0; i < tiling.cap && row + i < std::max(n, n_last); ++i) {
    const int64_t r = row + i;
    R* const initial = call.dh0 + rows.batch(r) * a.P + unit;
    const R* from = i < going_on ? from_last + i * from_row : initial;
    if (i < going_on && rows.cut(last, r)) {
      for (int64_t u = 0; u < units && call.dh_start; ++u) call.dh_start[unit + u] += from[u];
      from = zeros;
    }
    if (r >= n) {
      std::memcpy(initial, from, units * sizeof(R));
      continue;
    }
    const R* const own = call.dh ? call.dh + rows.element(t, r) * a.P + unit : zeros;
    R* const out = dh + i * width;
    for (int64_t u = 0; u < units; ++u) out[u] = own[u] + from[u];
    if (dh_all) std::memcpy(dh_all + rows.element(t, r) * a.P + unit, out, units * sizeof(R));
  }
}

// The gradient of c that crosses the border of a segment, as in state_tile.
template <class R>
void Backward<R>::cut_c(int64_t last, int64_t panel, int64_t tile) const {
  const int64_t unit = panel * tiling.width, units = std::min(tiling.width, a.H - unit);
  const int64_t end = std::min((tile + 1) * tiling.cap, rows.count(last));
  if (!a.reset) return;
  for (int64_t r = tile * tiling.cap; r < end; ++r) {
    if (!rows.cut(last, r)) continue;
    R* const dc = call.dc0 + rows.batch(r) * a.H + unit;
    for (int64_t u = 0; u < units && call.dc_start; ++u) call.dc_start[unit + u] += dc[u];
    std::memset(dc, 0, units * sizeof(R));
  }
}

template <class R>
void Backward<R>::cell_tile(int64_t t, int64_t panel, int64_t tile, const R* dh, R* d_out) const {
  const int64_t width = tiling.width, unit = panel * width, units = std::min(width, a.H - unit);
  const int64_t row = tile * tiling.cap, count = std::min(tiling.cap, rows.count(t) - row);
  R out[kMostTileRows * kMostPanelWidth];
  CellBackward<R> cell{count, units, a.H, R(1.0 / a.tau),       a.hard, dh, {}, {}, {}, {},
                       {},    {},    {},  inner ? out : nullptr};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t r = row + i, e = rows.element(t, r);
    const R* const c_in = c_before(t, r);
    cell.gates[i] = call.gates + e * 4 * a.H + unit;
    cell.dgates[i] = call.dgates ? call.dgates + e * 4 * a.H + unit : nullptr;
    cell.c[i] = call.c + e * a.H + unit;
    cell.c_in[i] = c_in ? c_in + unit : nullptr;
    cell.dc[i] = call.dc ? call.dc + e * a.H + unit : nullptr;
    cell.dc_state[i] = call.dc0 + rows.batch(r) * a.H + unit;
    cell.dx_gates[i] = call.dx_gates + e * 4 * a.H + unit;
  }
  table.lstm_cell_backward(cell);
  for (int64_t i = 0; inner && i < count; ++i) {
    std::memcpy(inner + rows.element(t, row + i) * a.H + unit, out + i * width, units * sizeof(R));
  }
  const Matrix<R> lines{nullptr, 0, cell.dx_gates};
  for (int64_t gate = 0; gate < 4; ++gate) {
    table.pack_rows({lines, 0, gate * a.H, count, units, tiling.cap, false,
                     d_out + row * 4 * a.H + (gate * a.H + unit) * tiling.cap});
  }
}

// With projection: dh of the whole row is ready and packed; its product with weight_hr is the gradient of o * tanh(c).
template <class R>
void Backward<R>::inner_tile(int64_t t, int64_t panel, int64_t tile, R* d_out, R* mine) const {
  const int64_t width = tiling.width, row = tile * tiling.cap, count = std::min(tiling.cap, rows.count(t) - row);
  const TileArgs<R> inside{
      count, 1,          a.P,    dh_packed + row * a.P, tiling.cap, weight_hr + panel * width * a.P, 0, mine, width,
      width, Init::zero, nullptr};
  product(table, inside);
  cell_tile(t, panel, tile, mine, d_out);
}

template <class R>
void run_steps(const Backward<R>& b, int rank, int size, Barrier& barrier) {
  const Rows& rows = b.rows;
  const LstmArgs<R>& a = b.a;
  const bool projected = a.weight_hr != nullptr, whole = b.call.dh_start != nullptr;
  R* const mine = b.local + rank * b.local_size;
  R* const dh = mine + b.group * b.tiling.cap * b.tiling.width;
  for (int64_t s = 0; s <= a.T; ++s) {
    const int64_t t = rows.step(a.T - 1 - s), last = rows.step(a.T - s);  // after the loop over time: t is outside
    const int64_t n = rows.count(t), tiles = b.tiling.tiles_of(std::max(n, rows.count(last)));
    const R* const d_last = b.d[(s + 1) & 1];
    R* const d_out = b.d[s & 1];
    const auto finish = [&](int64_t panel, int64_t tile, const R* from_last, int64_t from_row) {
      const int64_t row = tile * b.tiling.cap;
      b.state_tile(t, last, panel, tile, from_last, from_row, dh);
      if (!projected) b.cut_c(last, panel, tile);
      if (row >= n) return;
      if (!projected) return b.cell_tile(t, panel, tile, dh, d_out);
      const int64_t unit = panel * b.tiling.width, units = std::min(b.tiling.width, a.P - unit);
      const Matrix<R> lines{dh, b.tiling.width, nullptr};
      b.table.pack_rows({lines, 0, 0, std::min(b.tiling.cap, n - row), units, b.tiling.cap, false,
                         b.dh_packed + row * a.P + unit * b.tiling.cap});
    };
    if (b.group > 1 && tiles == 1) {
      const Range panels = share(b.tiling.panels(a.P), rank, size);
      for (int64_t panel = panels.begin; panel < panels.end;) {
        const int64_t count = std::min(b.group, panels.end - panel);
        b.from_last(last, {panel, panel + count}, 0, d_last, mine);
        for (int64_t p = 0; p < count; ++p, ++panel)
          finish(panel, 0, mine + p * b.tiling.width, count * b.tiling.width);
      }
    } else {
      b.tiling.each(b.split, whole, b.tiling.panels(a.P), tiles, rank, size, [&](int64_t panel, int64_t tile) {
        b.from_last(last, {panel, panel + 1}, tile, d_last, mine);
        finish(panel, tile, mine, b.tiling.width);
      });
    }
    if (!b.split.by_rows) barrier.wait();
    if (!projected) continue;
    b.tiling.each(b.split, whole, b.tiling.panels(a.H), tiles, rank, size, [&](int64_t panel, int64_t tile) {
      b.cut_c(last, panel, tile);
      if (tile * b.tiling.cap < n) b.inner_tile(t, panel, tile, d_out, mine);
    });
    if (!b.split.by_rows) barrier.wait();
  }
}

template <class R>
void body(const void* context, int rank, int size, Barrier& barrier) {
  const auto& b = *static_cast<const Backward<R>*>(context);
  const FlushDenormals flush;
  b.begin(rank, size);
  barrier.wait();
  run_steps(b, rank, size, barrier);
}

// Where no step wrote: beyond each row's end.
template <class R>
void zero_padding(const Backward<R>& b) {
  const LstmArgs<R>& a = b.a;
  for (int64_t row = 0; a.lengths && row < a.B; ++row) {
    for (int64_t t = a.lengths[row]; t < a.T; ++t) {
      const int64_t e = t * a.B + row;
      std::memset(b.call.dx_gates + e * 4 * a.H, 0, 4 * a.H * sizeof(R));
      if (b.dh_all) std::memset(b.dh_all + e * a.P, 0, a.P * sizeof(R));
      if (b.inner) std::memset(b.inner + e * a.H, 0, a.H * sizeof(R));
    }
  }
}

template <class R>
int64_t index_size(const LstmArgs<R>& a) {
  return Tiling::round_up((Rows::need(a.T, a.B) + a.N) * sizeof(int64_t) / sizeof(R));
}

template <class R>
GemmArgs<R> gemm_hh(const LstmArgs<R>& a, const R* dx_gates, const R* const* h_in, R* out) {
  return {4 * a.H, a.P, a.N, {dx_gates, 4 * a.H, nullptr}, {nullptr, 0, h_in}, true, false, nullptr, out};
}
template <class R>
GemmArgs<R> gemm_hr(const LstmArgs<R>& a, const R* dh, const R* inner, R* out) {
  return {a.P, a.H, a.N, {dh, a.P, nullptr}, {inner, a.H, nullptr}, true, false, nullptr, out};
}

// Gradients of the start state are sums over rows within the loop over time.
template <class R>
bool sums(const LstmArgs<R>& a) {
  return a.reset && (a.h_start || a.c_start);
}

template <class R>
int64_t group_of(const Tiling& tiling, const Table<R>& table) {
  return tiling.tiles == 1 && 2 * tiling.cap <= table.tile_rows ? 4 : 1;
}
int64_t local_size(const Tiling& tiling, int64_t group) {
  return Tiling::round_up((group + 1) * tiling.cap * tiling.width);
}

template <class R>
int64_t zeros_size(const LstmArgs<R>& a, const Tiling& tiling) {
  return Tiling::round_up(std::max({a.P, a.H, tiling.width}));
}

}  // namespace

template <class R>
size_t lstm_backward_scratch(const LstmArgs<R>& a, bool weights, int most) {
  const Table<R>& table = table_of<R>(kernels());
  const Tiling tiling(a.B, Split(a, sums(a), most), table);
  int64_t size = index_size(a) + tiling.panels(a.P) * 4 * a.H * tiling.width + 2 * tiling.packed(4 * a.H);
  if (a.weight_hr) size += tiling.panels(a.H) * a.P * tiling.width + tiling.packed(a.P);
  if (a.weight_hr && weights) size += Tiling::round_up(a.N * a.P) + Tiling::round_up(a.N * a.H);
  size += zeros_size(a, tiling) + most * local_size(tiling, group_of(tiling, table));
  if (!weights) return size;
  size_t product = gemm_scratch(gemm_hh<R>(a, nullptr, nullptr, nullptr), most);
  if (a.weight_hr) product = std::max(product, gemm_scratch(gemm_hr<R>(a, nullptr, nullptr, nullptr), most));
  return size + product;
}

template <class R>
void lstm_backward(const LstmBackward<R>& call, R* scratch, const Team& team) noexcept {
  const LstmArgs<R>& a = call.args;
  const Table<R>& table = table_of<R>(kernels());
  int64_t* const index = reinterpret_cast<int64_t*>(take(scratch, index_size(a)));
  const Rows rows(a, index);
  const Split split(a, sums(a), team.most);
  const Tiling tiling(a.B, split, table);
  Backward<R> b{call, a, table, rows, split, tiling};
  b.weight_hh = take(scratch, tiling.panels(a.P) * 4 * a.H * tiling.width);
  for (R*& d : b.d) d = take(scratch, tiling.packed(4 * a.H));
  if (a.weight_hr) {
    b.weight_hr = take(scratch, tiling.panels(a.H) * a.P * tiling.width);
    b.dh_packed = take(scratch, tiling.packed(a.P));
  }
  if (a.weight_hr && call.dweight_hr) {
    b.dh_all = take(scratch, Tiling::round_up(a.N * a.P));
    b.inner = take(scratch, Tiling::round_up(a.N * a.H));
  }
  b.zeros = take(scratch, zeros_size(a, tiling));
  std::fill(b.zeros, b.zeros + zeros_size(a, tiling), R(0));
  b.group = group_of(tiling, table);
  b.local_size = local_size(tiling, b.group);
  b.local = take(scratch, team.most * b.local_size);
  if (call.dh_start) {
    std::fill(call.dh_start, call.dh_start + a.P, R(0));
    std::fill(call.dc_start, call.dc_start + a.H, R(0));
  }
  zero_padding(b);
  team.run(split.size, body<R>, &b);
  if (call.dweight_hh) {
    const R** const h_in = reinterpret_cast<const R**>(index + Rows::need(a.T, a.B));
    entering(rows, a, call.h, b.zeros, h_in);
    gemm(gemm_hh<R>(a, call.dx_gates, h_in, call.dweight_hh), scratch, team);
  }
  if (call.dweight_hr) gemm(gemm_hr<R>(a, b.dh_all, b.inner, call.dweight_hr), scratch, team);
}

template size_t lstm_backward_scratch(const LstmArgs<float>&, bool, int);
template size_t lstm_backward_scratch(const LstmArgs<double>&, bool, int);
template void lstm_backward(const LstmBackward<float>&, float*, const Team&) noexcept;
template void lstm_backward(const LstmBackward<double>&, double*, const Team&) noexcept;

}  // namespace fastseq::core
