// What a block of each tile takes, one line each: its number, its five sizes, threads, and bytes of shared memory that
// are asked for at launch, forward and backward.
#include <cstdio>

#include "cuda/persist_tile.h"

int main() {
#define FASTSEQ_LINE(n, ...)                                                                                   \
  {                                                                                                            \
    using Of = fastseq::cuda::Tile<__VA_ARGS__>;                                                               \
    std::printf("%d;" #__VA_ARGS__ ";%d;%zu;%zu\n", n, Of::kThreads, Of::kForwardShared, Of::kBackwardShared); \
  }
  FASTSEQ_PERSIST_TILES(FASTSEQ_LINE)
}
