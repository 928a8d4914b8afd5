#include "cuda/vq_lookup.h"

#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "cuda/vq_plan.h"
// after the names of the device
#include "cuda/vq_lookup.inl.h"

namespace fastseq::cuda {
namespace {

__global__ void __launch_bounds__(kVqThreads, 3) vq_lookup_kernel(const __grid_constant__ LookupCall call) {
  Lookup(call).run();
}

Kernel kernel_of(const VqLookup& call) {
  return {reinterpret_cast<const void*>(&vq_lookup_kernel), vq_shared(call.D, call.levels)};
}

const char* refused(const VqLookup& call, int parts) {
  if (call.G < 1 || call.N < 1 || call.D < 1) return "G, N and D must be at least 1";
  if (call.levels < 1 || call.levels > kVqMostLevels) return "there must be 1 to 32 levels";
  if (call.D > kVqMostD) return "D must be at most 512";
  if (parts < 1 || parts > kVqMostParts) return "parts must lie in 1 .. 64";
  for (int m = 0; m < call.levels; ++m) {
    if (call.level[m].K < 1 || call.level[m].K > INT32_MAX) return "K must lie in 1 .. 2**31 - 1";
  }
  if (row_groups(call) * call.G > INT32_MAX) return "there are too many rows";
  return nullptr;
}

}  // namespace

int vq_lookup_parts(const VqLookup& call) {
  if (refused(call, 1)) return 0;
  const int64_t each = room(kernel_of(call), kVqThreads) / (row_groups(call) * call.G);
  return static_cast<int>(std::min({each, most_parts(call), int64_t{kVqMostParts}}));
}

size_t vq_lookup_scratch(const VqLookup& call, int parts) { return 4 * lookup_words(call, parts); }

const char* vq_lookup(const VqLookup& call, int parts, void* scratch, void* stream) noexcept {
  if (const char* const why = refused(call, parts)) return why;
  const LookupCall given{call, static_cast<uint32_t*>(scratch), parts, static_cast<int>(row_groups(call))};
  return launch(kernel_of(call), given, static_cast<int>(call.G), kVqThreads, lookup_words(call, parts),
                static_cast<cudaStream_t>(stream));
}

}  // namespace fastseq::cuda
