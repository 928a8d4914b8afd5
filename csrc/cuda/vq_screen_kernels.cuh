// One kernel for each number of pieces and depth; those of a type are compiled in a file of their own.
#pragma once

#include "cuda/copy.cuh"
#include "cuda/launch.cuh"
#include "cuda/vq_screen.h"
#include "cuda/vq_screen_tile.h"
// after the names of the device
#include "cuda/vq_screen.inl.h"

namespace fastseq::cuda {

struct ScreenKernel {
  const void* function;
  int threads, rows;  // of a block
  size_t shared;
};

ScreenKernel screen_bfloat16(int row_pieces, int code_pieces, int depth);
ScreenKernel screen_float16(int row_pieces, int code_pieces, int depth);
ScreenKernel screen_pieces(int row_pieces, int code_pieces, int depth);

template <class Low, class Sizes>
__global__ void __launch_bounds__(Sizes::kThreads, Sizes::kBlocks)
    vq_screen_kernel(const __grid_constant__ VqScreen call) {
  Screen<Low, Sizes>(call).run();
}

template <class Low, class Sizes>
ScreenKernel screen_of() {
  return {reinterpret_cast<const void*>(&vq_screen_kernel<Low, Sizes>), Sizes::kThreads, Sizes::kRows, Sizes::kShared};
}

#define FASTSEQ_SCREEN_CASE(row, code, depth_)                     \
  if (row_pieces == row && code_pieces == code && depth == depth_) \
    return screen_of<Low, ScreenTile<row, code, depth_>>();

}  // namespace fastseq::cuda
