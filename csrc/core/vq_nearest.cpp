// The lookup. Many rows: blocks of rows, transposed into panels in the nearest cache, meet all codes in turn; each lane
// keeps its best score and code, so nothing of size N * K exists. Where there are fewer blocks than threads the codes
// are split as well and the parts are merged. Few rows, or more than one code per row: panels of codes are transposed
// instead, shared among the threads, and each row keeps a short sorted list.
#include "core/vq.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/isa.h"
#include "core/vq_results.h"

namespace fastseq::core {
namespace {

constexpr int64_t kPanelBytes = 16 << 10;  // panels of rows that stay in the nearest cache beside a tile of codes
constexpr int64_t kMostPanels = 32;        // of rows in a block
constexpr int64_t kChunk = 8;              // panels of codes at a time, for few rows

// An integer of R's size: what the tile counts codes with.
template <class R>
struct Counter;
template <>
struct Counter<float> {
  using Type = int32_t;
};
template <>
struct Counter<double> {
  using Type = int64_t;
};

template <class R>
struct Plan {
  int64_t width, tile, panels, code_panels, most_rows;
  bool few;
  Plan(const VqNearest<R>& a, const Table<R>& table) {
    width = table.panel_width;
    tile = table.tile_rows;
    code_panels = (a.shape.K + width - 1) / width;
    few = a.best > 1 || a.shape.N <= width / 4;
    panels = std::clamp<int64_t>(kPanelBytes / (a.shape.D * width * static_cast<int64_t>(sizeof(R))), 1, kMostPanels);
    most_rows = a.shape.G * a.shape.N;
  }
};

// Blocks of rows, and in how many parts the codes meet each.
struct Blocks {
  int64_t panels, per_group, parts;
};
template <class R>
Blocks blocks_of(const VqNearest<R>& a, const Plan<R>& plan, int size) {
  const int64_t G = a.shape.G, panels = std::max<int64_t>(1, (a.shape.N + plan.width - 1) / plan.width);
  Blocks b;
  b.panels = std::clamp<int64_t>(panels * G / (4 * size), 1, plan.panels);
  b.per_group = (panels + b.panels - 1) / b.panels;
  const int64_t tiles = (a.shape.K + plan.tile - 1) / plan.tile;
  b.parts = size == 1 ? 1 : std::clamp<int64_t>((2 * size + b.per_group * G - 1) / (b.per_group * G), 1, tiles);
  return b;
}

template <class R>
struct Scratch {
  using Count = typename Counter<R>::Type;
  R* start;         // [G, code_panels * width]
  int64_t* rows;    // [G, N] numbers of the rows that count, where there is a mask
  int64_t* valid;   // [G] how many
  R* part_best;     // [parts or threads, G * N * best]
  int64_t* part_k;  // the same
  char* local;      // of each thread
  int64_t local_bytes;

  // With a null base only `total` is of use.
  int64_t total;
  Scratch(const VqNearest<R>& a, const Plan<R>& plan, int most, char* base) {
    const VqShape<R>& s = a.shape;
    int64_t at = 0;
    const auto take = [&](int64_t size) {
      char* const p = base ? base + at : nullptr;
      at += size;
      return p;
    };
    start = reinterpret_cast<R*>(take(bytes<R>(s.G * plan.code_panels * plan.width)));
    rows = reinterpret_cast<int64_t*>(take(s.mask ? bytes<int64_t>(s.G * s.N) : 0));
    valid = reinterpret_cast<int64_t*>(take(bytes<int64_t>(s.G)));
    // parts: at most two per thread, and only where there are fewer blocks than that
    const int64_t block = std::max<int64_t>(1, s.G * ((s.N + plan.width - 1) / plan.width));
    const int64_t parts = plan.few ? most : most > 1 && block < 2 * most ? 2 * most : 0;
    part_best = reinterpret_cast<R*>(take(bytes<R>(parts * plan.most_rows * a.best)));
    part_k = reinterpret_cast<int64_t*>(take(bytes<int64_t>(parts * plan.most_rows * a.best)));
    const int64_t lanes = plan.panels * plan.width;
    const int64_t many = bytes<R>(std::max(lanes, plan.width) * s.D) + bytes<R>(lanes) + bytes<Count>(lanes);
    const int64_t few = bytes<R>(kChunk * plan.width * s.D) + bytes<R>(plan.tile * kChunk * plan.width);
    local_bytes = plan.few ? few : many;
    local = take(most * local_bytes);
    total = at;
  }
};

template <class R>
struct Call {
  const VqNearest<R>* args;
  char* scratch;
  int most;
};

template <class R>
void transpose_codes(const VqShape<R>& s, const Table<R>& table, int64_t g, int64_t panel, R* out, R* start) {
  const int64_t width = table.panel_width, k = panel * width;
  table.pack_rows({{s.codebook + g * s.K * s.D, s.D, nullptr}, k, 0, std::min(width, s.K - k), s.D, width, out});
  table.vq_start(out, s.D, s.dot, start);
}

template <class R>
class Lookup {
 public:
  using Count = typename Counter<R>::Type;
  Lookup(const Call<R>& call, int rank, int size)
      : a(*call.args),
        s(a.shape),
        table(table_of<R>(kernels())),
        plan(a, table),
        scratch(a, plan, call.most, call.scratch),
        rank(rank),
        size(size) {
    local = scratch.local + rank * scratch.local_bytes;
    starts = a.prepared ? a.prepared + s.G * plan.code_panels * plan.width * s.D : scratch.start;
  }

  int64_t rows(int64_t g) const { return s.mask ? scratch.valid[g] : s.N; }
  int64_t row(int64_t g, int64_t i) const { return s.mask ? scratch.rows[g * s.N + i] : i; }
  const R* code(int64_t g, int64_t k) const { return s.codebook + (g * s.K + k) * s.D; }
  const R* start(int64_t g, int64_t panel) const { return starts + (g * plan.code_panels + panel) * plan.width; }

  // Panel of codes, and where their scores start.
  void transpose(int64_t g, int64_t panel, R* out) const {
    transpose_codes(s, table, g, panel, out, scratch.start + (g * plan.code_panels + panel) * plan.width);
  }

  void many(Barrier& barrier) {
    const Blocks b = blocks_of(a, plan, size);
    const Range mine = share(s.G * plan.code_panels, rank, size);
    for (int64_t i = mine.begin; i < mine.end && !a.prepared; ++i) {
      transpose(i / plan.code_panels, i % plan.code_panels, reinterpret_cast<R*>(local));
    }
    barrier.wait();
    const int64_t items = s.G * b.per_group * b.parts;
    for (int64_t item; (item = barrier.draw()) < items;) {
      const int64_t block = item / b.parts;
      block_of_rows(b, block / b.per_group, block % b.per_group, item % b.parts);
    }
    if (b.parts == 1) return;
    barrier.wait();
    merge(b.parts, 1);
  }

  void block_of_rows(const Blocks& b, int64_t g, int64_t block, int64_t part) {
    const int64_t width = plan.width, first = block * b.panels * width;
    const int64_t count = std::min(rows(g) - first, b.panels * width);
    if (count <= 0) return;
    const int64_t panels = (count + width - 1) / width, lanes = panels * width;
    R* const x = reinterpret_cast<R*>(local);
    R* const best = reinterpret_cast<R*>(local + bytes<R>(std::max(plan.panels, int64_t(1)) * width * s.D));
    Count* const index = reinterpret_cast<Count*>(reinterpret_cast<char*>(best) + bytes<R>(plan.panels * width));
    uint32_t strange[kMostPanels];
    for (int64_t p = 0; p < panels; ++p) {
      const R* lines[kMostPanelWidth];
      const int64_t in = std::min(width, count - p * width);
      for (int64_t i = 0; i < in; ++i) lines[i] = s.x + (g * s.N + row(g, first + p * width + i)) * s.D;
      table.pack_rows({{nullptr, 0, lines}, 0, 0, in, s.D, width, x + p * width * s.D});
      strange[p] = table.vq_negate(x + p * width * s.D, s.D);
    }
    std::fill_n(best, lanes, std::numeric_limits<R>::infinity());
    std::fill_n(index, lanes, Count(0));
    const Range tiles = share((s.K + plan.tile - 1) / plan.tile, static_cast<int>(part), static_cast<int>(b.parts));
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
      const int64_t k = t * plan.tile;
      table.vq_tile({std::min(plan.tile, s.K - k), s.D, panels, code(g, k), s.D, start(g, 0) + k, k, x, best,
                     reinterpret_cast<R*>(index)});
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t n = row(g, first + i);
      const bool finite = !(strange[i / width] >> (i % width) & 1);
      if (b.parts == 1) {
        finish(a, table, g, n, 0, finite ? index[i] : 0, finite ? best[i] : std::numeric_limits<R>::infinity());
      } else {
        const int64_t at = (part * s.G + g) * s.N + n;
        scratch.part_best[at] = finite ? best[i] : std::numeric_limits<R>::infinity();
        scratch.part_k[at] = finite ? index[i] : 0;
      }
    }
  }

  // Each thread has panels of codes of its own, and all rows.
  void few(Barrier& barrier) {
    const int64_t K = s.K, width = plan.width;
    R* const own = reinterpret_cast<R*>(local);
    R* const scores = reinterpret_cast<R*>(local + bytes<R>(kChunk * width * s.D));
    const Range mine = share(plan.code_panels, rank, size);
    for (int64_t g = 0; g < s.G; ++g) {
      const int64_t lists = (rank * s.G + g) * s.N * a.best;
      std::fill_n(scratch.part_best + lists, s.N * a.best, std::numeric_limits<R>::infinity());
      std::fill_n(scratch.part_k + lists, s.N * a.best, K);
      for (int64_t p = mine.begin; p < mine.end; p += kChunk) {
        const int64_t panels = std::min(kChunk, mine.end - p);
        for (int64_t i = 0; i < panels && !a.prepared; ++i) transpose(g, p + i, own + i * width * s.D);
        const R* const codes = a.prepared ? a.prepared + (g * plan.code_panels + p) * width * s.D : own;
        const int64_t first = p * width, count = std::min(panels * width, K - first);
        for (int64_t n = 0; n < rows(g); n += plan.tile) {
          const R* x[kMostTileRows];
          const int64_t in = std::min(plan.tile, rows(g) - n);
          for (int64_t i = 0; i < in; ++i) x[i] = s.x + (g * s.N + row(g, n + i)) * s.D;
          table.vq_scores({in, s.D, panels, x, codes, start(g, p), scores});
          for (int64_t i = 0; i < in; ++i) {
            const int64_t list = lists + row(g, n + i) * a.best;
            select(scores + i * panels * width, first, count, scratch.part_best + list, scratch.part_k + list);
          }
        }
      }
    }
    barrier.wait();
    merge(size, a.best);
  }

  // Puts scores into the ascending list; of equals the code that came first stays first. A NaN counts as +inf.
  void select(const R* scores, int64_t first, int64_t count, R* best, int64_t* k) const {
    const int64_t last = a.best - 1;
    for (int64_t i = 0; i < count; ++i) {
      if (!(scores[i] < best[last]) && k[last] < s.K) continue;
      insert(std::isnan(scores[i]) ? std::numeric_limits<R>::infinity() : scores[i], first + i, best, k);
    }
  }

  // K marks an empty place of the list.
  void insert(R score, int64_t code, R* best, int64_t* k) const {
    int64_t at = a.best;
    while (at > 0 && (score < best[at - 1] || (k[at - 1] == s.K && code < s.K))) --at;
    if (at == a.best) return;
    for (int64_t i = a.best - 1; i > at; --i) best[i] = best[i - 1], k[i] = k[i - 1];
    best[at] = score, k[at] = code;
  }

  // Parts hold codes in ascending order.
  void merge(int64_t parts, int64_t best) {
    const int64_t part = s.G * s.N * best;
    for (int64_t g = 0; g < s.G; ++g) {
      const Range mine = share(rows(g), rank, size);
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        const int64_t n = row(g, i), at = (g * s.N + n) * best;
        R* const list = scratch.part_best + at;
        int64_t* const k = scratch.part_k + at;
        for (int64_t p = 1; p < parts; ++p) {
          for (int64_t r = 0; r < best; ++r) {
            const R score = scratch.part_best[p * part + at + r];
            const int64_t code = scratch.part_k[p * part + at + r];
            if (plan.few) {
              insert(score, code, list, k);
            } else if (score < *list) {
              *list = score, *k = code;
            }
          }
        }
        const bool strange = plan.few && !finite(s.x + (g * s.N + n) * s.D);
        for (int64_t r = 0; r < best; ++r)
          finish(a, table, g, n, r, strange ? r : k[r], strange ? std::numeric_limits<R>::infinity() : list[r]);
      }
    }
  }

  bool finite(const R* x) const {
    R sum = 0;
    for (int64_t d = 0; d < s.D; ++d) sum += x[d] * R(0);
    return sum == R(0);
  }

  const VqNearest<R>& a;
  const VqShape<R>& s;
  const Table<R>& table;
  const Plan<R> plan;
  const Scratch<R> scratch;
  const int rank, size;
  char* local;
  const R* starts;  // [G, code_panels * width]
};

template <class R>
void body(const void* context, int rank, int size, Barrier& barrier) {
  const auto& call = *static_cast<const Call<R>*>(context);
  Lookup<R> lookup(call, rank, size);
  if (lookup.s.mask) {
    sort_rows(*call.args, lookup.scratch.rows, lookup.scratch.valid, share(lookup.s.G, rank, size));
    barrier.wait();
  }
  lookup.plan.few ? lookup.few(barrier) : lookup.many(barrier);
}

}  // namespace

template <class R>
size_t vq_nearest_scratch(const VqNearest<R>& args, int most) {
  if constexpr (sizeof(R) == sizeof(float)) {
    if (vq_screens(args)) return vq_screen_scratch(args, most);
  }
  const Plan<R> plan(args, table_of<R>(kernels()));
  return Scratch<R>(args, plan, most, nullptr).total;
}

template <class R>
void vq_nearest(const VqNearest<R>& args, void* scratch, const Team& team) noexcept {
  if constexpr (sizeof(R) == sizeof(float)) {
    if (vq_screens(args)) return vq_screen(args, scratch, team, nullptr);
  }
  const Call<R> call{&args, static_cast<char*>(scratch), team.most};
  const VqShape<R>& s = args.shape;
  if (s.G * s.N == 0) return;
  team.run(team_size(double(s.G) * s.N * s.K * s.D, team.most), body<R>, &call);
}

template <class R>
size_t vq_prepared_size(const VqShape<R>& s) {
  const int64_t width = table_of<R>(kernels()).panel_width;
  return s.G * ((s.K + width - 1) / width) * width * (s.D + 1);
}

template <class R>
void vq_prepare(const VqShape<R>& s, R* prepared) noexcept {
  const Table<R>& table = table_of<R>(kernels());
  const int64_t width = table.panel_width, panels = (s.K + width - 1) / width;
  R* const start = prepared + s.G * panels * width * s.D;
  for (int64_t i = 0; i < s.G * panels; ++i) {
    transpose_codes(s, table, i / panels, i % panels, prepared + i * width * s.D, start + i * width);
  }
}

template size_t vq_prepared_size(const VqShape<float>&);
template size_t vq_prepared_size(const VqShape<double>&);
template void vq_prepare(const VqShape<float>&, float*) noexcept;
template void vq_prepare(const VqShape<double>&, double*) noexcept;
template size_t vq_nearest_scratch(const VqNearest<float>&, int);
template size_t vq_nearest_scratch(const VqNearest<double>&, int);
template void vq_nearest(const VqNearest<float>&, void*, const Team&) noexcept;
template void vq_nearest(const VqNearest<double>&, void*, const Team&) noexcept;

}  // namespace fastseq::core
