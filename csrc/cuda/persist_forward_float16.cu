#include "cuda/persist_kernels.cuh"
// after the above
#include "cuda/persist_forward.inl.h"

namespace fastseq::cuda {

Kernel forward_float16(int tile) { return kernel_of<Forward, Float16>(tile); }

}  // namespace fastseq::cuda
