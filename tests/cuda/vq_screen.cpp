// The screen on the CPU, for tests: run by ctypes, or as a program of its own under the thread sanitizer.
#include "tests/cuda/emulator_copy.h"
// after the names of the device
#include "cuda/vq_screen_tile.h"
// and last
#include "cuda/vq_screen.inl.h"

using namespace fastseq::cuda;

namespace {

template <class Low, class Sizes>
void screen(const VqScreen& call, unsigned seed) {
  const auto blocks = static_cast<int>((call.N + Sizes::kRows - 1) / Sizes::kRows);
  emulated::run(blocks, static_cast<int>(call.G), 1, Sizes::kThreads, Sizes::kShared, seed,
                [&] { Screen<Low, Sizes>(call).run(); });
}

template <class Low>
bool emulate(const VqScreen& call, unsigned seed) {
  const int row = screen_row_pieces(call.products), code = screen_code_pieces(call.products);
  const int depth = screen_depth(call.width);
#define FASTSEQ_RUN(r, c, d) \
  if (row == r && code == c && depth == d) return screen<Low, ScreenTile<r, c, d>>(call, seed), true;
  FASTSEQ_SCREEN_ONE(FASTSEQ_RUN)
  FASTSEQ_SCREEN_MORE(FASTSEQ_RUN)
#undef FASTSEQ_RUN
  return false;
}

}  // namespace

extern "C" bool emulate_vq_screen(const VqScreen* call, unsigned seed) {
  for (int64_t g = 0; g < call->G; ++g) call->count[g] = 0;
  return call->piece == Number::f16 ? emulate<Float16>(*call, seed) : emulate<Bfloat16>(*call, seed);
}
