// The persistent LSTM on the CPU, for tests: run by ctypes, or as a program of its own under the thread sanitizer.
#include <algorithm>

#include "tests/cuda/emulator_cluster.h"
// after the names of the device
#include "cuda/exchange.h"
#include "cuda/persist_plan.h"
// after those
#include "cuda/persist_cell.inl.h"
// and last
#include "cuda/persist_backward.inl.h"
#include "cuda/persist_forward.inl.h"

namespace fastseq::cuda {
namespace {

template <class Body>
void launch(const typename Body::Call& call, int count, unsigned seed) {
  constexpr int kThreads = Body::Sizes::kThreads;
  emulated::run(call.blocks, call.groups, count, kThreads, Body::kShared, seed, [&] { Body(call).run(); });
}

// Zeros that begin where 16 bytes can.
struct Exchange {
  std::vector<uint32_t> words;
  explicit Exchange(size_t size) : words(size + 4) {}
  uint32_t* aligned() {
    return reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(words.data()) + 15) / 16 * 16);
  }
};

template <class Of, class Low>
void forward(const PersistShape& shape, const PersistForward* directions, int count, unsigned seed) {
  const Grid grid = grid_of(shape, described<Of>());
  Exchange exchange(count * forward_words(grid, described<Of>()));
  ForwardCall call{shape, {}, exchange.aligned(), grid.blocks, grid.groups};
  std::copy(directions, directions + count, call.direction);
  launch<Forward<Low, Of>>(call, count, seed);
}

template <class Of, class Low>
void backward(const PersistShape& shape, const PersistBackward* directions, int count, unsigned seed) {
  const Grid grid = grid_of(shape, described<Of>());
  Exchange exchange(count * backward_words(grid, described<Of>()));
  BackwardCall call{shape, {}, exchange.aligned(), grid.blocks, grid.groups};
  std::copy(directions, directions + count, call.direction);
  launch<Backward<Low, Of>>(call, count, seed);
}

// Calls f with the tile; FASTSEQ_ONLY_TILE keeps the others out of a build.
#if !defined(FASTSEQ_ONLY_TILE)
#define FASTSEQ_ONLY_TILE -1
#endif
template <class F>
bool with_tile(int tile, F f) {
  bool found = false;
#define FASTSEQ_CASE(n, ...)                                       \
  if constexpr (FASTSEQ_ONLY_TILE < 0 || FASTSEQ_ONLY_TILE == n) { \
    if (tile == n) found = true, f(Tile<__VA_ARGS__>());           \
  }
  FASTSEQ_PERSIST_TILES(FASTSEQ_CASE)
#undef FASTSEQ_CASE
  return found;
}

}  // namespace
}  // namespace fastseq::cuda

using namespace fastseq::cuda;

extern "C" {

int emulate_forward(const PersistShape* shape, const PersistForward* directions, int count, int tile, unsigned seed) {
  return with_tile(tile, [&]<class Of>(Of) {
    if constexpr (Forward<Int8<Bfloat16>, Of>::kExists) {
      if (shape->int8) {
        shape->bfloat16 ? forward<Of, Int8<Bfloat16>>(*shape, directions, count, seed)
                        : forward<Of, Int8<Float16>>(*shape, directions, count, seed);
        return;
      }
    }
    shape->bfloat16 ? forward<Of, Bfloat16>(*shape, directions, count, seed)
                    : forward<Of, Float16>(*shape, directions, count, seed);
  });
}

int emulate_backward(const PersistShape* shape, const PersistBackward* directions, int count, int tile, unsigned seed) {
  return with_tile(tile, [&]<class Of>(Of) {
    shape->bfloat16 ? backward<Of, Bfloat16>(*shape, directions, count, seed)
                    : backward<Of, Float16>(*shape, directions, count, seed);
  });
}

int emulate_tile(int tile, PersistTile* found) {
  return with_tile(tile, [&]<class Of>(Of) { *found = described<Of>(); });
}

}  // extern "C"
