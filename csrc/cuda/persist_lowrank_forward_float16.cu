#include "cuda/persist_lowrank_kernels.cuh"
// after the above
#include "cuda/persist_lowrank_forward.inl.h"

namespace fastseq::cuda {

Kernel lowrank_forward_float16(int tile) { return lowrank_kernel_of<LowRankForward, Float16>(tile); }

}  // namespace fastseq::cuda
