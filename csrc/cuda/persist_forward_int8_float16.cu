#include "cuda/persist_kernels.cuh"
// after the above
#include "cuda/persist_forward.inl.h"

namespace fastseq::cuda {

Kernel forward_int8_float16(int tile) { return kernel_of<Forward, Int8<Float16>>(tile); }

}  // namespace fastseq::cuda
