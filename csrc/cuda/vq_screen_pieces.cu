#include "cuda/vq_screen_kernels.cuh"

namespace fastseq::cuda {

ScreenKernel screen_pieces(int row_pieces, int code_pieces, int depth) {
  using Low = Bfloat16;
  FASTSEQ_SCREEN_MORE(FASTSEQ_SCREEN_CASE)
  return {};
}

}  // namespace fastseq::cuda
