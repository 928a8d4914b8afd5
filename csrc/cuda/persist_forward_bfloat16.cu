#include "cuda/persist_kernels.cuh"
// after the above
#include "cuda/persist_forward.inl.h"

namespace fastseq::cuda {

Kernel forward_bfloat16(int tile) { return kernel_of<Forward, Bfloat16>(tile); }

}  // namespace fastseq::cuda
