#include "cuda/persist_kernels.cuh"
// after the above
#include "cuda/persist_forward.inl.h"

namespace fastseq::cuda {
namespace {

template <class Of>
__global__ void __launch_bounds__(Of::kThreads, 1) persist_kernel(const __grid_constant__ ForwardCall call) {
  Forward<Float16, Of>(call).run();
}

}  // namespace

Kernel forward_float16(int tile) {
  switch (tile) {
#define FASTSEQ_CASE(n, ...) \
  case n:                    \
    return {reinterpret_cast<const void*>(&persist_kernel<Tile<__VA_ARGS__>>), Tile<__VA_ARGS__>::kForwardShared};
    FASTSEQ_PERSIST_TILES(FASTSEQ_CASE)
#undef FASTSEQ_CASE
  }
  return {nullptr, 0};
}

}  // namespace fastseq::cuda
