// The screen under the thread sanitizer: one block of rows past more tiles of codes than there are places for, in
// pieces, with rows that it leaves open. The result is not looked at.
#include "tests/cuda/vq_screen.cpp"

int main() {
  constexpr int64_t N = 9, K = 512, D = 6, kWidth = 64;
  std::mt19937 random(7);
  const auto drawn = [&](int64_t size) {
    std::vector<float> found(size);
    for (auto& number : found) number = static_cast<float>(random() % 2001) / 1000 - 1;
    return found;
  };
  const std::vector<float> x = drawn(N * D), codes = drawn(K * D), starts = drawn(K), h = drawn(K), centre = drawn(D);
  std::vector<float> most{3, 1e-3f, 1e-2f, 3, 2}, score(N);
  // copies of 16 bytes begin at such places
  std::vector<Words> pieces(2 * K * kWidth / 8), starts_of_pieces(K / 4);
  for (Words& words : pieces) words = {0x3c003c00u, 0xbc003c00u, 0x3d003c80u, 0x3c00bd00u};
  std::memcpy(starts_of_pieces.data(), h.data(), K * sizeof(float));
  std::vector<int64_t> index(N);
  std::vector<int32_t> open(N), count(1);
  VqScreen call{};
  call.G = 1, call.N = N, call.D = D, call.K = call.padded = K, call.width = kWidth, call.products = 3;
  call.row = call.code = Number::f32, call.piece = Number::bf16, call.bits = 64, call.slack = 1;
  call.x = x.data(), call.codes = codes.data(), call.starts = starts.data(), call.pieces = pieces.data();
  call.h = reinterpret_cast<const float*>(starts_of_pieces.data()), call.most = most.data();
  call.centre = centre.data();
  call.index = index.data(), call.score = score.data(), call.open = open.data(), call.count = count.data();
  return !emulate_vq_screen(&call, 7);
}
