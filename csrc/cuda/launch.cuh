// Kernels whose blocks of threads wait for each other: all of a launch are on the device at a time, or none.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/check.cuh"

namespace fastseq::cuda {

struct Kernel {
  const void* function;
  size_t shared;  // bytes that are asked for at launch
};

// Blocks that the device can hold at a time; 0 where one is too large for it, or cannot be launched together.
inline int64_t room(const Kernel& kernel, int threads) {
  int device = 0, processors = 0, together = 0, most = 0, each = 0;
  const auto ask = [&](int* found, cudaDeviceAttr what) { return cudaDeviceGetAttribute(found, what, device); };
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     ask(&together, cudaDevAttrCooperativeLaunch) == cudaSuccess &&
                     ask(&processors, cudaDevAttrMultiProcessorCount) == cudaSuccess &&
                     ask(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin) == cudaSuccess;
  const int shared = static_cast<int>(kernel.shared);
  if (!known || !together || shared > most ||
      cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared) != cudaSuccess ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel.function, threads, shared) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return int64_t{each} * processors;
}

// All blocks at a time or an error: a cooperative launch.
template <class Call>
const char* launch(const Kernel& kernel, Call call, int count, int threads, size_t words, cudaStream_t stream) {
  FASTSEQ_CHECK(cudaMemsetAsync(call.exchange, 0, words * sizeof(uint32_t), stream));
  FASTSEQ_CHECK(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(kernel.shared)));
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(call.blocks, call.groups, count);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = kernel.shared;
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = 1;
  void* arguments[] = {&call};
  FASTSEQ_CHECK(cudaLaunchKernelExC(&config, kernel.function, arguments));
  return nullptr;
}

}  // namespace fastseq::cuda
