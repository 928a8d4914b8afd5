// Sizes of a call, from its shape and a tile: the grid, and the scratch through which blocks speak.
#pragma once

#include <bit>

#include "cuda/lstm_persist.h"
#include "cuda/persist_tile.h"

namespace fastseq::cuda {

template <class Of>
constexpr PersistTile described() {
  return {Of::kUnits, Of::kRows, Of::kDepth, Of::kThreads, Of::kCluster, Of::kInt8Depth};
}

struct Grid {
  int blocks, groups;  // along the units, along the batch
};
inline Grid grid_of(const PersistShape& shape, const PersistTile& tile) {
  const auto blocks = static_cast<unsigned>((shape.H + tile.units - 1) / tile.units);
  return {static_cast<int>(tile.cluster ? std::bit_ceil(blocks) : blocks),
          static_cast<int>((shape.B + tile.rows - 1) / tile.rows)};
}

// Words of 32 bits, of one direction; for even and odd steps.
inline size_t forward_words(const Grid& grid, const PersistTile& tile) {
  return tile.cluster ? 0 : size_t{2} * grid.groups * tile.rows * grid.blocks * tile.units / 2;
}
inline size_t backward_words(const Grid& grid, const PersistTile& tile) {
  return tile.cluster ? 0 : size_t{2} * grid.groups * grid.blocks * grid.blocks * tile.rows * tile.units;
}

}  // namespace fastseq::cuda
