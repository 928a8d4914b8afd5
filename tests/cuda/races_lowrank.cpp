// The low-rank kernels under the thread sanitizer, as races.cpp has the dense ones: the result is not looked at.
#include "tests/cuda/emulate_lowrank.cpp"

namespace {

void run(int tile, unsigned seed) {
  PersistLowRankTile of{};
  if (!emulate_lowrank_tile(tile, &of)) std::abort();
  const int64_t T = 4, B = of.rows + 1, H = of.units + 3, rank = of.rank - 1;
  std::mt19937 random(seed);
  const auto drawn = [&](int64_t size) {
    std::vector<uint16_t> found(size);
    for (auto& number : found) number = Bfloat16::narrow(static_cast<float>(random() % 2001) / 1000 - 1);
    return found;
  };
  std::vector<int64_t> lengths(B);
  for (auto& n : lengths) n = static_cast<int64_t>(random() % (T + 1));
  const PersistLowRankShape shape{{T, B, H, lengths.data(), nullptr, 1.0f, false, true}, rank, of.downs};
  const auto x = drawn(T * B * 4 * H), up = drawn(4 * H * rank), down = drawn(of.downs * rank * H), h0 = drawn(B * H);
  std::vector<uint16_t> h(T * B * H), gates(x.size()), h_n(B * H), dx(x.size()), dh0(B * H);
  std::vector<float> c0(B * H), c(T * B * H), c_n(B * H), dc0(B * H);
  const bool reverse = tile % 2;
  const PersistLowRankForward forward{x.data(), up.data(),    down.data(), h0.data(),  c0.data(), h.data(),
                                      c.data(), gates.data(), h_n.data(),  c_n.data(), reverse};
  emulate_lowrank_forward(&shape, &forward, tile, seed);
  const PersistLowRankBackward backward{h.data(),    nullptr,   nullptr,   gates.data(), c.data(),   up.data(),
                                        down.data(), c0.data(), dx.data(), dh0.data(),   dc0.data(), reverse};
  emulate_lowrank_backward(&shape, &backward, tile, seed);
}

}  // namespace

int main(int, char** arguments) {
  for (char** tile = arguments + 1; *tile; ++tile) run(std::atoi(*tile), 7);
}
