// Residual vector quantization: level m looks up what the codes of the levels before it left of each row, with the
// scores of vq.h. A block of rows goes through all levels while it stays in the nearest cache.
#pragma once

#include "core/vq.h"

namespace fastseq::core {

template <class R>
struct VqLevel {
  int64_t K;
  const R* codebook;  // [K, D]  in
  // of the rows that were given each code, as left before this level; those of the levels follow one another in memory,
  // and are null for all or none
  R* counts;  // [K]  out
  R* sums;    // [K, D]  out
};

//   x          [N, D]  in
//   mask       [N] or null: the rows that count  in
//   levels     [N] or null: how many levels each row uses  in
//   quantized  [N, D]  out   sum of the codes, in the order of the levels; zeros in rows that do not count
//   index      [N, M]  out   -1 where a level is not used
//   distance   [M, N]  out   squared, of what was left and its code; 0 where a level is not used
template <class R>
struct VqResidual {
  int64_t N, D, M;
  const R* x;
  const VqLevel<R>* level;  // [M]
  const bool* mask;
  const int64_t* levels;
  R* quantized;
  int64_t* index;
  R* distance;
};
template <class R>
size_t vq_residual_scratch(const VqResidual<R>& args, int most);
template <class R>
void vq_residual(const VqResidual<R>& args, void* scratch, const Team& team) noexcept;

// dx [N, D]: the sum over the levels of VqRows, each on what the levels before it left. dquantized [N, D] and
// dcommitment [M, N] may be null; index as above.
template <class R>
struct VqResidualRows {
  int64_t N, D, M;
  const R *dquantized, *dcommitment, *x;
  const R* const* codebook;  // [M] of [K_m, D]
  const int64_t* index;
  bool rotation;
  R* dx;
};
template <class R>
size_t vq_residual_rows_scratch(const VqResidualRows<R>& args, int most);
template <class R>
void vq_residual_rows(const VqResidualRows<R>& args, void* scratch, const Team& team) noexcept;

}  // namespace fastseq::core
