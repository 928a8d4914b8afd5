// What one block of threads owns: kUnits units with their four gates, so 4 * kUnits rows of weight_hh, and up to kRows
// rows of the batch. The rows of weight_hh are tiles of 16 x 16 for the matrix instruction, of which every warp holds
// kTiles: the first kInRegisters where their name says, the others in shared memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastseq::cuda {

// Bands of 16 rows; the warps that share a band, each with its part of the depth; tiles of a warp in registers and in
// shared memory; blocks of 8 rows of the batch.
template <int Bands, int Parts, int InRegisters, int InShared, int RowBlocks>
struct Tile {
  static constexpr int kBands = Bands, kParts = Parts, kInRegisters = InRegisters, kInShared = InShared;
  static constexpr int kRowBlocks = RowBlocks, kTiles = InRegisters + InShared;
  static constexpr int kWarps = Bands * Parts, kThreads = 32 * kWarps;
  static constexpr int kUnits = 4 * Bands, kRows = 8 * RowBlocks, kDepth = 16 * Parts * kTiles;
  static constexpr int kSharedTiles = kWarps * InShared * 256;  // 16-bit numbers
  // A row of h in shared memory, 8 numbers longer than it need be: rows begin in different banks.
  static constexpr int kStride = kDepth + 8;
  // With several parts there is a barrier after the last reading of h anyway, else h has two places.
  static constexpr int kStates = Parts > 1 ? 1 : 2;
  static constexpr int kSums = Bands * (Parts - 1) * RowBlocks * 128;  // float32, from parts to the first of a band
  static constexpr size_t kForwardShared =
      sizeof(uint16_t) * (kSharedTiles + kStates * kRows * kStride) + sizeof(float) * kSums + sizeof(int) * kRows;

  // Backward multiplies by the transpose: bands of 16 of the depth, each Bands tiles deep.
  static constexpr int kBackwardBands = kTiles / Bands;  // of a warp
  static constexpr int kGates = 4 * kUnits, kGateStride = kGates + 8;
  static constexpr size_t kBackwardShared =
      sizeof(uint16_t) * (kSharedTiles + 2 * kRows * kGateStride) + sizeof(int) * kRows;
  static constexpr int kCells = (kUnits * kRows + kThreads - 1) / kThreads;  // of a thread
  static_assert(kTiles % 2 == 0 && kTiles % Bands == 0 && Bands % 2 == 0, "two tiles are read at a time");
};

// Chosen by depth; among those of one depth, by rows. Registers of a warp hold 32 tiles (16 where 16 warps share them).
#define FASTSEQ_PERSIST_TILES(X) \
  X(0, 8, 1, 16, 0, 1)           \
  X(1, 8, 1, 16, 0, 2)           \
  X(2, 8, 1, 16, 0, 4)           \
  X(3, 8, 1, 32, 0, 1)           \
  X(4, 8, 1, 32, 0, 2)           \
  X(5, 8, 1, 32, 0, 4)           \
  X(6, 4, 2, 32, 0, 1)           \
  X(7, 4, 2, 32, 0, 2)           \
  X(8, 4, 2, 32, 0, 4)           \
  X(9, 4, 2, 32, 32, 1)          \
  X(10, 4, 2, 32, 32, 2)

}  // namespace fastseq::cuda
