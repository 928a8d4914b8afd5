// Rows of several examples (MIMO): B distinct examples are taken into N rows of M slots. Definition:
// fastseq/reference/mimo.py. Data is [A, B or N, S, width]: A steps before the examples, S places after them. Every
// array is contiguous and aliases no other. Nothing is added by two threads at once: no result depends on the team.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/parallel.h"

namespace fastseq::core {

struct MimoShape {
  int64_t A, B, N, S, M;
  const int32_t* index;  // [M, N], each in 0 .. B-1
};

// out[a, n, s, m] = x[a, index[m, n], s], of elements of any kind
//   x    [A, B, S]     of `bytes` each   in
//   out  [A, N, S, M]  of `bytes` each   out
struct MimoGather {
  MimoShape shape;
  int64_t bytes;
  const void* x;
  void* out;
};
void mimo_gather(const MimoGather& call, const Team& team) noexcept;

// Sums of rows, in ascending order of slot and then of row.
//   mimo_combine           in [A, B, S, M*width]   out [A, N, S, width]     bias, then slot 0, slot 1, ...
//   mimo_combine_backward  in [A, N, S, width]     out [A, B, S, M*width]   its adjoint
//   mimo_gather_backward   in [A, N, S, M*width]   out [A, B, S, width]     the adjoint of mimo_gather
template <class R>
struct MimoSums {
  MimoShape shape;
  int64_t width;
  const R* in;
  const R* bias;  // [width] or null; of mimo_combine alone
  R* out;
};
// Bytes of scratch of each of the three; uninitialised, 64-byte aligned.
size_t mimo_sums_scratch(const MimoShape& shape);
template <class R>
void mimo_combine(const MimoSums<R>& call, void* scratch, const Team& team) noexcept;
template <class R>
void mimo_combine_backward(const MimoSums<R>& call, void* scratch, const Team& team) noexcept;
template <class R>
void mimo_gather_backward(const MimoSums<R>& call, void* scratch, const Team& team) noexcept;

// A linear layer on the rows that mimo_gather would make.
//   x       [A, B, S, C]   in
//   weight  [G, M*C]       in
//   bias    [G] or null    in
//   out     [A, N, S, G]   out
template <class R>
struct MimoProject {
  MimoShape shape;
  int64_t C, G;
  const R *x, *weight, *bias;
  R* out;
};
// d is that of out; of dx, dweight and dbias those are written that are not null.
template <class R>
struct MimoProjectBackward {
  MimoShape shape;
  int64_t C, G;
  const R *d, *x, *weight;
  R *dx, *dweight, *dbias;
};
// Bytes of scratch for a team of at most `most`; uninitialised, 64-byte aligned.
template <class R>
size_t mimo_project_scratch(const MimoProject<R>& call, int most);
template <class R>
size_t mimo_project_scratch(const MimoProjectBackward<R>& call, int most);
template <class R>
void mimo_project(const MimoProject<R>& call, void* scratch, const Team& team) noexcept;
template <class R>
void mimo_project_backward(const MimoProjectBackward<R>& call, void* scratch, const Team& team) noexcept;

// Whether a product is made once for each example and slot, and then gathered, or for each row. By multiply-adds, where
// adding one gathered number, which comes from the second cache, takes the time of kGatheredAdd of them: 18 in float32
// on Sapphire Rapids, from 6400 rows of 1024 columns, three slots.
constexpr int64_t kGatheredAdd = 16;
constexpr bool mimo_by_example(const MimoShape& s, int64_t C) { return s.B * C + s.N * kGatheredAdd < s.N * C; }

// ---- what an instruction set provides; see isa.h ----

// out = start + the sum, in order, of `count` rows; row i begins at data + at[i]
template <class R>
struct RowSum {
  const R* start;  // or null: zeros
  const R* data;
  const int64_t* at;
  int64_t count, columns;
  R* out;
};

}  // namespace fastseq::core
