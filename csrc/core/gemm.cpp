// Blocking: K in blocks of kBlockK. For each, the threads pack A together; then, for as many rows of A as the second
// cache holds, each thread takes its share of the panels of B and runs one after the other against those rows. Where
// all of A fits, a panel is packed just before it is used, into the nearest cache; else B is packed with A, once.
#include "core/gemm.h"

#include <algorithm>
#include <cstring>

#include "core/flush.h"
#include "core/isa.h"

namespace fastseq::core {
namespace {

constexpr int64_t kBlockM =
    360;                       // with kBlockK the pair, of 240 to 480 and 256 to 512, that came nearest to Zen 4's peak
constexpr int64_t kGroup = 4;  // panels packed together where there is one tile of few rows, to fill the pipeline

template <class R>
struct Plan {
  int64_t tiles, cap, panels, width, group, blocks, packed_a, packed_b, local;
  Plan(const GemmArgs<R>& g, const Table<R>& table) {
    tiles = std::max<int64_t>(1, (g.M + table.tile_rows - 1) / table.tile_rows);
    cap = std::max<int64_t>(1, (g.M + tiles - 1) / tiles);
    tiles = (g.M + cap - 1) / cap;
    width = table.panel_width;
    panels = (g.N + width - 1) / width;
    group = tiles == 1 && cap <= table.tile_rows / 2 ? kGroup : 1;
    const int64_t block = std::min(kBlockK, g.K);
    blocks = (tiles * cap + kBlockM - 1) / kBlockM;
    packed_a = round_up(tiles * cap * block);
    packed_b = blocks > 1 ? round_up(panels * width * block) : 0;
    local = round_up(group * width * (block + 1) + table.tile_rows * group * width);  // B, bias, a tile of C
  }
  static int64_t round_up(int64_t n) { return (n + 15) / 16 * 16; }
};

// One tile of C; a panel group that sticks out of C goes through `edge`.
template <class R>
void run_tile(const GemmArgs<R>& g, const Table<R>& table, TileArgs<R>& t, R* c, int64_t columns, R* edge) {
  const int64_t width = t.panels * table.panel_width;
  if (columns == width) {
    t.c = c;
    t.c_row = g.N;
    return table.tile(t);
  }
  t.c = edge;
  t.c_row = width;
  if (t.init == Init::result) {
    for (int64_t i = 0; i < t.rows; ++i) std::memcpy(edge + i * width, c + i * g.N, columns * sizeof(R));
  }
  table.tile(t);
  for (int64_t i = 0; i < t.rows; ++i) std::memcpy(c + i * g.N, edge + i * width, columns * sizeof(R));
}

// Panel `first` of op(b) and the `panels` - 1 after it, for the block of K that begins at k.
template <class R>
void pack_b(const GemmArgs<R>& g, const Table<R>& table, int64_t first, int64_t panels, int64_t k, R* out) {
  const int64_t length = std::min(kBlockK, g.K - k), width = table.panel_width;
  for (int64_t p = 0; p < panels; ++p, out += width * length) {
    const int64_t n = (first + p) * width, lines = std::min(width, g.N - n);
    if (g.transpose_b) {
      table.pack_rows({g.b, n, k, lines, length, width, true, out});
    } else {
      table.pack_columns({g.b, k, n, lines, length, width, true, out});
    }
  }
}

// Tiles [tiles.begin, tiles.end) of op(a), for the block of K that begins at k.
template <class R>
void pack_a(const GemmArgs<R>& g, const Table<R>& table, Range tiles, int64_t cap, int64_t k, R* out) {
  const int64_t length = std::min(kBlockK, g.K - k);
  for (int64_t i = tiles.begin; i < tiles.end; ++i) {
    const int64_t row = i * cap, rows = std::min(cap, g.M - row);
    if (g.transpose_a) {
      table.pack_columns({g.a, k, row, rows, length, cap, false, out + row * length});
    } else {
      table.pack_rows({g.a, row, k, rows, length, cap, false, out + row * length});
    }
  }
}

// The items [mine.begin, mine.end) of groups x tiles, group by group, for the block of K that begins at k. b: all of it
// packed, or null.
template <class R>
void multiply(const GemmArgs<R>& g, const Table<R>& table, const Plan<R>& plan, Range tiles, Range mine, int64_t k,
              const R* a, const R* b, R* local) {
  const int64_t length = std::min(kBlockK, g.K - k), count = tiles.end - tiles.begin;
  R* const bias = local + plan.group * plan.width * std::min(kBlockK, g.K);
  R* const edge = bias + plan.group * plan.width;
  for (int64_t item = mine.begin; item < mine.end;) {
    const int64_t column = item / count * plan.group * plan.width;
    const int64_t columns = std::min(plan.group * plan.width, g.N - column);
    const int64_t panels = (columns + plan.width - 1) / plan.width;
    if (!b) pack_b(g, table, column / plan.width, panels, k, local);
    if (g.bias && k == 0) {
      std::fill(bias, bias + panels * plan.width, R(0));
      std::memcpy(bias, g.bias + column, columns * sizeof(R));
    }
    TileArgs<R> t;
    t.panels = panels;
    t.K = length;
    t.cap = plan.cap;
    t.b = b ? b + column * length : local;
    t.b_panel = plan.width * length;
    t.c_panel = plan.width;
    t.init = k ? Init::result : g.bias ? Init::bias : Init::zero;
    t.bias = bias;
    const int64_t end = std::min(mine.end, (item / count + 1) * count);
    for (; item < end; ++item) {
      const int64_t row = (tiles.begin + item % count) * plan.cap;
      t.rows = std::min(plan.cap, g.M - row);
      t.a = a + row * length;
      run_tile(g, table, t, g.c + row * g.N + column, columns, edge);
    }
  }
}

template <class R>
struct Call {
  const GemmArgs<R>* args;
  R* scratch;
};

template <class R>
void body(const void* context, int rank, int size, Barrier& barrier) {
  const auto& call = *static_cast<const Call<R>*>(context);
  const FlushDenormals flush;
  gemm_in_team(*call.args, call.scratch, rank, size, barrier);
}

}  // namespace

namespace {
int clamp_team(double size, int most) { return static_cast<int>(std::clamp(size, 1.0, double(std::max(most, 1)))); }
}  // namespace

// Per thread several microseconds of work, against one or two to wake it.
int team_size(double multiply_adds, int most) { return clamp_team(multiply_adds / 250e3, most); }
// Per thread several tenths of a microsecond, against one or two for the barrier.
int step_team_size(double multiply_adds, int most) { return clamp_team(multiply_adds / 16e3, most); }

template <class R>
size_t gemm_scratch(const GemmArgs<R>& g, int most) {
  const Plan<R> plan(g, table_of<R>(kernels()));
  return 2 * (plan.packed_a + plan.packed_b) + most * plan.local;
}

template <class R>
void gemm_in_team(const GemmArgs<R>& g, R* scratch, int rank, int size, Barrier& barrier) noexcept {
  const Table<R>& table = table_of<R>(kernels());
  const Plan<R> plan(g, table);
  const int64_t groups = (plan.panels + plan.group - 1) / plan.group, packed = plan.packed_a + plan.packed_b;
  R* const local = scratch + 2 * packed + rank * plan.local;
  const bool empty = g.M == 0 || g.N == 0;
  for (int64_t k = 0, block = 0; (k < g.K || k == 0) && !empty; k += kBlockK, ++block) {
    R* const a = scratch + (block & 1) * packed;  // two buffers: one barrier per block is enough
    R* const b = plan.packed_b ? a + plan.packed_a : nullptr;
    pack_a(g, table, share(plan.tiles, rank, size), plan.cap, k, a);
    if (b) {
      const Range panels = share(plan.panels, rank, size);
      pack_b(g, table, panels.begin, panels.end - panels.begin, k,
             b + panels.begin * plan.width * std::min(kBlockK, g.K - k));
    }
    barrier.wait();
    for (int64_t m = 0; m < plan.blocks; ++m) {
      const Range tiles = share(plan.tiles, static_cast<int>(m), static_cast<int>(plan.blocks));
      const Range mine = share(groups * (tiles.end - tiles.begin), rank, size);
      multiply(g, table, plan, tiles, mine, k, a, b, local);
    }
  }
}

template <class R>
void gemm(const GemmArgs<R>& g, R* scratch, const Team& team) noexcept {
  const Call<R> call{&g, scratch};
  team.run(team_size(double(g.M) * g.N * g.K, team.most), body<R>, &call);
}

template size_t gemm_scratch(const GemmArgs<float>&, int);
template size_t gemm_scratch(const GemmArgs<double>&, int);
template void gemm_in_team(const GemmArgs<float>&, float*, int, int, Barrier&) noexcept;
template void gemm_in_team(const GemmArgs<double>&, double*, int, int, Barrier&) noexcept;
template void gemm(const GemmArgs<float>&, float*, const Team&) noexcept;
template void gemm(const GemmArgs<double>&, double*, const Team&) noexcept;

}  // namespace fastseq::core
