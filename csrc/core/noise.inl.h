// Philox4x32-10 (Salmon et al., SC 2011) and the logistic noise of the gates.
namespace fastseq::core::FASTSEQ_ISA {
namespace {

struct Words {
  VecU32 w[4];
};

inline void multiply(VecU32 a, uint32_t m, VecU32* high, VecU32* low) {
  const VecU64 factor = (VecU64)(VecU32{} + m), pairs = (VecU64)a;
  const VecU64 even = multiply_even(pairs, factor), odd = multiply_even(pairs >> 32, factor);
  *low = (VecU32)((even & 0xffffffffu) | (odd << 32));
  *high = (VecU32)((even >> 32) | (odd & 0xffffffff00000000u));
}

inline Words philox_rounds(Words c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    VecU32 high0, low0, high1, low1;
    multiply(c.w[0], 0xD2511F53u, &high0, &low0);
    multiply(c.w[2], 0xCD9E8D57u, &high1, &low1);
    c = {{high1 ^ c.w[1] ^ k0, low1, high0 ^ c.w[3] ^ k1, low0}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

constexpr int kWordLanes = kVectorBytes / 4;

void philox(int64_t count, const uint32_t* counter, uint64_t key, uint32_t* words) {
  for (int64_t i = 0; i < count; ++i) {
    Words c;
    for (int n = 0; n < 4; ++n) c.w[n] = VecU32{} + counter[4 * i + n];
    c = philox_rounds(c, (uint32_t)key, (uint32_t)(key >> 32));
    for (int n = 0; n < 4; ++n) words[4 * i + n] = c.w[n][0];
  }
}

// log U - log(1 - U) with U = (k + 1/2) 2^-24, k = word >> 8, as the log of one quotient of odd 25-bit integers, where
// the mask's own U is below p, else 0. `threshold` is the least k with (k + 1/2) 2^-24 >= p.
template <class R>
inline void logit(const uint32_t* words, const uint32_t* mask, uint32_t threshold, R* out) {
  constexpr int L = kLanes<R>;
  typedef int32_t Half __attribute__((vector_size(L * 4)));
  Half k, m;
  __builtin_memcpy(&k, words, sizeof k);
  __builtin_memcpy(&m, mask, sizeof m);
  k = (k >> 8) & 0xffffff;
  m = (m >> 8) & 0xffffff;
  const Half odd = 2 * k + 1;
  const Vec<R> over = __builtin_convertvector(odd, Vec<R>), under = __builtin_convertvector((1 << 25) - odd, Vec<R>);
  const Half kept = m < (int32_t)threshold ? Half{} + 1 : Half{};
  store(out, log<R>(over / under) * __builtin_convertvector(kept, Vec<R>));
}

template <class R>
void lstm_noise(const LstmNoise& noise, int64_t unit, int64_t count, int64_t step, int64_t row, R* out) {
  const double level = noise.probability * 16777216.0 - 0.5;
  const uint32_t threshold =
      level <= 0 ? 0 : (uint32_t)level + ((double)(uint32_t)level < level ? 1 : 0);  // ceil(level)
  uint32_t words[4][kMostPanelWidth];
  VecU32 lane;
  for (int i = 0; i < kWordLanes; ++i) lane[i] = (uint32_t)i;
  const int64_t number = (noise.rows ? noise.rows[row] : row) + noise.row_offset;
  for (int64_t u = 0; u < count; u += kWordLanes) {
    Words c = {{lane + (uint32_t)(unit + u), VecU32{} + (uint32_t)step, VecU32{} + (uint32_t)number,
                VecU32{} + (uint32_t)noise.stream}};
    c = philox_rounds(c, (uint32_t)noise.seed, (uint32_t)(noise.seed >> 32));
    for (int n = 0; n < 4; ++n) __builtin_memcpy(words[n] + u, &c.w[n], sizeof(VecU32));
  }
  for (int64_t u = 0; u < count; u += kLanes<R>) {
    logit<R>(words[0] + u, words[1] + u, threshold, out + u);
    logit<R>(words[2] + u, words[3] + u, threshold, out + kPanel<R> + u);
  }
}

}  // namespace
}  // namespace fastseq::core::FASTSEQ_ISA
