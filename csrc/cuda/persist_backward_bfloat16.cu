#include "cuda/persist_kernels.cuh"
// after the above
#include "cuda/persist_backward.inl.h"

namespace fastseq::cuda {

Kernel backward_bfloat16(int tile) { return kernel_of<Backward, Bfloat16>(tile); }

}  // namespace fastseq::cuda
