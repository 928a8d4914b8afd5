// One kernel per tile, number type and direction of the low-rank LSTM, as in persist_kernels.cuh.
#pragma once

#include "cuda/persist_kernels.cuh"
#include "cuda/persist_lowrank_tile.h"
// then what both share
#include "cuda/persist_lowrank_sums.inl.h"

namespace fastseq::cuda {

Kernel lowrank_forward_bfloat16(int tile);
Kernel lowrank_forward_float16(int tile);
Kernel lowrank_backward_bfloat16(int tile);
Kernel lowrank_backward_float16(int tile);

// The kernel of a tile.
template <template <class, class> class Body, class Low>
Kernel lowrank_kernel_of(int tile) {
  switch (tile) {
#define FASTSEQ_CASE(n, ...)                                                  \
  case n: {                                                                   \
    using Of = Body<Low, LowRankTile<__VA_ARGS__>>;                           \
    return {reinterpret_cast<const void*>(&persist_kernel<Of>), Of::kShared}; \
  }
    FASTSEQ_LOWRANK_TILES(FASTSEQ_CASE)
#undef FASTSEQ_CASE
  }
  return {nullptr, 0};
}

}  // namespace fastseq::cuda
