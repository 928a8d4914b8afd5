// The kernels under the thread sanitizer, which sees every thread of every block as one of its own: a small call with
// rows of several lengths, both directions at a time, in an order drawn from the seed. The result is not looked at.
#include "tests/cuda/emulate.cpp"

namespace {

struct Numbers {  // what one direction reads and writes
  std::vector<uint16_t> x, w, h0, h, gates, h_n, dh, dx, dh0;
  std::vector<float> c0, c, c_n, dc0;
};

void run(int tile, unsigned seed) {
  PersistTile of{};
  if (!emulate_tile(tile, &of)) std::abort();
  const int64_t T = 5, B = of.rows + 1, H = of.units + 3;
  std::vector<int64_t> lengths(B);
  std::mt19937 random(seed);
  for (auto& n : lengths) n = static_cast<int64_t>(random() % (T + 1));
  const PersistShape shape{T, B, H, lengths.data(), nullptr, 1.0f, false, true, false};
  Numbers numbers[2];
  PersistForward forward[2];
  PersistBackward backward[2];
  for (int n = 0; n < 2; ++n) {
    Numbers& v = numbers[n];
    const auto drawn = [&](std::vector<uint16_t>& to, int64_t size) {
      to.resize(size);
      for (auto& number : to) number = Bfloat16::narrow(static_cast<float>(random() % 2001) / 1000 - 1);
    };
    drawn(v.x, T * B * 4 * H), drawn(v.w, 4 * H * H), drawn(v.h0, B * H), drawn(v.dh, T * B * H);
    v.h.resize(T * B * H), v.gates.resize(T * B * 4 * H), v.h_n.resize(B * H), v.dx.resize(T * B * 4 * H);
    v.dh0.resize(B * H), v.c0.resize(B * H), v.c.resize(T * B * H), v.c_n.resize(B * H), v.dc0.resize(B * H);
    forward[n] = {v.x.data(), v.w.data(),     nullptr,      v.h0.data(),  v.c0.data(), v.h.data(),
                  v.c.data(), v.gates.data(), v.h_n.data(), v.c_n.data(), n == 1};
    backward[n] = {v.dh.data(), nullptr,     nullptr,      v.gates.data(), v.c.data(), v.w.data(),
                   v.c0.data(), v.dx.data(), v.dh0.data(), v.dc0.data(),   n == 1};
  }
  emulate_forward(&shape, forward, 2, tile, seed);
  emulate_backward(&shape, backward, 2, tile, seed);
}

}  // namespace

int main(int, char** arguments) {
  for (char** tile = arguments + 1; *tile; ++tile) run(std::atoi(*tile), 7);
}
