#include "cuda/vq_screen.h"

#include "cuda/vq_screen_kernels.cuh"

namespace fastseq::cuda {
namespace {

ScreenKernel kernel_of(const VqScreen& call) {
  const int rows = screen_row_pieces(call.products), codes = screen_code_pieces(call.products);
  const int depth = screen_depth(call.width);
  if (call.products > 1) return screen_pieces(rows, codes, depth);
  return call.piece == Number::f16 ? screen_float16(rows, codes, depth) : screen_bfloat16(rows, codes, depth);
}

const char* refused(const VqScreen& call) {
  if (call.G < 1 || call.N < 1 || call.D < 1 || call.K < 1) return "G, N, D and K must be at least 1";
  if (call.D > kScreenMostD) return "D must be at most 256";
  if (call.G > 65535) return "G must be at most 65535";
  if (call.N > INT32_MAX || call.K > INT32_MAX - kScreenCodes) return "N and K must be less than 2**31 - 128";
  if (call.products < 1 || call.products > 3) return "products must be 1, 2 or 3";
  if (call.width != screen_width(call.D)) return "width must be the least of 64, 128 and 256 that is not below D";
  if (call.products < 3 && (call.D % 2 || reinterpret_cast<uintptr_t>(call.x) % 4)) {
    return "every two numbers of x must be readable together: D even, x 4-byte aligned";
  }
  return nullptr;
}

}  // namespace

bool vq_screen_fits(const VqScreen& call) {
  if (refused(call)) return false;
  const ScreenKernel kernel = kernel_of(call);
  int device = 0, most = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess &&
         kernel.shared <= static_cast<size_t>(most);
}

const char* vq_screen(const VqScreen& call, void* stream) noexcept {
  if (const char* const why = refused(call)) return why;
  const ScreenKernel kernel = kernel_of(call);
  const auto on = static_cast<cudaStream_t>(stream);
  FASTSEQ_CHECK(cudaMemsetAsync(call.count, 0, call.G * sizeof(int32_t), on));
  FASTSEQ_CHECK(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(kernel.shared)));
  VqScreen given = call;
  void* arguments[] = {&given};
  const dim3 grid(static_cast<unsigned>((call.N + kernel.rows - 1) / kernel.rows), static_cast<unsigned>(call.G));
  FASTSEQ_CHECK(cudaLaunchKernel(kernel.function, grid, dim3(kernel.threads), arguments, kernel.shared, on));
  return nullptr;
}

}  // namespace fastseq::cuda
