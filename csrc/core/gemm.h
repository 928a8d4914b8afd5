// Matrix product with one order of summation: every element of the result is the sum, in ascending order, over blocks
// of kBlockK of K; each block is a chain of fused multiply-adds from zero. That holds whatever the other sizes, the
// number of threads or the instruction set (scalar rounds twice). The blocks keep the error of long sums small.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/parallel.h"

namespace fastseq::core {

constexpr int64_t kBlockK = 384;

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
//   c      [M, N] with row stride N                 out; may not alias an input
template <class R>
struct GemmArgs {
  int64_t M, N, K;
  Matrix<R> a, b;
  bool transpose_a, transpose_b;
  const R* bias;
  R* c;
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
// The same inside a team that is running already: called on each of its threads.
template <class R>
void gemm_in_team(const GemmArgs<R>& args, R* scratch, int rank, int size, Barrier& barrier) noexcept;

// ---- what an instruction set provides; see isa.h ----

enum class Init { zero, result, bias };  // what the product is added to: 0, what c holds, or bias[column]

template <class R>
struct TileArgs {
  int64_t rows;    // 1 .. tile_rows
  int64_t panels;  // any number
  int64_t K;
  const R* a;       // [K][cap], packed by pack_rows
  int64_t cap;      // rows that the packed tile has room for, >= rows
  const R* b;       // panels of [K][panel_width]
  int64_t b_panel;  // elements from one panel to the next
  R* c;             // element (i, p, :) at c + i * c_row + p * c_panel
  int64_t c_row, c_panel;
  Init init;
  const R* bias;  // [panels][panel_width] for Init::bias
};

// Packs `count` lines of `length` elements so that out[j * width + i] is element j of line i; lines from `count` up to
// `width` become zeros where `pad` says so. pack_rows interleaves lines; pack_columns copies: there a line is a row of
// `count` elements and out[j * width + i] is element i of line j.
template <class R>
struct PackArgs {
  Matrix<R> lines;
  int64_t first;   // number of the first line
  int64_t offset;  // first element of each line
  int64_t count, length, width;
  bool pad;
  R* out;
};

}  // namespace fastseq::core
