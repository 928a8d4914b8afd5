#include "cuda/persist_lowrank_kernels.cuh"
// after the above
#include "cuda/persist_lowrank_backward.inl.h"

namespace fastseq::cuda {

Kernel lowrank_backward_bfloat16(int tile) { return lowrank_kernel_of<LowRankBackward, Bfloat16>(tile); }

}  // namespace fastseq::cuda
