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
#include "core/vq_rows.h"

namespace fastseq::core {
namespace {

constexpr int64_t kChunk = 8;  // panels of codes at a time, for few rows

template <class R>
struct Plan {
  int64_t width, tile, panels, code_panels, most_rows;
  bool few;
  Plan(const VqNearest<R>& a, const Table<R>& table) {
    width = table.panel_width;
    tile = table.tile_rows;
    code_panels = (a.shape.K + width - 1) / width;
    few = a.best > 1 || a.shape.N <= width / 4;
    panels = RowBlock<R>::most_panels(table, a.shape.D);
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
    const int64_t many = RowBlock<R>::memory(table_of<R>(kernels()), s.D);
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
class Lookup {
 public:
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
    R* const start = scratch.start + (g * plan.code_panels + panel) * plan.width;
    transpose_codes(table, code(g, 0), s.K, s.D, s.dot, panel, out, start);
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
    const int64_t first = block * b.panels * plan.width, count = std::min(rows(g) - first, b.panels * plan.width);
    if (count <= 0) return;
    RowBlock<R> lanes(table, s.D, local);
    lanes.load(count, [&](int64_t i) { return s.x + (g * s.N + row(g, first + i)) * s.D; });
    const Range tiles = share((s.K + plan.tile - 1) / plan.tile, static_cast<int>(part), static_cast<int>(b.parts));
    lanes.meet(code(g, 0), start(g, 0), tiles.begin * plan.tile, std::min(tiles.end * plan.tile, s.K));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t n = row(g, first + i), at = (part * s.G + g) * s.N + n;
      if (b.parts == 1) {
        finish(a, table, g, n, 0, lanes.index(i), lanes.score(i));
      } else {
        scratch.part_best[at] = lanes.score(i);
        scratch.part_k[at] = lanes.index(i);
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
    const R* const codebook = s.codebook + i / panels * s.K * s.D;
    transpose_codes(table, codebook, s.K, s.D, s.dot, i % panels, prepared + i * width * s.D, start + i * width);
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
