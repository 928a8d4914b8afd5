// The lookup under the thread sanitizer: two groups of rows through two levels, each in three parts, the second of
// fewer tiles than there are parts; rows use different numbers of levels. The result is not looked at.
#include "tests/cuda/vq_lookup.cpp"

int main() {
  constexpr int64_t N = 19, D = 5, K[] = {130, 40};
  std::mt19937 random(7);
  const auto drawn = [&](int64_t size) {
    std::vector<float> found(size);
    for (auto& number : found) number = static_cast<float>(random() % 2001) / 1000 - 1;
    return found;
  };
  const std::vector<float> x = drawn(N * D), first = drawn(K[0] * D), second = drawn(K[1] * D);
  std::vector<int64_t> depth(N), index(2 * N);
  for (auto& levels : depth) levels = static_cast<int64_t>(random() % 3);
  std::vector<float> distance(2 * N), score(2 * N), quantized(N * D);
  VqLookup call{};
  call.G = 1, call.N = N, call.D = D, call.levels = 2, call.bits = 64;
  call.level[0] = {K[0], first.data()}, call.level[1] = {K[1], second.data()};
  call.x = x.data(), call.depth = depth.data(), call.index = index.data();
  call.distance = distance.data(), call.score = score.data(), call.quantized = quantized.data();
  emulate_vq_lookup(&call, 3, 7);
}
