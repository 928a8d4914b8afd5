#include "cuda/lstm_persist.h"

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/persist_kernels.cuh"
#include "cuda/persist_plan.h"
// after the names of the device
#include "cuda/persist_backward.inl.h"
#include "cuda/persist_forward.inl.h"

namespace fastseq::cuda {
namespace {

constexpr int kMostGroups = 65535;  // of blocks along the second dimension of a launch
constexpr PersistTile kTiles[] = {
#define FASTSEQ_TILE(n, ...) described<Tile<__VA_ARGS__>>(),
    FASTSEQ_PERSIST_TILES(FASTSEQ_TILE)
#undef FASTSEQ_TILE
};

Kernel forward_kernel(const PersistShape& shape, int tile) {
  if (shape.int8) return shape.bfloat16 ? forward_int8_bfloat16(tile) : forward_int8_float16(tile);
  return shape.bfloat16 ? forward_bfloat16(tile) : forward_float16(tile);
}
Kernel backward_kernel(const PersistShape& shape, int tile) {
  return shape.bfloat16 ? backward_bfloat16(tile) : backward_float16(tile);
}

int64_t room_of(const Kernel& kernel, const PersistShape& shape, int tile) {
  const Grid grid = grid_of(shape, kTiles[tile]);
  return grid.groups > kMostGroups ? 0 : room(kernel, static_cast<int>(kTiles[tile].threads), grid.blocks);
}

bool is_tile(int tile) { return tile >= 0 && tile < persist_tiles(); }

const char* refused(const PersistShape& shape, int count, int tile) {
  if (!is_tile(tile)) return "there is no such tile";
  if (count < 1 || count > 2) return "one or two directions can be run";
  if (shape.T < 1 || shape.B < 1 || shape.H < 1) return "T, B and H must be at least 1";
  if (shape.T > INT32_MAX || shape.B > INT32_MAX / shape.H) return "T and B * H must be less than 2**31";
  if (shape.H > (shape.int8 ? kTiles[tile].int8_depth : kTiles[tile].depth)) return "H is larger than the tile's depth";
  if (grid_of(shape, kTiles[tile]).groups > kMostGroups) return "B is larger than 65535 times the tile's rows";
  return nullptr;
}

}  // namespace

int persist_tiles() { return sizeof kTiles / sizeof *kTiles; }
PersistTile persist_tile(int tile) { return is_tile(tile) ? kTiles[tile] : PersistTile{}; }

size_t persist_forward_scratch(const PersistShape& shape, int tile, int directions) {
  return is_tile(tile) ? directions * 4 * forward_words(grid_of(shape, kTiles[tile]), kTiles[tile]) : 0;
}
size_t persist_backward_scratch(const PersistShape& shape, int tile, int directions) {
  return is_tile(tile) ? directions * 4 * backward_words(grid_of(shape, kTiles[tile]), kTiles[tile]) : 0;
}

int64_t persist_blocks(const PersistShape& shape, int tile, int directions) {
  if (!is_tile(tile)) return 0;
  const Grid grid = grid_of(shape, kTiles[tile]);
  return kTiles[tile].cluster ? grid.blocks : int64_t{grid.blocks} * grid.groups * directions;
}
int64_t persist_forward_room(const PersistShape& shape, int tile) {
  return is_tile(tile) ? room_of(forward_kernel(shape, tile), shape, tile) : 0;
}
int64_t persist_backward_room(const PersistShape& shape, int tile) {
  return is_tile(tile) ? room_of(backward_kernel(shape, tile), shape, tile) : 0;
}

const char* persist_forward(const PersistShape& shape, const PersistForward* directions, int count, int tile,
                            void* scratch, void* stream) noexcept {
  if (const char* const why = refused(shape, count, tile)) return why;
  const PersistTile& of = kTiles[tile];
  const Grid grid = grid_of(shape, of);
  ForwardCall call{shape, {}, static_cast<uint32_t*>(scratch), grid.blocks, grid.groups};
  std::copy(directions, directions + count, call.direction);
  return launch(forward_kernel(shape, tile), call, count, static_cast<int>(of.threads), count * forward_words(grid, of),
                static_cast<cudaStream_t>(stream));
}

const char* persist_backward(const PersistShape& shape, const PersistBackward* directions, int count, int tile,
                             void* scratch, void* stream) noexcept {
  if (shape.int8) return "int8 weights have no backward";
  if (const char* const why = refused(shape, count, tile)) return why;
  const PersistTile& of = kTiles[tile];
  const Grid grid = grid_of(shape, of);
  BackwardCall call{shape, {}, static_cast<uint32_t*>(scratch), grid.blocks, grid.groups};
  std::copy(directions, directions + count, call.direction);
  return launch(backward_kernel(shape, tile), call, count, static_cast<int>(of.threads),
                count * backward_words(grid, of), static_cast<cudaStream_t>(stream));
}

}  // namespace fastseq::cuda
