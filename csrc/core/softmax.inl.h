// Rows of softmax: the largest logit, then the exponentials of the distances from it, whose sum lies in 1 .. K. The row
// comes from memory for the first and from a cache for the second. Lane n of a sum adds every kSumLanes-th element from
// n on, and lanes are added by halves: equal bits at every width.
namespace fastseq::core::FASTSEQ_ISA {
namespace {

constexpr int kSumVectors = 128 / kVectorBytes;
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

// exp of what is not positive. From the middle between the least normal number and its half on 0: there 2^n, made of
// the bits of its exponent, is 0. NaN stays NaN.
template <class R, int N>
inline void exp_below(Vec<R>* x) {
  Vec<R> power[N];
  FASTSEQ_EACH(i, N) x[i] = largest(broadcast(Real<R>::kLeast - 1), x[i]);
  exp_minus_one<R, N>(x, power);
  FASTSEQ_EACH(i, N) x[i] = cell_fma<R>(power[i], x[i], power[i]);
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

template <class R>
inline R row_sum(const R* x, int64_t K) {
  Vec<R> sum[kSumVectors] = {};
  by_vectors<R>(
      K,
      [&](int64_t k) __attribute__((always_inline)) {
        FASTSEQ_EACH(i, kSumVectors) sum[i] += load(x + k + i * kLanes<R>);
      },
      [&](int64_t k, int i, int64_t count) __attribute__((always_inline)) { sum[i] += load_part(x + k, count); });
  return fold_sum<R>(sum);
}

template <class R>
inline bool any(Int<R> mask) {
#if defined(FASTSEQ_HAS_BYTES)
  return bits_of((VecWord)mask) != 0;
#else
  return fold<typename Simd<R>::Scalar>(mask, [](auto a, auto b) __attribute__((always_inline)) { return a | b; }) != 0;
#endif
}

// The first element that is `value`, which is there.
template <class R>
inline int64_t first_equal(const R* x, int64_t K, R value) {
  constexpr int64_t L = kLanes<R>;
  const Vec<R> v = broadcast(value);
  int64_t k = 0;
  for (; k + 4 * L <= K; k += 4 * L) {
    Int<R> found = {};
    FASTSEQ_EACH(i, 4) found |= load(x + k + i * L) == v;
    if (any<R>(found)) break;
  }
  for (; k + L <= K && !any<R>(load(x + k) == v);) k += L;
  while (k + 1 < K && x[k] != value) ++k;
  return k;
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
