// The status of every call of the CUDA runtime, as text with the call's own words.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>

namespace fastseq::cuda {

inline thread_local char failure[256];

inline const char* failed(cudaError_t status, const char* call) {
  std::snprintf(failure, sizeof failure, "%s: %s (%s)", call, cudaGetErrorString(status), cudaGetErrorName(status));
  cudaGetLastError();  // or the next call that asks would be told of this one
  return failure;
}

#define FASTSEQ_CHECK(call) \
  if (const cudaError_t status = call; status != cudaSuccess) return failed(status, #call)

}  // namespace fastseq::cuda
