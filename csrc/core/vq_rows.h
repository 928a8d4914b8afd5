// A block of rows that meets all codes in turn: transposed into panels in the nearest cache, each lane with its best
// score and code so far.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "core/isa.h"
#include "core/vq.h"
#include "core/vq_results.h"

namespace fastseq::core {

constexpr int64_t kRowPanelBytes = 16 << 10;  // of the nearest cache, beside a tile of codes
constexpr int64_t kCodeBytes = 16 << 10;      // of codes that a panel meets at once
constexpr int64_t kMostRowPanels = 32;

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
class RowBlock {
 public:
  using Count = typename Counter<R>::Type;

  static int64_t most_panels(const Table<R>& table, int64_t D) {
    const int64_t panel = std::max<int64_t>(1, D) * table.panel_width * static_cast<int64_t>(sizeof(R));
    return std::clamp<int64_t>(kRowPanelBytes / panel, 1, kMostRowPanels);
  }
  static int64_t memory(const Table<R>& table, int64_t D) {
    const int64_t lanes = most_panels(table, D) * table.panel_width;
    return bytes<R>(lanes * D) + bytes<R>(lanes) + bytes<Count>(lanes);
  }

  RowBlock(const Table<R>& table, int64_t D, char* memory) : table_(table), D_(D), width_(table.panel_width) {
    const int64_t lanes = most_panels(table, D) * width_;
    x_ = reinterpret_cast<R*>(memory);
    best_ = reinterpret_cast<R*>(memory + bytes<R>(lanes * D));
    index_ = reinterpret_cast<Count*>(reinterpret_cast<char*>(best_) + bytes<R>(lanes));
  }

  // `count` rows, at most most_panels() * panel_width; row(i) is the i-th.
  template <class F>
  void load(int64_t count, F row) {
    panels_ = (count + width_ - 1) / width_;
    for (int64_t p = 0; p < panels_; ++p) {
      const R* lines[kMostPanelWidth];
      const int64_t in = std::min(width_, count - p * width_);
      for (int64_t i = 0; i < in; ++i) lines[i] = row(p * width_ + i);
      R* const panel = x_ + p * width_ * D_;
      table_.pack_rows({{nullptr, 0, lines}, 0, 0, in, D_, width_, panel});
      strange_[p] = table_.vq_negate(panel, D_);
    }
    std::fill_n(best_, panels_ * width_, std::numeric_limits<R>::infinity());
    std::fill_n(index_, panels_ * width_, Count(0));
  }

  // Codes [begin, end) of codebook [K, D]; start [K].
  void meet(const R* codebook, const R* start, int64_t begin, int64_t end) {
    const int64_t most = std::max<int64_t>(1, kCodeBytes / (D_ * static_cast<int64_t>(sizeof(R)) * table_.tile_rows));
    const int64_t together = most * table_.tile_rows;
    for (int64_t k = begin; k < end; k += together) {
      table_.vq_tile({std::min(together, end - k), D_, panels_, codebook + k * D_, D_, start + k, k, x_, best_,
                      reinterpret_cast<R*>(index_)});
    }
  }

  bool finite(int64_t i) const { return !(strange_[i / width_] >> (i % width_) & 1); }
  int64_t index(int64_t i) const { return finite(i) ? index_[i] : 0; }
  R score(int64_t i) const { return finite(i) ? best_[i] : std::numeric_limits<R>::infinity(); }

 private:
  const Table<R>& table_;
  int64_t D_, width_, panels_ = 0;
  R *x_, *best_;
  Count* index_;
  uint32_t strange_[kMostRowPanels];
};

// Panel of codes [panel_width] from number panel * panel_width on, transposed, and where their scores start.
template <class R>
void transpose_codes(const Table<R>& table, const R* codebook, int64_t K, int64_t D, bool dot, int64_t panel, R* out,
                     R* start) {
  const int64_t width = table.panel_width, k = panel * width;
  table.pack_rows({{codebook, D, nullptr}, k, 0, std::min(width, K - k), D, width, out});
  table.vq_start(out, D, dot, start);
}

}  // namespace fastseq::core
