// Matrix product with one order of summation: every element of the result is the sum, in ascending order, over blocks
// of block_k(K) of K; each block is a chain of fused multiply-adds from zero. That holds whatever the other sizes, the
// number of threads or the instruction set (scalar rounds twice). The blocks keep the error of long sums small.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/parallel.h"

namespace fastseq::core {

constexpr int64_t kBlockK = 192;  // at most
// At least 1. Blocks are as even as multiples of 8 allow: a short one at the end would cost as many reads and writes of
// the result as a long one.
constexpr int64_t block_k(int64_t K) {
  if (K <= kBlockK) return K > 1 ? K : 1;
  const int64_t blocks = (K + kBlockK - 1) / kBlockK;
  return ((K + blocks - 1) / blocks + 7) / 8 * 8;
}

// A matrix in memory. Row i begins at rows[i], or at data + i * stride where rows is null; its elements are contiguous.
template <class R>
struct Matrix {
  const R* data;
  int64_t stride;
  const R* const* rows;
};

// c [M, N] = op(a) @ op(b) + bias
//   a      [M, K], or [K, M] with transpose_a       in
//   b      [K, N], or [N, K] with transpose_b       in
//   bias   [N] or null                              in
//   c      [M, N] with row stride c_stride, 0: N    out; may not alias an input
template <class R>
struct GemmArgs {
  int64_t M, N, K;
  Matrix<R> a, b;
  bool transpose_a, transpose_b;
  const R* bias;
  R* c;
  int64_t c_stride = 0;
  int64_t c_row() const { return c_stride ? c_stride : N; }
};

// Threads that pay for so many multiply-adds, at most `most`.
int team_size(double multiply_adds, int most);
// The same for one step of a recurrence, whose threads are awake already and pay one barrier.
int step_team_size(double multiply_adds, int most);

// Elements of scratch for a team of at most `most`; uninitialised, 64-byte aligned.
template <class R>
size_t gemm_scratch(const GemmArgs<R>& args, int most);
template <class R>
void gemm(const GemmArgs<R>& args, R* scratch, const Team& team) noexcept;

// ---- what an instruction set provides; see isa.h ----

constexpr int kMostTileRows = 32;
constexpr int kMostPanelWidth = 32;

enum class Init { zero, result, bias };  // what the product is added to: 0, what c holds, or bias[column]

template <class R>
struct TileArgs {
  int64_t rows;    // 1 .. tile_rows
  int64_t panels;  // any number
  int64_t K;
  const R* a[kMostTileRows];  // row i, element k at a[i][k * a_step]
  int64_t a_step;
  const R* b;       // panels of [K][panel_width]
  int64_t b_panel;  // elements from one panel to the next
  R* c;             // element (i, p, :) at c + i * c_row + p * c_panel
  int64_t c_row, c_panel;
  Init init;
  const R* bias;  // [panels][panel_width] for Init::bias
};

// Packs panels of `width` columns and `length` rows, [length][width] one after the other; the columns of the last that
// lie beyond `count` become zeros. pack_rows interleaves: a column is a line of `length` elements. pack_columns copies:
// a row is a line of `count` elements.
template <class R>
struct PackArgs {
  Matrix<R> lines;
  int64_t first;   // number of the first line
  int64_t offset;  // first element of each line
  int64_t count, length, width;
  R* out;
};

}  // namespace fastseq::core
