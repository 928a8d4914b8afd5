// Rows of softmax: the largest logit, then the exponentials of the distances from it, whose sum lies in 1 .. K. The row
// comes from memory for the first and from a cache for the second. Lane n of a sum adds every kSumLanes-th element from
// n on, and lanes are added by halves: equal bits at every width.
namespace fastseq::core::FASTSEQ_ISA {
namespace {

constexpr int kSumVectors = 128 / kVectorBytes;
constexpr int64_t kNearBytes = 32 << 10;  // of rows that the nearest cache keeps from one pass to the next

// How many rows go through one pass before the next: each row is a chain that waits for itself, several are not.
template <class R>
inline int64_t rows_together(int64_t K, int64_t most) {
  const int64_t fit = kNearBytes / (K * (int64_t)sizeof(R));
  return fit < 1 ? 1 : fit < most ? fit : most;
}
template <class R>
constexpr int kSumLanes = kSumVectors * kLanes<R>;

template <class R, int Lanes>
struct Part {
  typedef R Type __attribute__((vector_size(Lanes * sizeof(R))));
};
template <class R>
struct Part<R, 1> {
  typedef R Type;
};

// All lanes as one: the low half with the high half, and so on.
template <class R, int Lanes = kLanes<R>, class Op>
inline R fold(typename Part<R, Lanes>::Type v, Op op) {
  if constexpr (Lanes == 1) {
    return v;
  } else {
    typename Part<R, Lanes / 2>::Type low, high;
    __builtin_memcpy(&low, &v, sizeof low);
    __builtin_memcpy(&high, (const char*)&v + sizeof low, sizeof high);
    return fold<R, Lanes / 2>(op(low, high), op);
  }
}
template <class R>
inline R fold_largest(Vec<R> v) {
  return fold<R>(v, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}
// Of kSumVectors vectors.
template <class R>
inline R fold_sum(Vec<R>* v) {
#pragma GCC unroll 4
  for (int n = kSumVectors / 2; n >= 1; n /= 2) {
    for (int i = 0; i < n; ++i) v[i] += v[i + n];
  }
  return fold<R>(v[0], [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}

// Coefficient of x^n: Taylor's, economized. The last but one takes over what the last would have added, through the
// Chebyshev polynomial of that degree, which is small on |x| <= ln(2)/2: as good with one term less. Seven terms of
// floats, in double the series as it is.
template <class R>
constexpr R exp_term(int n) {
  if (sizeof(R) == sizeof(double)) return inverse_factorial<R>(n);
  constexpr double a2 = 0.34657359 * 0.34657359, last = 1.0 / 5040;  // x^7 is about 7/4 a^2 x^5 - 7/8 a^4 x^3 + ...
  double more = 0;
  if (n == 5) more = 7.0 / 4 * a2 * last;
  if (n == 3) more = -7.0 / 8 * a2 * a2 * last;
  if (n == 1) more = 7.0 / 64 * a2 * a2 * a2 * last;
  double f = 1;
  for (int i = 2; i <= n; ++i) f *= i;
  return (R)(1.0 / f + more);
}
template <class R>
constexpr int kExpDegree = sizeof(R) == sizeof(float) ? 6 : Real<R>::kExpTerms;

// exp of what is not positive. From the middle between the least normal number and its half on 0: there 2^n, made of
// the bits of its exponent, is 0. NaN stays NaN.
template <class R, int N>
inline void exp_below(Vec<R>* x) {
  using K = Real<R>;
  Vec<R> n[N], p[N];
  FASTSEQ_EACH(i, N) {
    x[i] = largest(broadcast(K::kLeast - 1), x[i]);
    n[i] = fma(x[i], broadcast(K::kLog2e), broadcast(K::kMagic));
#if !defined(FASTSEQ_HAS_SCALE)
    p[i] = (Vec<R>)(((Int<R>)n[i] << K::kMantissa) + K::kOne);
#endif
  }
  FASTSEQ_EACH(i, N) {
    n[i] = n[i] - broadcast(K::kMagic);
    if (sizeof(R) ==
        sizeof(float)) {  // ln 2 is off by 2e-9 then: what n is large enough to show is small enough not to
      x[i] = fma(n[i], broadcast(-K::kLn2), x[i]);
    } else {
      x[i] = fma(n[i], broadcast(-K::kLn2Low), fma(n[i], broadcast(-K::kLn2High), x[i]));
    }
  }
#if !defined(FASTSEQ_HAS_SCALE)
  FASTSEQ_EACH(i, N) n[i] = p[i];
#endif
  FASTSEQ_EACH(i, N) p[i] = broadcast(exp_term<R>(kExpDegree<R>));
#pragma GCC unroll 16
  for (int term = kExpDegree<R> - 1; term >= 0; --term) {
    FASTSEQ_EACH(i, N) p[i] = fma(p[i], x[i], broadcast(exp_term<R>(term)));
  }
  FASTSEQ_EACH(i, N) x[i] = scale(p[i], n[i]);
}

// Calls f(k, i, count) for vector i of kSumVectors at element k, and whole(k) for kSumVectors of them at once.
template <class R, class Whole, class F>
inline void by_vectors(int64_t K, Whole whole, F f) {
  int64_t k = 0;
  for (; k + kSumLanes<R> <= K; k += kSumLanes<R>) whole(k);
  FASTSEQ_EACH(i, kSumVectors) {
    const int64_t rest = K - k - i * kLanes<R>;
    if (rest > 0) f(k + i * kLanes<R>, i, rest < kLanes<R> ? rest : (int64_t)kLanes<R>);
  }
}

// The largest that is not NaN, or -inf.
template <class R>
inline R row_largest(const R* x, int64_t K) {
  constexpr int64_t L = kLanes<R>;
  const Vec<R> least = broadcast(-(R)INFINITY);
  Vec<R> best[4] = {least, least, least, least};
  int64_t k = 0;
  for (; k + 4 * L <= K; k += 4 * L) {
    FASTSEQ_EACH(i, 4) best[i] = largest(load(x + k + i * L), best[i]);
  }
  for (; k + L <= K; k += L) best[0] = largest(load(x + k), best[0]);
  if (k < K) best[1] = largest(load_part(x + k, K - k, least), best[1]);
  return fold_largest<R>(largest(largest(best[0], best[1]), largest(best[2], best[3])));
}

// Sum of exp(x - shift), each also to e if Keep, which has room for whole vectors. While it runs the next row comes
// nearer.
template <class R, bool Keep>
inline R row_exp_sum(const R* x, int64_t K, R shift, R* e) {
  constexpr int64_t L = kLanes<R>;
  const Vec<R> least = broadcast(-(R)INFINITY), middle = broadcast(shift);
  Vec<R> sum[kSumVectors] = {};
  by_vectors<R>(
      K,
      [&](int64_t k) __attribute__((always_inline)) {
        Vec<R> v[kSumVectors];
        FASTSEQ_EACH(i, kSumVectors) v[i] = load(x + k + i * L) - middle;
        exp_below<R, kSumVectors>(v);
        FASTSEQ_EACH(i, kSumVectors) {
          sum[i] += v[i];
          __builtin_prefetch(x + K + k + i * L);
          if (Keep) store(e + k + i * L, v[i]);
        }
      },
      [&](int64_t k, int i, int64_t count) __attribute__((always_inline)) {
        Vec<R> v = load_part(x + k, count, least) - middle;
        exp_below<R, 1>(&v);
        sum[i] += v;
        if (Keep) store(e + k, v);
      });
  return fold_sum<R>(sum);
}

// Sum of x - shift.
template <class R>
inline R row_sum(const R* x, int64_t K, R shift) {
  const Vec<R> middle = broadcast(shift);
  Vec<R> sum[kSumVectors] = {};
  by_vectors<R>(
      K,
      [&](int64_t k) __attribute__((always_inline)) {
        FASTSEQ_EACH(i, kSumVectors) sum[i] += load(x + k + i * kLanes<R>) - middle;
      },
      [&](int64_t k, int i, int64_t count)
          __attribute__((always_inline)) { sum[i] += load_part(x + k, count, middle) - middle; });
  return fold_sum<R>(sum);
}

// The first element that is `value`, which is there.
template <class R>
inline int64_t first_equal(const R* x, int64_t K, R value) {
  int64_t k = 0;
#if defined(FASTSEQ_HAS_BYTES)
  constexpr int64_t L = kLanes<R>, words = (int64_t)sizeof(R) / 4, group = 64 / words;  // of as many bits as uint64_t
  const Vec<R> v = broadcast(value), none = broadcast((R)NAN);
  for (; k + group < K; k += group) {
    Int<R> found = {};
    FASTSEQ_EACH(i, group / L) found |= load(x + k + i * L) == v;
    if (bits_of((VecWord)found)) break;
  }
  uint64_t bits = 0;
  FASTSEQ_EACH(i, group / L) {
    const int64_t rest = K - k - i * L;
    if (rest <= 0) break;
    const Vec<R> have = rest < L ? load_part(x + k + i * L, rest, none) : load(x + k + i * L);
    bits |= (uint64_t)bits_of((VecWord)(have == v)) << (i * L * words);
  }
  return k + __builtin_ctzll(bits) / words;
#else
  while (k + 1 < K && x[k] != value) ++k;
  return k;
#endif
}

template <class R>
inline int64_t first_nan(const R* x, int64_t K) {
  int64_t k = 0;
  while (k < K && x[k] == x[k]) ++k;
  return k;
}

// log of what is at least 1, or NaN.
template <class R>
inline Vec<R> log_of_sum(Vec<R> s) {
  return s > 0 ? log_quotient<R>(s, broadcast(R(1))) : s;
}

}  // namespace
}  // namespace fastseq::core::FASTSEQ_ISA
