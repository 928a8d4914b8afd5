// What one block of threads owns: kUnits units with their four gates, so 4 * kUnits rows of weight_hh, and up to kRows
// rows of the batch. The rows of weight_hh are tiles of 16 x 16 for the matrix instruction, of which every warp holds
// kTiles: the first kInRegisters where their name says, the others in shared memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/fragment.h"

namespace fastseq::cuda {

FASTSEQ_BOTH constexpr int least(int a, int b) { return a < b ? a : b; }

// Bands of 16 rows; the warps that share a band, each with its part of the depth; tiles of a warp in registers and in
// shared memory; blocks of 8 rows of the batch; whether the blocks of threads of a row are a cluster, which needs no
// scratch: they write into each other's shared memory.
template <int Bands, int Parts, int InRegisters, int InShared, int RowBlocks, int Cluster>
struct Tile {
  static constexpr bool kCluster = Cluster;
  static constexpr int kBands = Bands, kParts = Parts, kInRegisters = InRegisters, kInShared = InShared;
  static constexpr int kRowBlocks = RowBlocks, kTiles = InRegisters + InShared;
  static constexpr int kWarps = Bands * Parts, kThreads = 32 * kWarps;
  static constexpr int kUnits = 4 * Bands, kRows = 8 * RowBlocks, kDepth = 16 * Parts * kTiles;
  static constexpr int kSharedTiles = kWarps * InShared * 256;  // 16-bit numbers
  // With int8 weights, of which a tile holds twice as many; 0 where there are no such kernels.
  static constexpr int kInt8Depth = InShared || (Cluster && 2 * kDepth / kUnits > 16) ? 0 : 2 * kDepth;
  // A row of h in shared memory, 8 numbers longer than it need be: rows begin in different banks.
  static constexpr int kStride = kDepth + 8;
  // With several parts there is a barrier after the last reading of h anyway, else h has two places.
  static constexpr int kStates = Parts > 1 ? 1 : 2;
  static constexpr size_t kArrivals = Cluster ? 2 * sizeof(uint64_t) : 0;  // bytes, before all else
  static constexpr int kSums = Bands * (Parts - 1) * RowBlocks * 128;      // float32, from parts to the first of a band
  static constexpr size_t kForwardShared = kArrivals + sizeof(uint16_t) * (kSharedTiles + kStates * kRows * kStride) +
                                           sizeof(float) * kSums + sizeof(int) * kRows;

  // Backward multiplies by the transpose: bands of 16 of the depth, each Bands tiles deep.
  static constexpr int kBackwardBands = kTiles / Bands;  // of a warp
  static constexpr int kGates = 4 * kUnits, kGateStride = kGates + 8;
  // Sums that one block has for another, and room in shared memory for those of two steps and all blocks of a cluster.
  // A thread adds up four neighbours over every kAdders-th block.
  static constexpr int kPart = kRows * kUnits, kRoom = Cluster ? 2 * kDepth / kUnits * kPart : 0;
  static constexpr int kAdders = kThreads / (kPart / 4);
  static constexpr size_t kBackwardShared = kArrivals + sizeof(float) * (kRoom + kAdders * kPart) +
                                            sizeof(uint16_t) * (kSharedTiles + kRows * kGateStride) +
                                            sizeof(int) * kRows;
  static constexpr int kCells = (kUnits * kRows + kThreads - 1) / kThreads;  // of a thread
  // The sum of a unit and a row among those. They lie as the lanes of a warp hold D, four words of a lane side by side,
  // but turned such that the 32 units of a row lie in different banks: lanes by columns, and odd bands with neighbours
  // in each other's place.
  FASTSEQ_BOTH static constexpr int place_in_part(int unit, int row) {
    const int lane = row % 8 / 2 * 8 + unit % 8, number = row % 2 + 2 * (unit % 16 / 8);
    return ((unit / 16 * kRowBlocks + row / 8) * 32 + lane) * 4 + (number ^ (unit / 16 & 1));
  }
  // Of the two rows that four neighbours belong to.
  FASTSEQ_BOTH static constexpr int first_row_of(int quad) { return 8 * (quad / 32 % kRowBlocks) + quad % 32 / 8 * 2; }
  static_assert(kAdders * kPart == 4 * kThreads, "every thread has four sums");
  static_assert(!Cluster || (Parts == 1 && kDepth / kUnits <= 16), "what a cluster can be, and two places for h");
  static_assert(kTiles % 2 == 0 && kTiles % Bands == 0 && Bands % 2 == 0, "two tiles are read at a time");
};

// Chosen by depth; among those of one depth, by rows. Registers of a warp hold 32 tiles (16 where 16 warps share them).
#define FASTSEQ_PERSIST_TILES(X) \
  X(0, 8, 1, 16, 0, 1, 0)        \
  X(1, 8, 1, 16, 0, 2, 0)        \
  X(2, 8, 1, 16, 0, 4, 0)        \
  X(3, 8, 1, 32, 0, 1, 0)        \
  X(4, 8, 1, 32, 0, 2, 0)        \
  X(5, 8, 1, 32, 0, 4, 0)        \
  X(6, 4, 2, 32, 0, 1, 0)        \
  X(7, 4, 2, 32, 0, 2, 0)        \
  X(8, 4, 2, 32, 0, 4, 0)        \
  X(9, 4, 2, 32, 32, 1, 0)       \
  X(10, 4, 2, 32, 32, 2, 0)      \
  X(11, 8, 1, 16, 0, 1, 1)       \
  X(12, 8, 1, 16, 0, 2, 1)       \
  X(13, 8, 1, 16, 0, 4, 1)       \
  X(14, 8, 1, 32, 0, 1, 1)       \
  X(15, 8, 1, 32, 0, 2, 1)       \
  X(16, 8, 1, 32, 0, 4, 1)

}  // namespace fastseq::cuda
