// The screen of vq_screen.h, for instruction sets with products of bytes.
#if defined(FASTSEQ_HAS_BYTES)
namespace fastseq::core::FASTSEQ_ISA {
namespace {

constexpr int kScreenWidth = kPanel<float>;     // rows of a panel, and codes of one
constexpr int kScreenCodes = kScreenWidth / 4;  // codes of a register tile

// Rows are 1 .. 2 * kZero - 1 around kZero, codes -kMost .. kMost. Where products add up in 32 bits at once, bytes are
// used whole; else in windows of 16 bits, which must not overflow.
#if defined(FASTSEQ_HAS_DOT)
constexpr bool kDots = true;
#else
constexpr bool kDots = false;
#endif
constexpr int kZero = kDots ? 128 : 64, kMost = kZero - 1;
constexpr int32_t kWindowSum = kDots ? 127 * kScreenWindow : kScreenWindowSum;

// Rounded up by more than what the sum lost to rounding, and to numbers whose squares are too small.
inline float vq_length(float square) { return __builtin_sqrtf(square) * 1.0001f + 1e-17f; }

float vq_norm(const float* v, int64_t D) {
  return vq_length(vq_reduce<float>(D, [=](int64_t d) { return v[d] * v[d]; }));
}

// The largest magnitude; NaN counts as none.
float vq_largest(const float* v, int64_t D) {
  float most[kSums] = {};
  int64_t d = 0;
  for (; d + kSums <= D; d += kSums) {
    for (int i = 0; i < kSums; ++i) {
      const float a = __builtin_fabsf(v[d + i]);
      most[i] = a > most[i] ? a : most[i];
    }
  }
  for (; d < D; ++d) {
    const float a = __builtin_fabsf(v[d]);
    most[0] = a > most[0] ? a : most[0];
  }
  for (int i = 1; i < kSums; ++i) most[0] = most[i] > most[0] ? most[i] : most[0];
  return most[0];
}

// Rounds a code with scale t. Returns the largest sum of one sign that a window adds up in one lane of 16 bits.
int32_t vq_round_code(const float* c, int64_t D, float scale, int8_t* p) {
  int32_t most = 0;
  for (int64_t first = 0; first < D; first += kScreenWindow) {
    int32_t up[2] = {}, down[2] = {};
    const int64_t end = first + kScreenWindow < D ? first + kScreenWindow : D;
    for (int64_t d = first; d < end; ++d) {
      const float v = c[d] * scale;
      const int32_t q = (int32_t)(v + (v < 0 ? -0.5f : 0.5f));
      p[d] = (int8_t)q;
      const int lane = d >> 1 & 1;
      up[lane] += q > 0 ? q : 0;
      down[lane] -= q < 0 ? q : 0;
    }
    for (int lane = 0; lane < 2; ++lane) {
      most = up[lane] > most ? up[lane] : most;
      most = down[lane] > most ? down[lane] : most;
    }
  }
  return most;
}

// One code into place k, and into the bound of its panel. False where its scores have to be formed anyway.
bool vq_screen_code(const VqScreenCodes& codes, const float* code, int64_t k, float* moved, float* bound) {
  const int64_t D = codes.D;
  int8_t* const p = codes.p + k * codes.stride;
  for (int64_t d = 0; d < D; ++d) moved[d] = code[d] - codes.mean[d];
  const float largest = vq_largest(moved, D), length = vq_norm(moved, D);
  float bits = kMost;
  float t = largest / bits;
  if (!(length < 1e18f) || !(codes.start[k] < 1e36f)) return false;
  if (!(t > 1e-30f)) {
    t = 0;
    for (int64_t d = 0; d < D; ++d) p[d] = 0;
  } else {
    for (int32_t sum; (sum = vq_round_code(moved, D, 1 / t, p)) > kWindowSum; t = largest / bits) {
      const float fits = bits * kWindowSum / (float)sum;
      bits = fits < bits - 1 ? fits : bits - 1;
    }
  }
  int32_t total = 0;
  for (int64_t d = 0; d < D; ++d) total += p[d];
  const float* const mean = codes.mean;
  const float error = vq_length(vq_reduce<float>(D, [=](int64_t d) {
    const float e = moved[d] - t * (float)p[d];
    return e * e;
  }));
  double h = 0;
  for (int64_t d = 0; d < D; ++d) {
    h += codes.dot ? -(double)mean[d] * (double)moved[d] : 0.5 * (double)moved[d] * (double)moved[d];
  }
  codes.t[k] = -t;
  codes.h[k] = (float)h;
  codes.zero[k] = -kZero * total;
  const float u = 0x1p-23f, steps = (float)(D + 8), start = __builtin_fabsf(codes.start[k]);
  const float alone = u * (steps * start + 16 * __builtin_fabsf((float)h));
  const float found[4] = {length, error, u * steps * vq_norm(code, D), alone};
  for (int i = 0; i < 4; ++i) bound[i] = found[i] > bound[i] ? found[i] : bound[i];
  return true;
}

void vq_screen_prepare(VqScreenPrepare& a) {
  const VqScreenCodes& codes = *a.codes;
  constexpr int W = kScreenWidth;
  for (int64_t panel = a.begin; panel < a.end; ++panel) {
    const int64_t first = panel * W, in = codes.K - first < W ? codes.K - first : W;
    float* const exact = codes.exact + first * codes.D;
    pack_rows<float>({{a.codebook, codes.D, nullptr}, first, 0, in, codes.D, W, exact});
    vq_start(exact, codes.D, codes.dot, codes.start + first);
    float* const bound = codes.bound + panel * 4;
    for (int i = 0; i < 4; ++i) bound[i] = 0;
    for (int64_t k = first; k < first + W; ++k) {
      for (int64_t d = 0; d < codes.stride; ++d) codes.p[k * codes.stride + d] = 0;
      const bool never = k >= codes.K || codes.start[k] == INFINITY;
      if (!never && vq_screen_code(codes, a.codebook + k * codes.D, k, a.moved, bound)) continue;
      for (int64_t d = 0; d < codes.stride; ++d) codes.p[k * codes.stride + d] = 0;
      codes.t[k] = 0;
      codes.zero[k] = 0;
      codes.h[k] = never ? INFINITY : -INFINITY;
      if (never) codes.start[k] = INFINITY;
    }
  }
}

inline float vq_sum_lanes(VecF v) {
  float sum = 0;
  for (int i = 0; i < kLanes<float>; ++i) sum += v[i];
  return sum;
}

// What a row is like once the mean is taken off, into moved [stride].
struct ScreenRow {
  float length, whole, along, largest;
};
ScreenRow vq_screen_move(const VqScreenRows& a, const float* x) {
  constexpr int L = kLanes<float>;
  const int64_t D = a.codes->D;
  VecF length = {}, whole = {}, along = {}, largest = {};
  for (int64_t d = 0; d < D; d += L) {
    const VecF mean = load(a.codes->mean + d), v = D - d < L ? load_part(x + d, D - d) : load(x + d), moved = v - mean;
    store(a.moved + d, moved);
    length = fma(moved, moved, length);
    whole = fma(v, v, whole);
    along = fma(moved, mean, along);
    largest = ::fastseq::core::FASTSEQ_ISA::largest(largest, moved < 0 ? -moved : moved);
  }
  float most = 0;
  for (int i = 0; i < L; ++i) most = largest[i] > most ? largest[i] : most;
  return {vq_length(vq_sum_lanes(length)), vq_length(vq_sum_lanes(whole)), vq_sum_lanes(along), most};
}

// One row into lane `lane`. False where it is not finite.
bool vq_screen_row(const VqScreenRows& a, const float* x, int lane) {
  constexpr int L = kLanes<float>;
  typedef uint8_t Numbers __attribute__((vector_size(L)));
  const VqScreenCodes& codes = *a.codes;
  const ScreenRow row = vq_screen_move(a, x);
  if (!(row.whole < 1e18f)) {
    a.own[lane] = INFINITY;  // everything stays open, unless the row is not finite at all
    return vq_reduce<float>(codes.D, [=](int64_t d) { return x[d] * 0.0f; }) == 0.0f;
  }
  const float s = row.largest / kMost, inverse = s > 1e-30f ? 1 / s : 0.0f;
  uint8_t* q = a.q + lane * 4;
  VecF miss = {};
  for (int64_t d = 0; d < codes.stride; d += L) {
    const VecF v = load(a.moved + d);
    const VecI32 number = __builtin_convertvector(fma(v, broadcast(inverse), broadcast(kZero + 0.5f)), VecI32);
    const VecF e = v - broadcast(s) * __builtin_convertvector(number - kZero, VecF);
    miss = fma(e, e, miss);
    const Numbers numbers = __builtin_convertvector(number, Numbers);
    for (int64_t i = 0; i < L && d + i < codes.stride; i += 4, q += 4 * kScreenWidth) {
      __builtin_memcpy(q, (const char*)&numbers + i, 4);
    }
  }
  const float error = vq_length(vq_sum_lanes(miss)), rounded = row.length + error;
  const float u = 0x1p-23f, steps = (float)codes.D / L + 16;
  float* const bound = a.bound + lane;
  bound[0] = error + u * 16 * rounded;
  bound[kScreenWidth] = rounded * (1 + u * 16);
  bound[2 * kScreenWidth] = row.whole;
  bound[3 * kScreenWidth] = -row.along - (codes.dot ? 1.0f : 0.5f) * codes.mean_square;
  a.s[lane] = s;
  a.own[lane] = u * (steps * row.length * vq_length(codes.mean_square) + 16 * codes.mean_square) + 1e-30f;
  return true;
}

void vq_screen_rows(VqScreenRows& a) {
  a.strange = 0;
  for (int lane = 0; lane < kScreenWidth; ++lane) {
    a.s[lane] = a.own[lane] = 0;
    for (int i = 0; i < 4; ++i) a.bound[i * kScreenWidth + lane] = 0;
    const bool finite = lane < a.count && vq_screen_row(a, a.x[lane], lane);
    if (finite && a.own[lane] < INFINITY) continue;
    if (lane < a.count && !finite) a.strange |= 1u << lane;
    for (int64_t d = 0; d < a.codes->stride; ++d) a.q[(d / 4 * kScreenWidth + lane) * 4 + d % 4] = kZero;
  }
}

// sum[i] += the products of two vectors of rows q [stride / 4] and code i of p, exactly.
template <int M>
inline __attribute__((always_inline)) void vq_screen_sums(const int8_t* p, const uint8_t* q, int64_t stride,
                                                          VecI32 (&sum)[M][2]) {
#if defined(FASTSEQ_HAS_DOT)
  for (int64_t d = 0; d < stride; d += 4, p += 4, q += 2 * kVectorBytes) {
    const VecU8 x0 = load_bytes(q), x1 = load_bytes(q + kVectorBytes);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const VecU8 c = broadcast_word(p + i * stride);
      sum[i][0] = add_products(sum[i][0], x0, c);
      sum[i][1] = add_products(sum[i][1], x1, c);
    }
  }
#else
  for (int64_t d = 0; d < stride; d += kScreenWindow) {
    VecI16 acc[M][2];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) acc[i][0] = acc[i][1] = VecI16{};
    const int64_t end = stride - d < kScreenWindow ? stride - d : kScreenWindow;
    for (int64_t e = 0; e < end; e += 4, p += 4, q += 2 * kVectorBytes) {
      const VecU8 x0 = load_bytes(q), x1 = load_bytes(q + kVectorBytes);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        const VecU8 c = broadcast_word(p + i * stride);
        acc[i][0] += multiply_bytes(x0, c);
        acc[i][1] += multiply_bytes(x1, c);
        keep(acc[i][0]);  // else the compiler forms all products first, and spills
        keep(acc[i][1]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      sum[i][0] += add_pairs(acc[i][0]);
      sum[i][1] += add_pairs(acc[i][1]);
    }
  }
#endif
}

void vq_screen_tile(const VqScreenTile& a) {
  constexpr int L = kLanes<float>, M = kScreenCodes, W = kScreenWidth;
  const VqScreenCodes& codes = *a.codes;
  const int64_t stride = codes.stride;
  const VecF s0 = load(a.s), s1 = load(a.s + L);
  VecF least0 = load(a.least), least1 = load(a.least + L);
  VecI32 at0, at1;
  __builtin_memcpy(&at0, a.at, sizeof at0);
  __builtin_memcpy(&at1, a.at + L, sizeof at1);
  for (int64_t panel = 0; panel < a.panels; ++panel) {
    VecF low0 = broadcast(INFINITY), low1 = low0;
    for (int part = 0; part < 4; ++part) {
      const int64_t k = (a.first + panel) * W + part * M;
      VecI32 sum[M][2];
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) sum[i][0] = sum[i][1] = VecI32{} + codes.zero[k + i];
      vq_screen_sums<M>(codes.p + k * stride, a.q, stride, sum);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        const VecF t = broadcast(codes.t[k + i]), h = broadcast(codes.h[k + i]);
        low0 = smallest(fma(t, s0 * __builtin_convertvector(sum[i][0], VecF), h), low0);
        low1 = smallest(fma(t, s1 * __builtin_convertvector(sum[i][1], VecF), h), low1);
      }
    }
    store(a.lowest + panel * W, low0);
    store(a.lowest + panel * W + L, low1);
    const VecI32 less0 = low0 < least0, less1 = low1 < least1, number = VecI32{} + (int32_t)(a.first + panel);
    least0 = smallest(low0, least0);
    least1 = smallest(low1, least1);
    at0 = less0 ? number : at0;
    at1 = less1 ? number : at1;
  }
  store(a.least, least0);
  store(a.least + L, least1);
  __builtin_memcpy(a.at, &at0, sizeof at0);
  __builtin_memcpy(a.at + L, &at1, sizeof at1);
}

int64_t vq_screen_open(const VqScreenOpen& a) {
  constexpr int L = kLanes<float>, W = kScreenWidth;
  int64_t count = 0;
  for (int j = 0; j < 2; ++j) {
    const float* const row = a.bound + j * L;
    const VecF error = load(row), rounded = load(row + W), whole = load(row + 2 * W);
    const VecF score = load(a.score + j * L) - load(row + 3 * W) + load(a.own + j * L);
    for (int64_t panel = 0; panel < a.codes->panels; ++panel) {
      const float* const code = a.codes->bound + panel * 4;
      VecF limit = fma(error, broadcast(code[0]), score + broadcast(code[3]));
      limit = fma(rounded, broadcast(code[1]), fma(whole, broadcast(code[2]), limit));
      uint32_t open = bits_of(~(load(a.lowest + panel * W + j * L) > limit));  // NaN leaves open
      for (; open; open &= open - 1) {
        const int lane = __builtin_ctz(open) + j * L;
        if (a.at[lane] != panel && a.score[lane] > -INFINITY) a.places[count++] = (int32_t)(panel * W + lane);
      }
    }
  }
  return count;
}

void vq_pairs(VqPairs& a) {
  constexpr int L = kLanes<float>;
  const float *x[4], *code[4];
  VecF acc[4][2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int from = i < a.count ? i : 0;
    x[i] = a.x[from];
    code[i] = a.code[from];
    acc[i][0] = load(a.start[from]);
    acc[i][1] = load(a.start[from] + L);
  }
  for (int64_t d = 0; d < a.D; ++d) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const VecF v = broadcast(-x[i][d]);
      acc[i][0] = fused(v, load(code[i] + d * 2 * L), acc[i][0]);
      acc[i][1] = fused(v, load(code[i] + d * 2 * L + L), acc[i][1]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    const VecF most = broadcast(INFINITY), first = smallest(acc[i][0], most), second = smallest(acc[i][1], most);
    const VecF both = smallest(first, second);
    float least = both[0];
    for (int l = 1; l < L; ++l) least = both[l] < least ? both[l] : least;
    const uint32_t same = bits_of(first == broadcast(least)) | bits_of(second == broadcast(least)) << L;
    a.score[i] = least;
    a.lane[i] = __builtin_ctz(same);
  }
}

constexpr VqScreenTable vq_screen_table = {kScreenLeastCodes, vq_screen_prepare, vq_screen_rows,
                                           vq_screen_tile,    vq_screen_open,    vq_pairs};

}  // namespace
}  // namespace fastseq::core::FASTSEQ_ISA
#endif
