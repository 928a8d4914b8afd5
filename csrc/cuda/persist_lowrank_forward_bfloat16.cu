#include "cuda/persist_lowrank_kernels.cuh"
// after the above
#include "cuda/persist_lowrank_forward.inl.h"

namespace fastseq::cuda {

Kernel lowrank_forward_bfloat16(int tile) { return lowrank_kernel_of<LowRankForward, Bfloat16>(tile); }

}  // namespace fastseq::cuda
