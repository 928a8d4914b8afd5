// What a block of each tile takes, one line each: its type and its sizes, by which the names of kernels have it; its
// own name; threads, and bytes of shared memory that are asked for at launch, forward and backward. Last what is of no
// tile, by the name of its kernel, with all the shared memory that a call may ask for.
#include <cstdio>

#include "cuda/persist_lowrank_tile.h"
#include "cuda/persist_tile.h"
#include "cuda/vq_plan.h"
#include "cuda/vq_screen_tile.h"

int main() {
#define FASTSEQ_LINE(n, ...)                                                                                     \
  {                                                                                                              \
    using Of = fastseq::cuda::Tile<__VA_ARGS__>;                                                                 \
    std::printf("Tile;" #__VA_ARGS__ ";%s " #n ";%d;%zu;%zu\n", Of::kCluster ? "cluster" : "tile", Of::kThreads, \
                Of::kForwardShared, Of::kBackwardShared);                                                        \
  }
  FASTSEQ_PERSIST_TILES(FASTSEQ_LINE)
#undef FASTSEQ_LINE
#define FASTSEQ_LINE(n, ...)                                                                                      \
  {                                                                                                               \
    using Of = fastseq::cuda::LowRankTile<__VA_ARGS__>;                                                           \
    std::printf("LowRankTile;" #__VA_ARGS__ ";tile " #n ";%d;%zu;%zu\n", Of::kThreads, Of::kShared, Of::kShared); \
  }
  FASTSEQ_LOWRANK_TILES(FASTSEQ_LINE)
#undef FASTSEQ_LINE
#define FASTSEQ_LINE(...)                                                                                             \
  {                                                                                                                   \
    using Of = fastseq::cuda::ScreenTile<__VA_ARGS__>;                                                                \
    std::printf("ScreenTile;" #__VA_ARGS__ ";" #__VA_ARGS__ ";%d;%zu;%zu\n", Of::kThreads, Of::kShared, Of::kShared); \
  }
  FASTSEQ_SCREEN_ONE(FASTSEQ_LINE)
  FASTSEQ_SCREEN_MORE(FASTSEQ_LINE)

  using namespace fastseq::cuda;
  const size_t shared = vq_shared(kVqMostD, kVqMostLevels);
  std::printf("vq_lookup_kernel;;most;%d;%zu;%zu\n", kVqThreads, shared, shared);
}
