// Philox4x32-10 (Salmon et al., SC 2011) and the logistic noise of the gates.
namespace fastseq::core::FASTSEQ_ISA {
namespace {

// One counter per 64-bit lane. Only the low halves count: the multiplication reads nothing else, and xor keeps them
// apart.
struct Words {
  VecU64 w[4];
};

// The key of each round. Scalars: with vectors here GCC 12 at -O2 for plain x86-64 computes wrong words.
struct Keys {
  uint64_t k[10][2];
  explicit Keys(uint64_t key) {
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      k[round][0] = k0;
      k[round][1] = k1;
    }
  }
};

// C blocks of counters side by side: one alone would wait for its own multiplications.
template <int C>
inline __attribute__((always_inline)) void philox_rounds(Words* c, const Keys& keys) {
  const VecU64 m0 = VecU64{} + 0xD2511F53u, m1 = VecU64{} + 0xCD9E8D57u;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const VecU64 k0 = VecU64{} + keys.k[round][0], k1 = VecU64{} + keys.k[round][1];
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i) {
      const VecU64 p0 = multiply_even(c[i].w[0], m0), p1 = multiply_even(c[i].w[2], m1);
      c[i] = {{(p1 >> 32) ^ c[i].w[1] ^ k0, p1, (p0 >> 32) ^ c[i].w[3] ^ k1, p0}};
    }
  }
}

constexpr int kCounters = kVectorBytes / 8;

void philox(int64_t count, const uint32_t* counter, uint64_t key, uint32_t* words) {
  const Keys keys(key);
  for (int64_t i = 0; i < count; ++i) {
    Words c;
    for (int n = 0; n < 4; ++n) c.w[n] = VecU64{} + counter[4 * i + n];
    philox_rounds<1>(&c, keys);
    for (int n = 0; n < 4; ++n) words[4 * i + n] = (uint32_t)c.w[n][0];
  }
}

// log(n / d) of positive numbers: with n scaled by a power of two until it is near d, 2 atanh((n - d) / (n + d)).
template <class R>
inline Vec<R> log_quotient(Vec<R> n, Vec<R> d) {
  using K = Real<R>;
  const Int<R> exponent = ((Int<R>)n - (Int<R>)d + (K::kOne - K::kSqrtHalf)) >> K::kMantissa;
  const Vec<R> scaled = (Vec<R>)((Int<R>)n - (exponent << K::kMantissa));
  const Vec<R> s = (scaled - d) / (scaled + d), z = s * s;
  Vec<R> p = broadcast(R(2.0 / (2 * K::kLogTerms + 1)));
#pragma GCC unroll 16
  for (int i = K::kLogTerms - 1; i >= 1; --i) p = cell_fma<R>(p, z, broadcast(R(2.0 / (2 * i + 1))));
  const Vec<R> twos = (Vec<R>)((Int<R>)broadcast(K::kMagic) + exponent) - broadcast(K::kMagic);
  return cell_fma<R>(twos, broadcast(K::kLn2), cell_fma<R>(p * z, s, s + s));
}

// log U - log(1 - U) with U = (k + 1/2) 2^-24, k = word >> 8, as the log of a quotient of odd 25-bit integers, where
// the mask's own U is below p, else 0. `threshold` is the least k with (k + 1/2) 2^-24 >= p.
template <class R>
inline Vec<R> logit(const uint32_t* words, const uint32_t* mask, int32_t threshold) {
  typedef int32_t Lanes __attribute__((vector_size(kLanes<R> * 4)));
  Lanes k, m;
  __builtin_memcpy(&k, words, sizeof k);
  __builtin_memcpy(&m, mask, sizeof m);
  k = (k >> 8) & 0xffffff;
  m = (m >> 8) & 0xffffff;
  const Lanes odd = 2 * k + 1, kept = (m - threshold) >> 31;  // all ones where m < threshold
  const Vec<R> over = __builtin_convertvector(odd, Vec<R>), under = __builtin_convertvector((1 << 25) - odd, Vec<R>);
  return log_quotient<R>(over, under) * __builtin_convertvector(-kept, Vec<R>);
}

template <class R>
void lstm_noise(const LstmNoise& noise, int64_t unit, int64_t step, const int64_t* rows, int64_t count, R* out) {
  const double level = noise.probability * 16777216.0 - 0.5;
  const int32_t floor = level <= 0 ? 0 : (int32_t)level, threshold = floor + (floor < level ? 1 : 0);
  const Keys keys(noise.seed);
  constexpr int kBlocks = kPanel<R> / kCounters;
  const VecU64 lane = lane_numbers() + (uint64_t)unit;
  for (int64_t row = 0; row < count; ++row, out += 2 * kPanel<R>) {
    const uint64_t number = (uint64_t)((noise.rows ? noise.rows[rows[row]] : rows[row]) + noise.row_offset);
    Words c[kBlocks];
#pragma GCC unroll 4
    for (int i = 0; i < kBlocks; ++i) {
      c[i] = {{lane + (uint64_t)(i * kCounters), VecU64{} + (uint64_t)step, VecU64{} + number,
               VecU64{} + (uint64_t)noise.stream}};
    }
    philox_rounds<kBlocks>(c, keys);
#pragma GCC unroll 2
    for (int i = 0; i < kBlocks; i += 2) {
      VecU32 words[4];
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) words[n] = low_words(c[i].w[n], c[i + 1].w[n]);
#pragma GCC unroll 2
      for (int at = 0; at < 2 * kCounters; at += kLanes<R>) {
        const auto word = [&](int n) { return (const uint32_t*)&words[n] + at; };
        R* const to = out + i * kCounters + at;
        store(to, logit<R>(word(0), word(1), threshold));
        store(to + kPanel<R>, logit<R>(word(2), word(3), threshold));
      }
    }
  }
}

}  // namespace
}  // namespace fastseq::core::FASTSEQ_ISA
