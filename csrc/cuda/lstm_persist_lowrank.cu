#include "cuda/lstm_persist_lowrank.h"

#include "cuda/launch.cuh"
#include "cuda/persist_lowrank_kernels.cuh"
// after the names of the device
#include "cuda/persist_lowrank_backward.inl.h"
#include "cuda/persist_lowrank_forward.inl.h"

namespace fastseq::cuda {
namespace {

constexpr PersistLowRankTile kTiles[] = {
#define FASTSEQ_TILE(n, ...)                                                                           \
  {LowRankTile<__VA_ARGS__>::kUnits, LowRankTile<__VA_ARGS__>::kRows, LowRankTile<__VA_ARGS__>::kRank, \
   LowRankTile<__VA_ARGS__>::kDowns, LowRankTile<__VA_ARGS__>::kThreads},
    FASTSEQ_LOWRANK_TILES(FASTSEQ_TILE)
#undef FASTSEQ_TILE
};

Kernel forward_kernel(const PersistShape& shape, int tile) {
  return shape.bfloat16 ? lowrank_forward_bfloat16(tile) : lowrank_forward_float16(tile);
}
Kernel backward_kernel(const PersistShape& shape, int tile) {
  return shape.bfloat16 ? lowrank_backward_bfloat16(tile) : lowrank_backward_float16(tile);
}

bool is_tile(int tile) { return tile >= 0 && tile < persist_lowrank_tiles(); }

const char* refused(const PersistLowRankShape& shape, int tile) {
  if (!is_tile(tile)) return "there is no such tile";
  if (shape.T < 1 || shape.B < 1 || shape.H < 1 || shape.rank < 1) return "T, B, H and rank must be at least 1";
  if (shape.T > INT32_MAX || shape.B > INT32_MAX || shape.H > INT32_MAX) return "T, B and H must be less than 2**31";
  if (shape.rank > kTiles[tile].rank) return "rank is larger than the tile's";
  if (shape.downs != kTiles[tile].downs) return "downs is not the tile's";
  return nullptr;
}

template <class Call, class Direction>
const char* started(const Kernel& kernel, const PersistLowRankShape& shape, const Direction& direction, int tile,
                    void* scratch, void* stream) {
  const PersistLowRankTile& of = kTiles[tile];
  const LowRankGrid grid = grid_of(shape, of);
  const Call call{shape, direction, static_cast<uint32_t*>(scratch), grid.blocks, grid.groups};
  return launch(kernel, call, 1, static_cast<int>(of.threads), exchange_words(grid, of),
                static_cast<cudaStream_t>(stream));
}

}  // namespace

int persist_lowrank_tiles() { return sizeof kTiles / sizeof *kTiles; }
PersistLowRankTile persist_lowrank_tile(int tile) { return is_tile(tile) ? kTiles[tile] : PersistLowRankTile{}; }

size_t persist_lowrank_scratch(const PersistLowRankShape& shape, int tile) {
  return is_tile(tile) ? 4 * exchange_words(grid_of(shape, kTiles[tile]), kTiles[tile]) : 0;
}

int64_t persist_lowrank_blocks(const PersistLowRankShape& shape, int tile) {
  if (!is_tile(tile)) return 0;
  const LowRankGrid grid = grid_of(shape, kTiles[tile]);
  return int64_t{grid.blocks} * grid.groups;
}
int64_t persist_lowrank_forward_room(const PersistLowRankShape& shape, int tile) {
  return is_tile(tile) ? room(forward_kernel(shape, tile), static_cast<int>(kTiles[tile].threads)) : 0;
}
int64_t persist_lowrank_backward_room(const PersistLowRankShape& shape, int tile) {
  return is_tile(tile) ? room(backward_kernel(shape, tile), static_cast<int>(kTiles[tile].threads)) : 0;
}

const char* persist_lowrank_forward(const PersistLowRankShape& shape, const PersistLowRankForward& direction, int tile,
                                    void* scratch, void* stream) noexcept {
  if (const char* const why = refused(shape, tile)) return why;
  return started<LowRankForwardCall>(forward_kernel(shape, tile), shape, direction, tile, scratch, stream);
}

const char* persist_lowrank_backward(const PersistLowRankShape& shape, const PersistLowRankBackward& direction,
                                     int tile, void* scratch, void* stream) noexcept {
  if (const char* const why = refused(shape, tile)) return why;
  return started<LowRankBackwardCall>(backward_kernel(shape, tile), shape, direction, tile, scratch, stream);
}

}  // namespace fastseq::cuda
