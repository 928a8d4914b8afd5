// One kernel per tile, number type and direction of the computation; each pair of the latter is compiled in a file of
// its own. The included bodies need the names of device.cuh.
#pragma once

#include "cuda/device.cuh"
// first what the bodies use
#include "cuda/exchange.h"
#include "cuda/launch.cuh"
#include "cuda/lstm_persist.h"
#include "cuda/persist_tile.h"
// then what both share
#include "cuda/persist_cell.inl.h"

namespace fastseq::cuda {

Kernel forward_bfloat16(int tile);
Kernel forward_float16(int tile);
Kernel forward_int8_bfloat16(int tile);
Kernel forward_int8_float16(int tile);
Kernel backward_bfloat16(int tile);
Kernel backward_float16(int tile);

template <class Body>
__global__ void __launch_bounds__(Body::Sizes::kThreads, 1)
    persist_kernel(const __grid_constant__ typename Body::Call call) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (!Body::Sizes::kCluster)  // is never launched there
#endif
    Body(call).run();
}

// The kernel of a tile, if there is one.
template <template <class, class> class Body, class Low>
Kernel kernel_of(int tile) {
  switch (tile) {
#define FASTSEQ_CASE(n, ...)                                                                         \
  case n: {                                                                                          \
    using Of = Body<Low, Tile<__VA_ARGS__>>;                                                         \
    if constexpr (Of::kExists) {                                                                     \
      return {reinterpret_cast<const void*>(&persist_kernel<Of>), Of::kShared, Of::Sizes::kCluster}; \
    }                                                                                                \
    break;                                                                                           \
  }
    FASTSEQ_PERSIST_TILES(FASTSEQ_CASE)
#undef FASTSEQ_CASE
  }
  return {nullptr, 0};
}

}  // namespace fastseq::cuda
