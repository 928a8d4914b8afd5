// What a block of each tile takes, one line each: its type and its sizes, by which the names of kernels have it; its
// own name; threads, and bytes of shared memory that are asked for at launch, forward and backward.
#include <cstdio>

#include "cuda/persist_lowrank_tile.h"
#include "cuda/persist_tile.h"

int main() {
#define FASTSEQ_LINE(n, ...)                                                                        \
  {                                                                                                 \
    using Of = fastseq::cuda::Tile<__VA_ARGS__>;                                                    \
    std::printf("Tile;" #__VA_ARGS__ ";tile " #n ";%d;%zu;%zu\n", Of::kThreads, Of::kForwardShared, \
                Of::kBackwardShared);                                                               \
  }
  FASTSEQ_PERSIST_TILES(FASTSEQ_LINE)
#undef FASTSEQ_LINE
#define FASTSEQ_LINE(n, ...)                                                                                      \
  {                                                                                                               \
    using Of = fastseq::cuda::LowRankTile<__VA_ARGS__>;                                                           \
    std::printf("LowRankTile;" #__VA_ARGS__ ";tile " #n ";%d;%zu;%zu\n", Of::kThreads, Of::kShared, Of::kShared); \
  }
  FASTSEQ_LOWRANK_TILES(FASTSEQ_LINE)
}
