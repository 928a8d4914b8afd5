// Blocking: K in blocks. For each, the threads draw the panels of B one by one and run each against as many rows of A
// as the second cache holds. Where these are all rows, a panel is packed just before it is used, into the nearest
// cache; else B is packed first, once, by all threads. So is A where it comes transposed, and copied where its rows are
// longer than a block: rows a power of two apart would push each other out of the caches.
#include "core/gemm.h"

#include <algorithm>
#include <cstring>

#include "core/flush.h"
#include "core/isa.h"

namespace fastseq::core {
namespace {

// Rows of A in the second cache. From 120 to 360 of them no difference rose above the noise of some 7 % on Zen 3.
constexpr int64_t kBlockM = 240;
constexpr int64_t kItems = 4;       // for each thread to draw
constexpr int64_t kLeastRows = 24;  // of an item, where a panel is packed for each item anew
constexpr int64_t kGroup = 4;       // panels packed together where there is one tile of few rows, to fill the pipeline

template <class R>
struct Plan {
  int64_t tiles, cap, panels, width, group, groups, length, row_blocks, a_row, packed_a, packed_b, local;
  Plan(const GemmArgs<R>& g, const Table<R>& table) {
    tiles = std::max<int64_t>(1, (g.M + table.tile_rows - 1) / table.tile_rows);
    cap = std::max<int64_t>(1, (g.M + tiles - 1) / tiles);
    tiles = (g.M + cap - 1) / cap;
    width = table.panel_width;
    panels = (g.N + width - 1) / width;
    group = tiles == 1 && cap <= table.tile_rows / 2 ? kGroup : 1;
    groups = (panels + group - 1) / group;
    length = block_k(g.K);
    row_blocks = (tiles * cap + kBlockM - 1) / kBlockM;
    a_row = g.transpose_a ? length : round_up(length) + 16;
    packed_a = g.transpose_a || g.K > length ? round_up(tiles * cap * a_row) : 0;
    packed_b = row_blocks > 1 ? round_up(panels * width * length) : 0;
    local = round_up(group * width * (length + 1) + table.tile_rows * group * width);  // B, bias, a tile of C
  }
};

// One tile of C; a panel group that sticks out of C goes through `edge`.
template <class R>
void run_tile(const GemmArgs<R>& g, const Table<R>& table, TileArgs<R>& t, R* c, int64_t columns, R* edge) {
  const int64_t width = t.panels * table.panel_width;
  if (columns == width) {
    t.c = c;
    t.c_row = g.c_row();
    return table.tile(t);
  }
  t.c = edge;
  t.c_row = width;
  if (t.init == Init::result) {
    for (int64_t i = 0; i < t.rows; ++i) std::memcpy(edge + i * width, c + i * g.c_row(), columns * sizeof(R));
  }
  table.tile(t);
  for (int64_t i = 0; i < t.rows; ++i) std::memcpy(c + i * g.c_row(), edge + i * width, columns * sizeof(R));
}

// Panels [mine.begin, mine.end) of op(b), for the block of K that begins at k.
template <class R>
void pack_b(const GemmArgs<R>& g, const Table<R>& table, const Plan<R>& plan, Range mine, int64_t k, R* out) {
  const int64_t length = std::min(plan.length, g.K - k), width = plan.width;
  const int64_t n = mine.begin * width, count = std::min(mine.end * width, g.N) - n;
  if (g.transpose_b) {
    table.pack_rows({g.b, n, k, count, length, width, out});
  } else {
    table.pack_columns({g.b, k, n, count, length, width, out});
  }
}

template <class R>
const R* row_of(const Matrix<R>& matrix, int64_t i) {
  return matrix.rows ? matrix.rows[i] : matrix.data + i * matrix.stride;
}

// Tiles [mine.begin, mine.end) of op(a), for the block of K that begins at k: [K][cap] each where it comes transposed,
// else row by row.
template <class R>
void pack_a(const GemmArgs<R>& g, const Table<R>& table, const Plan<R>& plan, Range mine, int64_t k, R* out) {
  const int64_t length = std::min(plan.length, g.K - k), begin = mine.begin * plan.cap;
  const int64_t end = std::min(mine.end * plan.cap, g.M);
  if (g.transpose_a) return table.pack_columns({g.a, k, begin, end - begin, length, plan.cap, out + begin * length});
  for (int64_t i = begin; i < end; ++i) std::memcpy(out + i * plan.a_row, row_of(g.a, i) + k, length * sizeof(R));
}

// `tiles` of rows times a group of panels, for the block of K that begins at k. a: packed, or null where it is read in
// place. b: all of it packed, or null.
template <class R>
void multiply(const GemmArgs<R>& g, const Table<R>& table, const Plan<R>& plan, Range tiles, int64_t group, int64_t k,
              const R* a, const R* b, R* local) {
  const int64_t length = std::min(plan.length, g.K - k), column = group * plan.group * plan.width;
  const int64_t columns = std::min(plan.group * plan.width, g.N - column);
  const int64_t panels = (columns + plan.width - 1) / plan.width;
  R* const bias = local + plan.group * plan.width * plan.length;
  R* const edge = bias + plan.group * plan.width;
  if (!b) pack_b(g, table, plan, Range{column / plan.width, column / plan.width + panels}, k, local);
  if (g.bias && k == 0) {
    std::fill(bias, bias + panels * plan.width, R(0));
    std::memcpy(bias, g.bias + column, columns * sizeof(R));
  }
  TileArgs<R> t;
  t.panels = panels;
  t.K = length;
  t.a_step = g.transpose_a ? plan.cap : 1;
  t.b = b ? b + column * length : local;
  t.b_panel = plan.width * length;
  t.c_panel = plan.width;
  t.init = k ? Init::result : g.bias ? Init::bias : Init::zero;
  t.bias = bias;
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const int64_t row = tile * plan.cap;
    t.rows = std::min(plan.cap, g.M - row);
    for (int64_t i = 0; i < t.rows; ++i) {
      const int64_t r = row + i;
      t.a[i] = g.transpose_a ? a + row * length + i : a ? a + r * plan.a_row : row_of(g.a, r) + k;
    }
    run_tile(g, table, t, g.c + row * g.c_row() + column, columns, edge);
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
  const GemmArgs<R>& g = *call.args;
  if (g.M == 0 || g.N == 0) return;
  const FlushDenormals flush;
  const Table<R>& table = table_of<R>(kernels());
  const Plan<R> plan(g, table);
  const int64_t packed = plan.packed_a + plan.packed_b;
  // Pieces of rows: as many as fit the second cache, or as give each thread some to draw and enough to do in each.
  const int64_t wanted = size == 1 ? 1 : (kItems * size + plan.groups - 1) / plan.groups;
  const int64_t pieces = std::min(plan.tiles, std::max(plan.row_blocks, std::min(wanted, g.M / kLeastRows + 1)));
  R* const local = call.scratch + 2 * packed + rank * plan.local;
  for (int64_t k = 0, turn = 0; k < g.K || k == 0; k += plan.length, ++turn) {
    R* const buffer = call.scratch + (turn & 1) * packed;  // two of them: one barrier per block is enough
    R* const a = plan.packed_a ? buffer : nullptr;
    R* const b = plan.packed_b ? buffer + plan.packed_a : nullptr;
    if (a) pack_a(g, table, plan, share(plan.tiles, rank, size), k, a);
    if (b) {
      const Range mine = share(plan.panels, rank, size);
      pack_b(g, table, plan, mine, k, b + mine.begin * plan.width * std::min(plan.length, g.K - k));
    }
    barrier.wait();
    for (int64_t item; (item = barrier.draw()) < pieces * plan.groups;) {
      const Range tiles = share(plan.tiles, static_cast<int>(item / plan.groups), static_cast<int>(pieces));
      multiply(g, table, plan, tiles, item % plan.groups, k, a, b, local);
    }
  }
}

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
void gemm(const GemmArgs<R>& g, R* scratch, const Team& team) noexcept {
  const Call<R> call{&g, scratch};
  team.run(team_size(double(g.M) * g.N * g.K, team.most), body<R>, &call);
}

template size_t gemm_scratch(const GemmArgs<float>&, int);
template size_t gemm_scratch(const GemmArgs<double>&, int);
template void gemm(const GemmArgs<float>&, float*, const Team&) noexcept;
template void gemm(const GemmArgs<double>&, double*, const Team&) noexcept;

}  // namespace fastseq::core
