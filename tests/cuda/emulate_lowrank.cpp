// The persistent low-rank LSTM on the CPU, as emulate.cpp has the dense one.
#include <algorithm>

#include "tests/cuda/emulator.h"
// after the names of the device
#include "cuda/exchange.h"
#include "cuda/persist_lowrank_tile.h"
// after those
#include "cuda/persist_cell.inl.h"
#include "cuda/persist_lowrank_sums.inl.h"
// and last
#include "cuda/persist_lowrank_backward.inl.h"
#include "cuda/persist_lowrank_forward.inl.h"

namespace fastseq::cuda {
namespace {

template <class Of>
PersistLowRankTile described() {
  return {Of::kUnits, Of::kRows, Of::kRank, Of::kDowns, Of::kThreads};
}

template <class Body, class Direction>
void launch(const PersistLowRankShape& shape, const Direction& direction, unsigned seed) {
  using Of = typename Body::Sizes;
  const LowRankGrid grid = grid_of(shape, described<Of>());
  std::vector<uint32_t> exchange(exchange_words(grid, described<Of>()));
  const typename Body::Call call{shape, direction, exchange.data(), grid.blocks, grid.groups};
  emulated::run(grid.blocks, grid.groups, 1, Of::kThreads, Body::kShared, seed, [&] { Body(call).run(); });
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
    if (tile == n) found = true, f(LowRankTile<__VA_ARGS__>());    \
  }
  FASTSEQ_LOWRANK_TILES(FASTSEQ_CASE)
#undef FASTSEQ_CASE
  return found;
}

}  // namespace
}  // namespace fastseq::cuda

using namespace fastseq::cuda;

extern "C" {

int emulate_lowrank_forward(const PersistLowRankShape* shape, const PersistLowRankForward* direction, int tile,
                            unsigned seed) {
  return with_tile(tile, [&]<class Of>(Of) {
    shape->bfloat16 ? launch<LowRankForward<Bfloat16, Of>>(*shape, *direction, seed)
                    : launch<LowRankForward<Float16, Of>>(*shape, *direction, seed);
  });
}

int emulate_lowrank_backward(const PersistLowRankShape* shape, const PersistLowRankBackward* direction, int tile,
                             unsigned seed) {
  return with_tile(tile, [&]<class Of>(Of) {
    shape->bfloat16 ? launch<LowRankBackward<Bfloat16, Of>>(*shape, *direction, seed)
                    : launch<LowRankBackward<Float16, Of>>(*shape, *direction, seed);
  });
}

int emulate_lowrank_tile(int tile, PersistLowRankTile* found) {
  return with_tile(tile, [&]<class Of>(Of) { *found = described<Of>(); });
}

}  // extern "C"
