// Forward over time: one team for the whole sequence, at most one barrier per step (two with projection). The weights
// are packed once; a step is the product of the state with them, tile by tile, each tile finished by the cell while it
// is in the nearest cache.
#include <cstring>

#include "core/flush.h"
#include "core/lstm_cells.h"

namespace fastseq::core {
namespace {

template <class R>
struct Forward {
  CellsForward<R> cells;
  Split split;
  Tiling tiling;
  R* weight_hh = nullptr;  // panels of [P][width], panel (j, gate) at (4 j + gate)
  R* weight_hr = nullptr;  // panels of [H][width]
  R* zeros = nullptr;      // a row of zeros
  R* local = nullptr;      // per thread: a tile of pre-activations, of noise
  int64_t local_size = 0;
  const LstmForward<R>& call = cells.call;
  const LstmArgs<R>& a = cells.a;
  const Table<R>& table = cells.table;
  const Rows& rows = cells.rows;

  void pack_weights(int rank, int size) const;
  void cell_tile(int64_t t, int64_t panel, Range part, R* mine) const;
  void projection_tile(int64_t t, int64_t panel, Range part, R* mine) const;
};

template <class R>
void Forward<R>::pack_weights(int rank, int size) const {
  const int64_t width = tiling.width;
  const Range gates = share(tiling.panels(a.H) * 4, rank, size);
  for (int64_t p = gates.begin; p < gates.end; ++p) {
    const int64_t unit = p / 4 * width, count = std::min(width, a.H - unit);
    table.pack_rows(
        {{a.weight_hh, a.P, nullptr}, p % 4 * a.H + unit, 0, count, a.P, width, weight_hh + p * a.P * width});
  }
  const Range projected = share(a.weight_hr ? tiling.panels(a.P) : 0, rank, size);
  for (int64_t p = projected.begin; p < projected.end; ++p) {
    const int64_t unit = p * width, count = std::min(width, a.P - unit);
    table.pack_rows({{a.weight_hr, a.H, nullptr}, unit, 0, count, a.H, width, weight_hr + p * a.H * width});
  }
}

template <class R>
void Forward<R>::cell_tile(int64_t t, int64_t panel, Range part, R* mine) const {
  const int64_t width = tiling.width, unit = panel * width, units = std::min(width, a.H - unit);
  R* const pre = mine;
  R* const noise = pre + tiling.tile_rows * 4 * width;
  cells.ahead(t, unit, units, part);
  TileArgs<R> gates;
  gates.rows = part.end - part.begin;
  gates.panels = 4;
  gates.K = a.P;
  rows.entering(a, call.h, zeros, t, part, gates.a);
  gates.b = weight_hh + panel * 4 * a.P * width;
  gates.b_panel = a.P * width;
  gates.c = pre;
  gates.c_row = 4 * width;
  gates.c_panel = width;
  product(table, gates);
  cells.run(t, unit, units, part, pre, noise);
}

template <class R>
void Forward<R>::projection_tile(int64_t t, int64_t panel, Range part, R* mine) const {
  const int64_t width = tiling.width, unit = panel * width, units = std::min(width, a.P - unit);
  TileArgs<R> state;
  state.rows = part.end - part.begin;
  state.panels = 1;
  state.K = a.H;
  for (int64_t i = 0; i < state.rows; ++i) state.a[i] = cells.inner + (part.begin + i) * a.H;
  state.b = weight_hr + panel * a.H * width;
  state.b_panel = a.H * width;
  state.c = mine;
  state.c_row = state.c_panel = width;
  product(table, state);
  for (int64_t r = part.begin; r < part.end; ++r) {
    std::memcpy(call.h + rows.element(t, r) * a.P + unit, mine + (r - part.begin) * width, units * sizeof(R));
  }
  cells.last_state(t, unit, units, part);
}

template <class R>
void body(const void* context, int rank, int size, Barrier& barrier) {
  const auto& f = *static_cast<const Forward<R>*>(context);
  const FlushDenormals flush;
  R* const mine = f.local + rank * f.local_size;
  f.pack_weights(rank, size);
  f.cells.first_state(rank, size);
  barrier.wait();
  for (int64_t s = 0; s < f.a.T; ++s) {
    const int64_t t = f.rows.step(s), n = f.rows.count(t);
    f.tiling.each(false, f.tiling.panels(f.a.H), n, s, rank, size,
                  [&](int64_t panel, int64_t tile) { f.cell_tile(t, panel, f.tiling.tile(tile, n), mine); });
    if (!f.split.by_rows) barrier.wait();
    if (!f.a.weight_hr) continue;
    f.tiling.each(false, f.tiling.panels(f.a.P), n, s, rank, size,
                  [&](int64_t panel, int64_t tile) { f.projection_tile(t, panel, f.tiling.tile(tile, n), mine); });
    if (!f.split.by_rows) barrier.wait();
  }
}

template <class R>
int64_t local_size(const Tiling& tiling) {
  return round_up(6 * tiling.tile_rows * tiling.width);
}

}  // namespace

template <class R>
size_t lstm_forward_scratch(const LstmArgs<R>& a, int most) {
  const Table<R>& table = table_of<R>(kernels());
  const Tiling tiling(Split(a, false, most), table);
  int64_t size = index_size(a) + tiling.panels(a.H) * 4 * a.P * tiling.width;
  if (a.weight_hr) size += tiling.panels(a.P) * a.H * tiling.width + round_up(a.B * a.H);
  return size + round_up(a.P) + most * local_size<R>(tiling);
}

template <class R>
void lstm_forward(const LstmForward<R>& call, R* scratch, const Team& team) noexcept {
  const LstmArgs<R>& a = call.args;
  const Table<R>& table = table_of<R>(kernels());
  const Rows rows(a, reinterpret_cast<int64_t*>(take(scratch, index_size(a))));
  const Split split(a, false, team.most);
  const Tiling tiling(split, table);
  Forward<R> f{{call, table, rows}, split, tiling};
  f.local_size = local_size<R>(tiling);
  f.weight_hh = take(scratch, tiling.panels(a.H) * 4 * a.P * tiling.width);
  if (a.weight_hr) {
    f.weight_hr = take(scratch, tiling.panels(a.P) * a.H * tiling.width);
    f.cells.inner = take(scratch, round_up(a.B * a.H));
  }
  f.zeros = take(scratch, round_up(a.P));
  std::fill(f.zeros, f.zeros + a.P, R(0));
  f.local = scratch;
  zero_padding(call);
  team.run(split.size, body<R>, &f);
}

template size_t lstm_forward_scratch(const LstmArgs<float>&, int);
template size_t lstm_forward_scratch(const LstmArgs<double>&, int);
template void lstm_forward(const LstmForward<float>&, float*, const Team&) noexcept;
template void lstm_forward(const LstmForward<double>&, double*, const Team&) noexcept;

}  // namespace fastseq::core
