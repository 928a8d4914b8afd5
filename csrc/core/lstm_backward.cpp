// Backward over time: the gradient of each step's pre-activations times the recurrent weights gives the gradient of the
// state before it, and the cell's derivative follows while the tile is in the nearest cache. At most one barrier per
// step (two with projection). The weights' gradients are one product each after the loop.
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
  R* dh_step = nullptr;    // [B, P] gradient of h of a step, with projection only
  R* dh_all = nullptr;     // [N, P] the same for all steps, and
  R* inner = nullptr;      // [N, H] o * tanh(c), for the gradient of weight_hr
  R* zeros = nullptr;      // a row of zeros
  R* local = nullptr;      // per thread: a tile of products of `group` panels, a tile of dh
  int64_t group = 1;       // panels in one product, where few rows alone would not fill the pipeline
  int64_t local_size = 0;
  R inverse_tau = R(1.0 / a.tau);

  const R* c_before(int64_t t, int64_t r) const;
  void begin(int rank, int size) const;
  void ahead(int64_t t, int64_t unit, int64_t units, Range part) const;
  void from_last(int64_t last, Range panels, Range part, R* out) const;
  void state_tile(int64_t t, int64_t last, int64_t panel, Range part, const R* from_last, int64_t from_row,
                  R* dh) const;
  void cell_tile(int64_t t, int64_t panel, Range part, const R* dh) const;
  void inner_tile(int64_t t, int64_t panel, Range part, R* mine) const;
  void cut_c(int64_t last, int64_t panel, Range part) const;
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
    table.pack_columns({{a.weight_hh, a.P, nullptr}, 0, unit, count, 4 * a.H, width, weight_hh + unit * 4 * a.H});
  }
  const Range inside = share(a.weight_hr ? tiling.panels(a.H) : 0, rank, size);
  for (int64_t p = inside.begin; p < inside.end; ++p) {
    const int64_t unit = p * width, count = std::min(width, a.H - unit);
    table.pack_columns({{a.weight_hr, a.H, nullptr}, 0, unit, count, a.P, width, weight_hr + unit * a.P});
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

// What the cells of a tile will read and write.
template <class R>
void Backward<R>::ahead(int64_t t, int64_t unit, int64_t units, Range part) const {
  for (int64_t r = part.begin; r < std::min(part.end, rows.count(t)); ++r) {
    const int64_t e = rows.element(t, r);
    const R* const c_in = c_before(t, r);
    prefetch<4>(call.gates + e * 4 * a.H + unit, a.H, units);
    prefetch<4>(call.dx_gates + e * 4 * a.H + unit, a.H, units);
    prefetch<1>(call.c + e * a.H + unit, 0, units);
    if (c_in) prefetch<1>(c_in + unit, 0, units);
    if (call.dh && !a.weight_hr) prefetch<1>(call.dh + e * a.P + unit, 0, units);
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

// dh of step t from its own gradient and from the step processed after it, `last`: [rows][width]. Where a segment ends
// between the two the latter goes to the start state, where the row begins at `last` to the initial state. t may lie
// outside 0 .. T-1: then only the latter two happen.
template <class R>
void Backward<R>::state_tile(int64_t t, int64_t last, int64_t panel, Range part, const R* from_last, int64_t from_row,
                             R* dh) const {
  const int64_t width = tiling.width, unit = panel * width, units = std::min(width, a.P - unit);
  const int64_t n = rows.count(t), n_last = rows.count(last);
  for (int64_t r = part.begin; r < part.end; ++r) {
    const int64_t i = r - part.begin;
    R* const initial = call.dh0 + rows.batch(r) * a.P + unit;
    const R* from = r < n_last ? from_last + i * from_row : initial;
    if (r < n_last && rows.cut(last, r)) {
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
    if (dh_step) std::memcpy(dh_step + r * a.P + unit, out, units * sizeof(R));
    if (dh_all) std::memcpy(dh_all + rows.element(t, r) * a.P + unit, out, units * sizeof(R));
  }
}

// The gradient of c that crosses the border of a segment, as in state_tile.
template <class R>
void Backward<R>::cut_c(int64_t last, int64_t panel, Range part) const {
  const int64_t unit = panel * tiling.width, units = std::min(tiling.width, a.H - unit);
  if (!a.reset) return;
  for (int64_t r = part.begin; r < std::min(part.end, rows.count(last)); ++r) {
    if (!rows.cut(last, r)) continue;
    R* const dc = call.dc0 + rows.batch(r) * a.H + unit;
    for (int64_t u = 0; u < units && call.dc_start; ++u) call.dc_start[unit + u] += dc[u];
    std::memset(dc, 0, units * sizeof(R));
  }
}

template <class R>
void Backward<R>::cell_tile(int64_t t, int64_t panel, Range part, const R* dh) const {
  const int64_t unit = panel * tiling.width;
  CellBackward<R> cell;
  cell.rows = std::min(part.end, rows.count(t)) - part.begin;
  cell.units = std::min(tiling.width, a.H - unit);
  cell.H = a.H;
  cell.inverse_tau = inverse_tau;
  cell.hard = a.hard;
  cell.dh = dh;
  for (int64_t i = 0; i < cell.rows; ++i) {
    const int64_t r = part.begin + i, e = rows.element(t, r);
    const R* const c_in = c_before(t, r);
    cell.gates[i] = call.gates + e * 4 * a.H + unit;
    cell.dgates[i] = call.dgates ? call.dgates + e * 4 * a.H + unit : nullptr;
    cell.c[i] = call.c + e * a.H + unit;
    cell.c_in[i] = c_in ? c_in + unit : nullptr;
    cell.dc[i] = call.dc ? call.dc + e * a.H + unit : nullptr;
    cell.dc_state[i] = call.dc0 + rows.batch(r) * a.H + unit;
    cell.dx_gates[i] = call.dx_gates + e * 4 * a.H + unit;
    cell.out[i] = inner ? inner + e * a.H + unit : nullptr;
  }
  if (cell.rows > 0) table.lstm_cell_backward(cell);
}

// With projection: dh of the whole row is ready; its product with weight_hr is the gradient of o * tanh(c).
template <class R>
void Backward<R>::inner_tile(int64_t t, int64_t panel, Range part, R* mine) const {
  const int64_t width = tiling.width, end = std::min(part.end, rows.count(t));
  if (end <= part.begin) return;
  TileArgs<R> inside;
  ahead(t, panel * width, std::min(width, a.H - panel * width), part);
  inside.rows = end - part.begin;
  inside.panels = 1;
  inside.K = a.P;
  for (int64_t i = 0; i < inside.rows; ++i) inside.a[i] = dh_step + (part.begin + i) * a.P;
  inside.b = weight_hr + panel * width * a.P;
  inside.b_panel = width * a.P;
  inside.c = mine;
  inside.c_row = inside.c_panel = width;
  product(table, inside);
  cell_tile(t, panel, part, mine);
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
      b.state_tile(t, last, panel, part, from_last, from_row, dh);
      if (projected) return;
      b.cut_c(last, panel, part);
      b.cell_tile(t, panel, part, dh);
    };
    if (b.group > 1) {
      const Range panels = share(b.tiling.panels(a.P), rank, size), part{0, n};
      const int64_t groups = n == 0 ? 0 : (panels.end - panels.begin + b.group - 1) / b.group;
      for (int64_t g = 0; g < groups; ++g) {
        int64_t panel = panels.begin + (s & 1 ? groups - 1 - g : g) * b.group;  // the order of Tiling::each
        const int64_t count = std::min(b.group, panels.end - panel);
        if (!projected) b.ahead(t, panel * width, std::min(count * width, a.H - panel * width), part);
        b.from_last(last, {panel, panel + count}, part, mine);
        for (int64_t p = 0; p < count; ++p, ++panel) finish(panel, part, mine + p * width, count * width);
      }
    } else {
      b.tiling.each(whole, b.tiling.panels(a.P), n, s, rank, size, [&](int64_t panel, int64_t tile) {
        const Range part = b.tiling.tile(tile, n);
        if (!projected) b.ahead(t, panel * width, std::min(width, a.H - panel * width), part);
        b.from_last(last, {panel, panel + 1}, part, mine);
        finish(panel, part, mine, width);
      });
    }
    if (!b.split.by_rows) barrier.wait();
    if (!projected) continue;
    b.tiling.each(whole, b.tiling.panels(a.H), n, s, rank, size, [&](int64_t panel, int64_t tile) {
      const Range part = b.tiling.tile(tile, n);
      b.cut_c(last, panel, part);
      b.inner_tile(t, panel, part, mine);
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
  Backward<R> b{call, a, table, rows, split, tiling};
  b.weight_hh = take(scratch, tiling.panels(a.P) * 4 * a.H * tiling.width);
  if (a.weight_hr) {
    b.weight_hr = take(scratch, tiling.panels(a.H) * a.P * tiling.width);
    b.dh_step = take(scratch, round_up(a.B * a.P));
  }
  if (a.weight_hr && call.dweight_hr) {
    b.dh_all = take(scratch, round_up(a.N * a.P));
    b.inner = take(scratch, round_up(a.N * a.H));
  }
  b.zeros = take(scratch, round_up(std::max(a.P, a.H)));
  std::fill(b.zeros, b.zeros + std::max(a.P, a.H), R(0));
  b.group = group_of(a, table);
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
