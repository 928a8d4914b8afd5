// Kernels whose blocks of threads wait for each other: all of a launch, or all of a cluster, are on the device at a
// time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/check.cuh"

namespace fastseq::cuda {

struct Kernel {
  const void* function;
  size_t shared;         // bytes that are asked for at launch
  bool cluster = false;  // blocks along x are a cluster
};

inline cudaLaunchConfig_t config_of(const Kernel& kernel, dim3 grid, int threads, cudaLaunchAttribute& together,
                                    cudaStream_t stream) {
  if (kernel.cluster) {
    together.id = cudaLaunchAttributeClusterDimension;
    together.val.clusterDim.x = grid.x, together.val.clusterDim.y = 1, together.val.clusterDim.z = 1;
  } else {
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = kernel.shared;
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = 1;
  return config;
}

// What a kernel must be allowed before it is asked about or launched.
inline cudaError_t allow(const Kernel& kernel, unsigned blocks) {
  const cudaError_t status = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                  static_cast<int>(kernel.shared));
  if (status != cudaSuccess || !kernel.cluster || blocks <= 8) return status;
  return cudaFuncSetAttribute(kernel.function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

// Blocks that the device can hold at a time, where `blocks` of them are a cluster if there are any; 0 where one is too
// large for it, or they cannot be launched together.
inline int64_t room(const Kernel& kernel, int threads, int blocks = 1) {
  int device = 0, processors = 0, together = 0, most = 0, each = 0, major = 0;
  const auto ask = [&](int* found, cudaDeviceAttr what) { return cudaDeviceGetAttribute(found, what, device); };
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     ask(&major, cudaDevAttrComputeCapabilityMajor) == cudaSuccess &&
                     ask(&together, cudaDevAttrCooperativeLaunch) == cudaSuccess &&
                     ask(&processors, cudaDevAttrMultiProcessorCount) == cudaSuccess &&
                     ask(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin) == cudaSuccess;
  const int shared = static_cast<int>(kernel.shared);
  if (!known || kernel.function == nullptr || (kernel.cluster ? major < 9 : !together) || shared > most) return 0;
  cudaLaunchAttribute attribute{};
  const cudaLaunchConfig_t config = config_of(kernel, dim3(blocks), threads, attribute, nullptr);
  cudaError_t status = allow(kernel, blocks);
  if (status == cudaSuccess) {
    status = kernel.cluster ? cudaOccupancyMaxActiveClusters(&each, kernel.function, &config)
                            : cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel.function, threads, shared);
  }
  if (status != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return int64_t{each} * (kernel.cluster ? blocks : processors);
}

// Sets `words` of the call's exchange to zero and starts it; all blocks that wait for each other at a time, or an
// error.
template <class Call>
const char* launch(const Kernel& kernel, Call call, int count, int threads, size_t words, cudaStream_t stream) {
  if (words > 0) FASTSEQ_CHECK(cudaMemsetAsync(call.exchange, 0, words * sizeof(uint32_t), stream));
  FASTSEQ_CHECK(allow(kernel, call.blocks));
  cudaLaunchAttribute together{};
  const cudaLaunchConfig_t config = config_of(kernel, dim3(call.blocks, call.groups, count), threads, together, stream);
  void* arguments[] = {&call};
  FASTSEQ_CHECK(cudaLaunchKernelExC(&config, kernel.function, arguments));
  return nullptr;
}

}  // namespace fastseq::cuda
