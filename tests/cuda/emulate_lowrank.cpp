// The persistent low-rank LSTM on the CPU, as emulate.cpp has the dense one.
#include <algorithm>

#include "tests/cuda/emulator_cluster.h"
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

// Calls f with the tile and the number type. FASTSEQ_ONLY_TILE keeps the other tiles out of a build; where it is -1,
// every tile is there, but for bfloat16 or for float16 alone, in turn.
template <class F>
bool with_tile(int tile, bool bfloat16, F f) {
  bool found = false;
#define FASTSEQ_CASE(n, ...)                                                            \
  if constexpr (FASTSEQ_ONLY_TILE == n || (FASTSEQ_ONLY_TILE < 0 && n % 2 == 0)) {      \
    if (tile == n && bfloat16) found = true, f(Bfloat16(), LowRankTile<__VA_ARGS__>()); \
  }                                                                                     \
  if constexpr (FASTSEQ_ONLY_TILE == n || (FASTSEQ_ONLY_TILE < 0 && n % 2 == 1)) {      \
    if (tile == n && !bfloat16) found = true, f(Float16(), LowRankTile<__VA_ARGS__>()); \
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
  return with_tile(tile, shape->bfloat16,
                   [&]<class Low, class Of>(Low, Of) { launch<LowRankForward<Low, Of>>(*shape, *direction, seed); });
}

int emulate_lowrank_backward(const PersistLowRankShape* shape, const PersistLowRankBackward* direction, int tile,
                             unsigned seed) {
  return with_tile(tile, shape->bfloat16,
                   [&]<class Low, class Of>(Low, Of) { launch<LowRankBackward<Low, Of>>(*shape, *direction, seed); });
}

int emulate_lowrank_tile(int tile, PersistLowRankTile* found) {
  const auto describe = [&]<class Low, class Of>(Low, Of) { *found = described<Of>(); };
  return with_tile(tile, true, describe) || with_tile(tile, false, describe);
}

}  // extern "C"
