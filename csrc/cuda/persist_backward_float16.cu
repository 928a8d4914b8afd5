#include "cuda/persist_kernels.cuh"
// after the above
#include "cuda/persist_backward.inl.h"

namespace fastseq::cuda {

Kernel backward_float16(int tile) { return kernel_of<Backward, Float16>(tile); }

}  // namespace fastseq::cuda
