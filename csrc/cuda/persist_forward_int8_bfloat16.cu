#include "cuda/persist_kernels.cuh"
// after the above
#include "cuda/persist_forward.inl.h"

namespace fastseq::cuda {

Kernel forward_int8_bfloat16(int tile) { return kernel_of<Forward, Int8<Bfloat16>>(tile); }

}  // namespace fastseq::cuda
