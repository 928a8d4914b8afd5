// What one block of threads owns of a low-rank LSTM: kUnits units with their four gates, so their rows of up and their
// columns of down, and up to kRows rows of the batch. All of it lies in registers: every warp has 16 units, as tiles of
// 16 x 16 for the matrix instruction.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/lstm_persist_lowrank.h"

namespace fastseq::cuda {

// Numbers between the factors, of a gate; how many gates have such numbers of their own, else all share them; blocks of
// 8 rows of the batch.
template <int Rank, int Downs, int RowBlocks>
struct LowRankTile {
  static constexpr bool kCluster = false;
  static constexpr int kRank = Rank, kDowns = Downs, kRowBlocks = RowBlocks;
  static constexpr int kWarps = 8, kThreads = 32 * kWarps, kUnits = 16 * kWarps, kRows = 8 * RowBlocks;
  static constexpr int kRankTiles = Rank / 16;  // of a gate
  static constexpr int kSums = Downs * Rank;    // numbers of a row that go from each block to all
  static constexpr int kSumTiles = kSums / 16, kPieces = kSumTiles * RowBlocks;
  // Words of other blocks that a thread has on their way at a time, beside the tiles in its registers.
  static constexpr int kTiles = 4 * kRankTiles + kSumTiles, kAhead = kTiles >= 40 ? 4 : kTiles >= 32 ? 8 : 16;
  static constexpr int kEntries = kSums * kRows;  // of a block
  static constexpr int kStride = kSums + 8;       // of a row of them: rows begin in different banks
  static constexpr size_t kShared =
      sizeof(float) * kWarps * kEntries + sizeof(uint16_t) * kRows * kStride + sizeof(int) * kRows;
  static_assert(kSumTiles % 2 == 0 && kEntries % kThreads == 0, "two tiles are read at a time");
};

// Chosen by downs, then by rank, then by rows.
#define FASTSEQ_LOWRANK_TILES(X) \
  X(0, 32, 1, 1)                 \
  X(1, 32, 1, 2)                 \
  X(2, 32, 1, 4)                 \
  X(3, 64, 1, 1)                 \
  X(4, 64, 1, 2)                 \
  X(5, 128, 1, 1)                \
  X(6, 16, 4, 1)                 \
  X(7, 16, 4, 2)                 \
  X(8, 32, 4, 1)                 \
  X(9, 32, 4, 2)                 \
  X(10, 64, 4, 1)

// The grid of a call, and its scratch in words of 32 bits, for even and odd steps; one block has none to speak to.
struct LowRankGrid {
  int blocks, groups;  // along the units, along the batch
};
inline LowRankGrid grid_of(const PersistShape& shape, const PersistLowRankTile& tile) {
  return {static_cast<int>((shape.H + tile.units - 1) / tile.units),
          static_cast<int>((shape.B + tile.rows - 1) / tile.rows)};
}
inline size_t exchange_words(const LowRankGrid& grid, const PersistLowRankTile& tile) {
  return grid.blocks == 1 ? 4 : size_t{2} * grid.groups * grid.blocks * tile.rows * tile.downs * tile.rank;
}

}  // namespace fastseq::cuda
