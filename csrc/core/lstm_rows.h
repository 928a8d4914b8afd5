// Where the rows of a step lie, what came before them, and how a step is cut into register tiles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core/isa.h"
#include "core/lstm.h"

namespace fastseq::core {

// Rows are numbered by length, longest first, so that the rows of a step are 0 .. count(t) - 1 in every layout.
class Rows {
 public:
  // Elements of int64_t that `memory` must hold.
  static int64_t need(int64_t T, int64_t B) { return 2 * (T + 1) + B; }

  template <class R>
  Rows(const LstmArgs<R>& a, int64_t* memory)
      : T(a.T), B(a.B), reset_(a.reset), reverse_(a.reverse), dense_(!a.lengths && !a.batch_sizes) {
    if (dense_) return;
    counts_ = memory;
    offsets_ = memory + T + 1;
    int64_t* order = memory + 2 * (T + 1);
    for (int64_t t = 0; t < T; ++t) offsets_[t] = t * B;
    if (a.lengths) {
      for (int64_t b = 0; b < B; ++b) order[b] = b;
      std::sort(order, order + B, [&](int64_t x, int64_t y) {
        return a.lengths[x] != a.lengths[y] ? a.lengths[x] > a.lengths[y] : x < y;
      });
      order_ = order;
      for (int64_t t = 0, n = B; t < T; ++t) {
        while (n > 0 && a.lengths[order[n - 1]] <= t) --n;
        counts_[t] = n;
      }
    } else {
      for (int64_t t = 0, at = 0; t < T; ++t) {
        offsets_[t] = at;
        at += counts_[t] = a.batch_sizes[t];
      }
    }
  }

  const int64_t T, B;

  // The h that enters step t, row by row, out of all h and of what stands before the first; `zeros` where that is null.
  template <class R>
  void entering(const LstmArgs<R>& a, const R* h, const R* zeros, int64_t t, Range part, const R** h_in) const {
    const int64_t earlier = before(t), n_before = count(earlier);
    for (int64_t r = part.begin; r < part.end; ++r, ++h_in) {
      *h_in = r < n_before ? h + element(earlier, r) * a.P : a.h0 + batch(r) * a.P;
      if (cut(t, r)) *h_in = a.h_start ? a.h_start : zeros;
    }
  }

  int64_t count(int64_t t) const { return t < 0 || t >= T ? 0 : dense_ ? B : counts_[t]; }
  int64_t batch(int64_t r) const { return order_ ? order_[r] : r; }  // its row in h0 and in dense data
  int64_t element(int64_t t, int64_t r) const { return (dense_ ? t * B : offsets_[t]) + batch(r); }
  int64_t step(int64_t s) const { return reverse_ ? T - 1 - s : s; }  // in order of processing
  int64_t before(int64_t t) const { return reverse_ ? t + 1 : t - 1; }
  int64_t after(int64_t t) const { return reverse_ ? t - 1 : t + 1; }
  // A segment begins between the step processed before t and t: the state that enters t is the start state.
  bool cut(int64_t t, int64_t r) const {
    const int64_t later = reverse_ ? t + 1 : t;
    return reset_ && r < count(later) && reset_[element(later, r)];
  }

 private:
  const bool* reset_;
  bool reverse_, dense_;
  int64_t* counts_ = nullptr;
  int64_t* offsets_ = nullptr;
  const int64_t* order_ = nullptr;
};

// How the threads share a step. By rows, each has all units of its own rows, and none waits for another: for that the
// weights, which then all of them read, must lie in the second cache or meet enough rows to be worth fetching from the
// third. Else by units: each reads its own weights, and a barrier ends the step. The bounds come from Zen 4, where by
// rows saved up to a third from 8 rows a thread on; on Zen 3 both ways take the same time within the noise.
struct Split {
  int size;
  bool by_rows;

  Split(int threads, bool rows) : size(threads), by_rows(rows) {}
  // `sums`: rows are summed into one result in the loop over time, in an order that must not depend on the threads.
  // `weights`: elements that one step multiplies with each row.
  template <class R>
  Split(const LstmArgs<R>& a, int64_t weights, bool sums, int most) {
    const double step = double(a.B) * double(weights);
    size = a.T > 1 ? step_team_size(step, most) : team_size(step, most);
    const bool dense = !a.lengths && !a.batch_sizes;  // else rows are of unequal length
    const int64_t rows = a.B / size, bytes = weights * static_cast<int64_t>(sizeof(R));
    by_rows = size > 1 && dense && !sums && (rows >= 16 || (rows >= 8 && bytes <= 512 * 1024));
  }
  template <class R>
  Split(const LstmArgs<R>& a, bool sums, int most) : Split(a, a.H * (4 * a.P + (a.weight_hr ? a.P : 0)), sums, most) {}
};

// Rows in tiles, as even as can be, units in panels of `width`.
struct Tiling {
  int64_t parts, tile_rows, width;

  Tiling(const Split& split, int64_t rows, int64_t columns)
      : parts(split.by_rows ? split.size : 1), tile_rows(rows), width(columns) {}
  template <class R>
  Tiling(const Split& split, const Table<R>& table) : Tiling(split, table.tile_rows, table.panel_width) {}
  int64_t panels(int64_t units) const { return (units + width - 1) / width; }
  int64_t tiles(int64_t rows) const { return (rows + parts * tile_rows - 1) / (parts * tile_rows) * parts; }
  Range tile(int64_t number, int64_t rows) const {
    return share(rows, static_cast<int>(number), static_cast<int>(tiles(rows)));
  }
  // Calls visit(panel, tile) for the share of a rank in panels x tiles of so many rows, in step number `step`.
  // `whole_panels`: all tiles of a panel on one thread. Every other step goes through the panels backwards, to begin
  // with those weights that the step before left in the caches.
  template <class Visit>
  void each(bool whole_panels, int64_t panels, int64_t rows, int64_t step, int rank, int size, Visit visit) const {
    const int64_t tiles = this->tiles(rows);
    const bool by_rows = parts > 1;
    const Range mine = share(by_rows ? tiles : whole_panels ? panels : panels * tiles, rank, size);
    const int64_t begin = by_rows ? 0 : whole_panels ? mine.begin * tiles : mine.begin;
    const int64_t end = by_rows ? panels * tiles : whole_panels ? mine.end * tiles : mine.end;
    if (begin >= end) return;
    const int64_t first = begin / tiles, last = (end - 1) / tiles;
    for (int64_t n = first; n <= last; ++n) {
      const int64_t panel = step & 1 ? last - (n - first) : n;
      if (by_rows) {
        for (int64_t tile = mine.begin; tile < mine.end; ++tile) visit(panel, tile);
      } else {
        const int64_t from = std::max(begin - panel * tiles, int64_t(0)), to = std::min(end - panel * tiles, tiles);
        for (int64_t tile = from; tile < to; ++tile) visit(panel, tile);
      }
    }
  }
};

// The h that entered each step, by element; `zeros` beyond a row's end.
template <class R>
void entering(const Rows& rows, const LstmArgs<R>& a, const R* h, const R* zeros, const R** h_in) {
  if (a.lengths) std::fill(h_in, h_in + a.N, zeros);
  for (int64_t t = 0; t < a.T; ++t) {
    for (int64_t r = 0; r < rows.count(t); ++r) rows.entering(a, h, zeros, t, {r, r + 1}, h_in + rows.element(t, r));
  }
}

// A tile's product with weights packed for all of K, summed as gemm sums, from zero or what the result holds.
template <class R>
inline void product(const Table<R>& table, TileArgs<R>& t, Init init = Init::zero) {
  const int64_t K = t.K, block = block_k(K);
  t.a_step = 1;
  t.init = init;
  for (int64_t k = 0; k < K || k == 0; k += block) {
    t.K = std::min(block, K - k);
    table.tile(t);
    for (int64_t i = 0; i < t.rows; ++i) t.a[i] += block;
    t.b += block * table.panel_width;
    t.init = Init::result;
  }
}

// Asks for what the cell will read and write once the product before it is done: `Parts` runs of `units`, `stride`
// apart. Into the second cache: weights stream through the first. A step ahead would be too early, they flood the
// second too.
template <int Parts, class R>
inline void prefetch(const R* p, int64_t stride, int64_t units) {
  for (int part = 0; part < Parts; ++part, p += stride) {
    for (int64_t u = 0; u < units; u += 64 / static_cast<int64_t>(sizeof(R))) __builtin_prefetch(p + u, 0, 2);
  }
}

// Elements of R that hold what Rows needs, and `pointers` pointers beside it.
template <class R>
int64_t index_size(const LstmArgs<R>& a, int64_t pointers = 0) {
  return round_up((Rows::need(a.T, a.B) + pointers) * static_cast<int64_t>(sizeof(int64_t) / sizeof(R)));
}

template <class T>
T* take(T*& scratch, int64_t count) {
  T* const out = scratch;
  scratch += count;
  return out;
}

}  // namespace fastseq::core
