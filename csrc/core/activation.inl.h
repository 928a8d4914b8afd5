// exp, sigmoid and tanh on Vec. Only +, *, /, cell_fma and integer operations, each rounded the same way at every
// width, so floats do not depend on the instruction set, nor doubles on which of the wide ones it is. NaN stays NaN:
// every clamp keeps its argument when the comparison is false. Series, not minimax: after range reduction a few more
// Taylor terms reach the last place and need no table.
namespace fastseq::core::FASTSEQ_ISA {
namespace {

template <class R>
struct Real;
template <>
struct Real<float> {
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  static constexpr float kLog2e = 1.44269504088896341f;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // high part: few bits, n * high is exact
  static constexpr float kLeast = -87.0f, kMost = 88.0f;                      // exp stays normal and finite
  static constexpr int kMantissa = 23, kExpTerms = 7, kLogTerms = 6;
  static constexpr int32_t kOne = 0x3f800000, kSqrtHalf = 0x3f3504f3;
  static constexpr float kLn2 = 0.693147180559945309f, kLowest = -3.402823466e+38f;
};
template <>
struct Real<double> {
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLog2e = 1.44269504088896340736;
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kLeast = -708.0, kMost = 709.0;
  static constexpr int kMantissa = 52, kExpTerms = 13, kLogTerms = 12;
  static constexpr int64_t kOne = 0x3ff0000000000000, kSqrtHalf = 0x3fe6a09e667f3bcd;
  static constexpr double kLn2 = 0.693147180559945309417, kLowest = -1.7976931348623157e+308;
};

template <class R>
constexpr R inverse_factorial(int n) {
  double f = 1;
  for (int i = 2; i <= n; ++i) f *= i;
  return (R)(1.0 / f);
}

template <class R>
inline Vec<R> clamp(Vec<R> x, R least, R most) {
  return smallest(broadcast(most), largest(broadcast(least), x));
}

// Floats are rounded once everywhere: h may be made integers, and one that lies near a tie would show any difference.
template <class R>
inline Vec<R> cell_fma(Vec<R> a, Vec<R> b, Vec<R> c) {
  if constexpr (sizeof(R) == sizeof(float)) return fused(a, b, c);
  return fma(a, b, c);
}

// The functions below take N arguments side by side: one alone is a chain of operations that wait for each other, and a
// processor does not look far enough ahead to find the next chain.
#define FASTSEQ_EACH(i, N) _Pragma("GCC unroll 16") for (int i = 0; i < N; ++i)

// x = n ln 2 + r with |r| <= ln(2)/2. Turns x into exp(r) - 1; `power` is 2^n.
template <class R, int N>
inline void exp_minus_one(Vec<R>* x, Vec<R>* power) {
  using K = Real<R>;
  Vec<R> p[N];
  FASTSEQ_EACH(i, N) {
    const Vec<R> shifted = cell_fma<R>(x[i], broadcast(K::kLog2e), broadcast(K::kMagic));
    const Vec<R> n = shifted - broadcast(K::kMagic);
    x[i] = cell_fma<R>(n, broadcast(-K::kLn2Low), cell_fma<R>(n, broadcast(-K::kLn2High), x[i]));
    power[i] = (Vec<R>)(((Int<R>)shifted << K::kMantissa) + K::kOne);
  }
  FASTSEQ_EACH(i, N) p[i] = broadcast(inverse_factorial<R>(K::kExpTerms));
#pragma GCC unroll 16
  for (int term = K::kExpTerms - 1; term >= 2; --term) {
    FASTSEQ_EACH(i, N) p[i] = cell_fma<R>(p[i], x[i], broadcast(inverse_factorial<R>(term)));
  }
  FASTSEQ_EACH(i, N) x[i] = cell_fma<R>(p[i] * x[i], x[i], x[i]);
}

// The argument of exp in sigmoid and in tanh, and what is made of the result.
template <class R>
inline Vec<R> to_sigmoid(Vec<R> x) {
  return clamp<R>(-x, Real<R>::kLeast, Real<R>::kMost);
}
template <class R>
inline Vec<R> from_sigmoid(Vec<R> e, Vec<R> power) {
  const Vec<R> one = broadcast(R(1));
  return one / (one + cell_fma<R>(power, e, power));
}
template <class R>
inline Vec<R> to_tanh(Vec<R> x) {
  const Vec<R> size = (Vec<R>)((Int<R>)x & ~(Int<R>)broadcast(R(-0.0)));
  return largest(broadcast(Real<R>::kLeast), broadcast(R(-2)) * size);
}
// tanh(x) = sign(x) * (1 - e) / (1 + e), e = exp(-2|x|); through exp - 1, so that small x keep their digits.
template <class R>
inline Vec<R> from_tanh(Vec<R> e, Vec<R> power, Vec<R> x) {
  const Int<R> sign = (Int<R>)x & (Int<R>)broadcast(R(-0.0));
  const Vec<R> less_one = cell_fma<R>(power, e, power - broadcast(R(1)));  // exp(-2|x|) - 1
  return (Vec<R>)((Int<R>)(-less_one / (broadcast(R(2)) + less_one)) ^ sign);
}

template <class R, int N>
inline void tanh(Vec<R>* x) {
  Vec<R> e[N], power[N];
  FASTSEQ_EACH(i, N) e[i] = to_tanh<R>(x[i]);
  exp_minus_one<R, N>(e, power);
  FASTSEQ_EACH(i, N) x[i] = from_tanh<R>(e[i], power[i], x[i]);
}

// The first S become sigmoids, the other N - S tanh.
template <class R, int S, int N>
inline void sigmoid_and_tanh(Vec<R>* x) {
  Vec<R> e[N], power[N];
  FASTSEQ_EACH(i, N) e[i] = i < S ? to_sigmoid<R>(x[i]) : to_tanh<R>(x[i]);
  exp_minus_one<R, N>(e, power);
  FASTSEQ_EACH(i, N) x[i] = i < S ? from_sigmoid<R>(e[i], power[i]) : from_tanh<R>(e[i], power[i], x[i]);
}

}  // namespace
}  // namespace fastseq::core::FASTSEQ_ISA
