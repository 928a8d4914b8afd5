// The lookup of few rows on the CPU, for tests: run by ctypes, or as a program of its own under the thread sanitizer.
#include <algorithm>

#include "tests/cuda/emulator.h"
// after the names of the device
#include "cuda/vq_plan.h"
// and last
#include "cuda/vq_lookup.inl.h"

using namespace fastseq::cuda;

extern "C" {

int emulate_vq_most_parts(const VqLookup* of) {
  return static_cast<int>(std::min(most_parts(*of), int64_t{kVqMostParts}));
}

void emulate_vq_lookup(const VqLookup* of, int parts, unsigned seed) {
  std::vector<uint32_t> exchange(lookup_words(*of, parts) + 4);
  auto* const aligned = reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(exchange.data()) + 15) / 16 * 16);
  const int groups = static_cast<int>(row_groups(*of)), count = static_cast<int>(of->G);
  const LookupCall call{*of, aligned, parts, groups};
  const size_t shared = vq_shared(of->D, of->levels);
  emulated::run(parts, groups, count, kVqThreads, shared, seed, [&] { Lookup(call).run(); });
}

}  // extern "C"
