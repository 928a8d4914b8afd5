// Forward over time: one team for the whole sequence, at most one barrier per step (two with projection). The weights
// are packed once; a step is the product of the packed state with them, tile by tile, each tile finished by the cell
// while it is in the nearest cache, and its new state packed for the next step at once.
#include <cstring>

#include "core/isa.h"
#include "core/lstm.h"
#include "core/lstm_rows.h"

namespace fastseq::core {
namespace {

template <class R>
struct Forward {
  const LstmForward<R>& call;
  const LstmArgs<R>& a;
  const Table<R>& table;
  const Rows& rows;
  Split split;
  Tiling tiling;
  R* weight_hh = nullptr;  // panels of [P][width], panel (j, gate) at (4 j + gate)
  R* weight_hr = nullptr;  // panels of [H][width]
  R* state[2] = {};        // h before a step, packed
  R* inner = nullptr;      // o * tanh(c), packed, with projection only
  R* zeros = nullptr;      // a row of zeros
  R* local = nullptr;      // per thread: a tile of pre-activations, of noise, of results
  int64_t local_size = 0;

  void pack_weights(int rank, int size) const;
  void first_state(int rank, int size) const;
  void cell_tile(int64_t t, int64_t panel, int64_t tile, int64_t n, const R* in, R* out, R* mine) const;
  void projection_tile(int64_t t, int64_t panel, int64_t tile, int64_t n, R* next, R* mine) const;
  void emit(int64_t t, int64_t tile, int64_t unit, int64_t units, int64_t n, const R* result, R* next) const;
};

template <class R>
void Forward<R>::pack_weights(int rank, int size) const {
  const int64_t width = tiling.width;
  const Range gates = share(tiling.panels(a.H) * 4, rank, size);
  for (int64_t p = gates.begin; p < gates.end; ++p) {
    const int64_t unit = p / 4 * width, count = std::min(width, a.H - unit);
    table.pack_rows(
        {{a.weight_hh, a.P, nullptr}, p % 4 * a.H + unit, 0, count, a.P, width, true, weight_hh + p * a.P * width});
  }
  const Range projected = share(a.weight_hr ? tiling.panels(a.P) : 0, rank, size);
  for (int64_t p = projected.begin; p < projected.end; ++p) {
    const int64_t unit = p * width, count = std::min(width, a.P - unit);
    table.pack_rows({{a.weight_hr, a.H, nullptr}, unit, 0, count, a.H, width, true, weight_hr + p * a.H * width});
  }
}

// The state that enters each row's first step. A row that begins late, as in reverse, finds its own still in place: no
// step writes to a row before its first.
template <class R>
void Forward<R>::first_state(int rank, int size) const {
  const Range tiles = share(tiling.tiles, rank, size);
  const int64_t first = rows.step(0);
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const R* in[kMostTileRows];
    const int64_t row = tile * tiling.cap, count = std::min(tiling.cap, a.B - row);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t b = rows.batch(row + i);
      in[i] = a.h0 + b * a.P;
      std::memcpy(call.h_n + b * a.P, in[i], a.P * sizeof(R));
      std::memcpy(call.c_n + b * a.H, a.c0 + b * a.H, a.H * sizeof(R));
      if (rows.cut(first, row + i)) in[i] = a.h_start ? a.h_start : zeros;
    }
    for (R* const packed : state) {
      table.pack_rows({{nullptr, 0, in}, 0, 0, count, a.P, tiling.cap, false, packed + tile * tiling.cap * a.P});
    }
  }
}

// Results of one tile: to h, to h_n where the row ends here, and packed to the state that enters the next step.
template <class R>
void Forward<R>::emit(int64_t t, int64_t tile, int64_t unit, int64_t units, int64_t n, const R* result, R* next) const {
  const int64_t row = tile * tiling.cap, count = std::min(tiling.cap, n - row);
  const int64_t following = rows.after(t), n_next = rows.count(following);
  const R* in[kMostTileRows];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t r = row + i;
    in[i] = result + i * tiling.width;
    std::memcpy(call.h + rows.element(t, r) * a.P + unit, in[i], units * sizeof(R));
    if (r >= n_next) std::memcpy(call.h_n + rows.batch(r) * a.P + unit, in[i], units * sizeof(R));
    if (r < n_next && rows.cut(following, r)) in[i] = a.h_start ? a.h_start + unit : zeros;
  }
  const int64_t going_on = std::min(count, n_next - row);
  if (going_on > 0) {
    R* const out = next + row * a.P + unit * tiling.cap;
    table.pack_rows({{nullptr, 0, in}, 0, 0, going_on, units, tiling.cap, false, out});
  }
}

template <class R>
void Forward<R>::cell_tile(int64_t t, int64_t panel, int64_t tile, int64_t n, const R* in, R* out, R* mine) const {
  const int64_t width = tiling.width;
  const int64_t row = tile * tiling.cap, count = std::min(tiling.cap, n - row);
  const int64_t unit = panel * width, units = std::min(width, a.H - unit);
  R* const pre = mine;
  R* const noise = pre + tiling.cap * 4 * width;
  R* const result = noise + tiling.cap * 2 * width;
  const int64_t following = rows.after(t), going_on = std::min(count, rows.count(following) - row);
  for (int64_t i = 0; i < going_on; ++i) {
    prefetch<4>(call.x_gates + rows.element(following, row + i) * 4 * a.H + unit, a.H, units);
  }
  const TileArgs<R> gates{count,       4,   a.P,       in + row * a.P, tiling.cap, weight_hh + panel * 4 * a.P * width,
                          a.P * width, pre, 4 * width, width,          Init::zero, nullptr};
  product(table, gates);
  CellForward<R> cell{count, units, a.H, R(1.0 / a.tau), a.hard, pre, {}, call.noise.on ? noise : nullptr, {},
                      {},    {},    {},  result};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t r = row + i, b = rows.batch(r), e = rows.element(t, r);
    if (call.noise.on) table.lstm_noise(call.noise, unit, units, t, b, noise + i * 2 * width);
    cell.x_gates[i] = call.x_gates + e * 4 * a.H + unit;
    cell.c_state[i] = call.c_n + b * a.H + unit;
    cell.c_in[i] = !rows.cut(t, r) ? cell.c_state[i] : a.c_start ? a.c_start + unit : nullptr;
    cell.c[i] = call.c ? call.c + e * a.H + unit : nullptr;
    cell.gates[i] = call.gates ? call.gates + e * 4 * a.H + unit : nullptr;
  }
  table.lstm_cell_forward(cell);
  if (!a.weight_hr) return emit(t, tile, unit, units, n, result, out);
  const Matrix<R> lines{result, width, nullptr};
  table.pack_rows({lines, 0, 0, count, units, tiling.cap, false, inner + row * a.H + unit * tiling.cap});
}

template <class R>
void Forward<R>::projection_tile(int64_t t, int64_t panel, int64_t tile, int64_t n, R* next, R* mine) const {
  const int64_t width = tiling.width;
  const int64_t row = tile * tiling.cap, count = std::min(tiling.cap, n - row), unit = panel * width;
  const TileArgs<R> state{
      count, 1,     a.H,   inner + row * a.H, tiling.cap, weight_hr + panel * a.H * width, a.H * width,
      mine,  width, width, Init::zero,        nullptr};
  product(table, state);
  emit(t, tile, unit, std::min(width, a.P - unit), n, mine, next);
}

template <class R>
void body(const void* context, int rank, int size, Barrier& barrier) {
  const auto& f = *static_cast<const Forward<R>*>(context);
  const FlushDenormals flush;
  R* const mine = f.local + rank * f.local_size;
  f.pack_weights(rank, size);
  f.first_state(rank, size);
  barrier.wait();
  for (int64_t s = 0; s < f.a.T; ++s) {
    const int64_t t = f.rows.step(s), n = f.rows.count(t), tiles = f.tiling.tiles_of(n);
    R* const next = f.state[(s + 1) & 1];
    f.tiling.each(f.split, false, f.tiling.panels(f.a.H), tiles, rank, size,
                  [&](int64_t panel, int64_t tile) { f.cell_tile(t, panel, tile, n, f.state[s & 1], next, mine); });
    if (!f.split.by_rows) barrier.wait();
    if (!f.a.weight_hr) continue;
    f.tiling.each(f.split, false, f.tiling.panels(f.a.P), tiles, rank, size,
                  [&](int64_t panel, int64_t tile) { f.projection_tile(t, panel, tile, n, next, mine); });
    if (!f.split.by_rows) barrier.wait();
  }
}

// Steps beyond a row's end.
template <class R>
void zero_padding(const LstmForward<R>& call) {
  const LstmArgs<R>& a = call.args;
  for (int64_t b = 0; a.lengths && b < a.B; ++b) {
    for (int64_t t = a.lengths[b]; t < a.T; ++t) {
      const int64_t e = t * a.B + b;
      std::memset(call.h + e * a.P, 0, a.P * sizeof(R));
      if (call.c) std::memset(call.c + e * a.H, 0, a.H * sizeof(R));
      if (call.gates) std::memset(call.gates + e * 4 * a.H, 0, 4 * a.H * sizeof(R));
    }
  }
}

template <class R>
int64_t local_size(const Tiling& tiling) {
  return Tiling::round_up(tiling.cap * 7 * tiling.width);
}

template <class R>
int64_t index_size(const LstmArgs<R>& a) {
  return Tiling::round_up(Rows::need(a.T, a.B) * sizeof(int64_t) / sizeof(R));
}

}  // namespace

template <class R>
size_t lstm_forward_scratch(const LstmArgs<R>& a, int most) {
  const Table<R>& table = table_of<R>(kernels());
  const Tiling tiling(a.B, Split(a, false, most), table);
  int64_t size = index_size(a) + tiling.panels(a.H) * 4 * a.P * tiling.width + 2 * tiling.packed(a.P);
  if (a.weight_hr) size += tiling.panels(a.P) * a.H * tiling.width + tiling.packed(a.H);
  return size + Tiling::round_up(std::max(a.P, tiling.width)) + most * local_size<R>(tiling);
}

template <class R>
void lstm_forward(const LstmForward<R>& call, R* scratch, const Team& team) noexcept {
  const LstmArgs<R>& a = call.args;
  const Table<R>& table = table_of<R>(kernels());
  const Rows rows(a, reinterpret_cast<int64_t*>(take(scratch, index_size(a))));
  const Split split(a, false, team.most);
  const Tiling tiling(a.B, split, table);
  Forward<R> f{call, a, table, rows, split, tiling};
  f.local_size = local_size<R>(tiling);
  f.weight_hh = take(scratch, tiling.panels(a.H) * 4 * a.P * tiling.width);
  for (R*& state : f.state) state = take(scratch, tiling.packed(a.P));
  if (a.weight_hr) {
    f.weight_hr = take(scratch, tiling.panels(a.P) * a.H * tiling.width);
    f.inner = take(scratch, tiling.packed(a.H));
  }
  f.zeros = take(scratch, Tiling::round_up(std::max(a.P, tiling.width)));
  std::fill(f.zeros, f.zeros + std::max(a.P, tiling.width), R(0));
  f.local = scratch;
  zero_padding(call);
  team.run(split.size, body<R>, &f);
}

template size_t lstm_forward_scratch(const LstmArgs<float>&, int);
template size_t lstm_forward_scratch(const LstmArgs<double>&, int);
template void lstm_forward(const LstmForward<float>&, float*, const Team&) noexcept;
template void lstm_forward(const LstmForward<double>&, double*, const Team&) noexcept;

}  // namespace fastseq::core
