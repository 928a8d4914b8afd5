// Vector quantization: the nearest codeword of each row, and sums of rows per codeword.
//
// G codebooks (heads or groups), N rows, K codes, D dimensions; rows and codes are contiguous.
// The score of row x and code c is start(c) - x*c: one chain of fused multiply-adds over D in ascending order, from
// start(c) = c*c/2, which is summed in the same order in float64 and rounded. With `dot` it is 0. A code that is not
// finite starts at +inf. The index is that of the smallest score, the lowest among equals; a row that is not finite
// gets 0. So it depends on the row and the codebook alone, not on other rows, blocks, threads or instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/parallel.h"

namespace fastseq::core {

template <class R>
struct VqShape {
  int64_t G, N, K, D;  // K, D at least 1, K below 2^31
  const R* x;          // [G, N, D]  in
  const R* codebook;   // [G, K, D]  in
  const bool* mask;    // [G, N] or null: the rows that count  in
  bool dot;
};

enum class Screen { never, always, automatic };

//   index     [G, N, best] integers of `bits` (16, 32, 64)   out   -1 in rows that do not count
//   distance  [G, N, best] or null                           out   squared, of row and code; 0 in rows that do not
//   count codes     [G, N, D] or null, for best = 1                out   zeros in rows that do not count
template <class R>
struct VqNearest {
  VqShape<R> shape;
  int64_t best;  // how many, ascending by score and then by index; at most K
  int bits;
  void* index;
  R* distance;
  R* score;
  R* codes;
  Screen screen = Screen::automatic;  // whether to go by vq_screen.h, where that can
  const R* prepared = nullptr;
};

// The codes [G, K, D] in panels, and where their scores start: what a lookup of few rows would spend its time on.
template <class R>
size_t vq_prepared_size(const VqShape<R>& shape);
template <class R>
void vq_prepare(const VqShape<R>& shape, R* prepared) noexcept;

// Bytes of scratch for a team of at most `most`; uninitialised, 64-byte aligned.
template <class R>
size_t vq_nearest_scratch(const VqNearest<R>& args, int most);
template <class R>
void vq_nearest(const VqNearest<R>& args, void* scratch, const Team& team) noexcept;

// Rows by code: how many rows have index k, and the sum over them of scale * weight * (x - minus) + plus. They are
// added in ascending order within blocks of kSumBlock rows of a code, and then block by block: equal bits for any team.
//   x, minus, plus  [G, N, D]  in; each may be null and is zero then
//   weight          [G, N] or null: ones  in
//   index           [G, N]  in; -1: the row does not count; others lie in 0 .. K - 1
//   counts          [G, K] or null  out
//   sums            [G, K, D] or null  out
constexpr int64_t kSumBlock = 256;
template <class R>
struct VqSums {
  int64_t G, N, K, D;
  const R *x, *minus, *plus, *weight;
  R scale;
  const int64_t* index;
  R *counts, *sums;
};
template <class R>
size_t vq_sums_scratch(const VqSums<R>& args, int most);
template <class R>
void vq_sums(const VqSums<R>& args, void* scratch, const Team& team) noexcept;

// dx [rows, D] = J(dquantized) + 2 * dcommitment * (x - codes); zeros in rows of index -1. J is the identity, or with
// `rotation` turns and scales as reference.vq_backward says. dquantized [rows, D] and dcommitment [rows] may be null.
template <class R>
struct VqRows {
  int64_t rows, D;
  const R *dquantized, *dcommitment, *x, *codes;
  const int64_t* index;
  bool rotation;
  R* dx;
};
template <class R>
void vq_rows(const VqRows<R>& args, const Team& team) noexcept;

// ---- what an instruction set provides; see isa.h ----

// Some codes against panels of rows. A panel is [D][panel_width]: rows negated, one per lane.
template <class R>
struct VqTile {
  int64_t codes, D, panels;
  const R* code;  // the first; others follow at `stride`
  int64_t stride;
  const R* start;  // of each code
  int64_t first;   // number of the first code
  const R* x;      // panels, one after the other
  R* best;         // [panels][panel_width]  in/out   smallest score so far
  R* index;        // [panels][panel_width]  in/out   integers of R's size: its code
};

// `rows` (1 .. tile_rows) against panels of codes, [D][panel_width] each, one code per lane: all scores.
template <class R>
struct VqScores {
  int64_t rows, D, panels;
  const R* const* x;  // the rows
  const R* code;      // panels, one after the other
  const R* start;     // [panels][panel_width]
  R* scores;          // row i, panel p at scores + (i * panels + p) * panel_width
};

}  // namespace fastseq::core
