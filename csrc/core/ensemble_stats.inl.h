// Rows of an ensemble: the exponentials of all members stay in a cache until their sums are known.
namespace fastseq::core::FASTSEQ_ISA {
namespace {

// Where argmax is: NaN counts as the largest.
template <class R>
inline int64_t largest_place(const R* x, int64_t K, R top, R sum) {
  const int64_t nan = sum > 0 ? K : first_nan(x, K);
  return nan < K ? nan : first_equal(x, K, top);
}

// p = sum over members of share * e; the largest p, and the sum of squares.
template <class R>
inline R mean_row(const R* e, int64_t row, const R* share, int64_t M, int64_t K, R* p, R* squares) {
  constexpr int64_t L = kLanes<R>;
  Vec<R> best[kSumVectors] = {}, sum[kSumVectors] = {};
  by_vectors<R>(
      K,
      [&](int64_t k) __attribute__((always_inline)) {
        Vec<R> v[kSumVectors] = {};
        for (int64_t m = 0; m < M; ++m) {
          const Vec<R> times = broadcast(share[m]);
          FASTSEQ_EACH(i, kSumVectors) v[i] = fma(load(e + m * row + k + i * L), times, v[i]);
        }
        FASTSEQ_EACH(i, kSumVectors) {
          best[i] = largest(v[i], best[i]);
          sum[i] = fma(v[i], v[i], sum[i]);
          store(p + k + i * L, v[i]);
        }
      },
      [&](int64_t k, int i, int64_t count) __attribute__((always_inline)) {
        Vec<R> v = {};
        for (int64_t m = 0; m < M; ++m) v = fma(load(e + m * row + k), broadcast(share[m]), v);
        best[i] = largest(v, best[i]);
        sum[i] = fma(v, v, sum[i]);
        store_part(p + k, v, count);
      });
  for (int i = 1; i < kSumVectors; ++i) best[0] = largest(best[i], best[0]);
  *squares = fold_sum<R>(sum);
  return fold_largest<R>(best[0]);
}

template <class R>
inline R disagreement_of(const int64_t* places, int64_t M) {
  int64_t differ = 0;
  for (int64_t i = 1; i < M; ++i) {
    for (int64_t j = 0; j < i; ++j) differ += places[i] != places[j];
  }
  return M > 1 ? R(2 * differ) / R(M * (M - 1)) : R(0);
}

// -log of the mean over members of exp(gap - log(sum)); both are [M][kStatsRows].
template <class R>
inline void mean_nll(const R* gap, const R* sum, int64_t M, int64_t count, R* nll) {
  constexpr int64_t L = kLanes<R>;
  const Vec<R> least = broadcast(Real<R>::kLowest), members = log_quotient<R>(broadcast(R(M)), broadcast(R(1)));
  const auto picked = [&](int64_t m, int64_t r) __attribute__((always_inline)) {
    return load(gap + m * kStatsRows + r) - log_of_sum<R>(load(sum + m * kStatsRows + r));
  };
  for (int64_t r = 0; r < count; r += L) {
    Vec<R> top = least, total = {};
    for (int64_t m = 0; m < M; ++m) top = largest(picked(m, r), top);
    for (int64_t m = 0; m < M; ++m) {
      Vec<R> v = picked(m, r) - top;
      exp_below<R, 1>(&v);
      total += v;
    }
    const Vec<R> found = members - (top + log_of_sum<R>(total)), none = broadcast((R)INFINITY);
    store_part(nll + r, total == 0 ? none : found, count - r < L ? count - r : L);
  }
}

// Rows [begin, end); scratch is that of one thread.
template <class R>
void ensemble_stats_rows(const EnsembleStats<R>& a, int64_t begin, int64_t end, R* scratch) {
  const int64_t M = a.M, K = a.K, row = ensemble_stats_row(K), together = rows_together<R>(K, M);
  R* const e = scratch;
  R* const own = e + M * row;
  R* const share = own + row;
  R* const tops = share + round_up(M);
  R* const gap = tops + round_up(M);
  R* const sum = gap + M * kStatsRows;
  for (int64_t first = begin; first < end; first += kStatsRows) {
    const int64_t count = end - first < kStatsRows ? end - first : kStatsRows;
    for (int64_t i = 0; i < 2 * M * kStatsRows; ++i) gap[i] = 1;  // in lanes beyond the rows too
    for (int64_t r = 0; r < count; ++r) {
      const int64_t b = first + r, label = a.labels && a.labels[b] != a.ignore ? a.labels[b] : 0;
      int64_t* const places = a.member_prediction + b * M;
      bool finite = true;
      const R* const x = a.logits + b * M * K;
      for (int64_t m = 0, stop; m < M; m = stop) {
        stop = M - m < together ? M : m + together;
        for (int64_t i = m; i < stop; ++i) tops[i] = row_largest(x + i * K, K);
        for (int64_t i = m; i < stop; ++i) share[i] = row_exp_sum<R, true>(x + i * K, K, tops[i], e + i * row);
        for (int64_t i = m; i < stop; ++i) places[i] = largest_place(x + i * K, K, tops[i], share[i]);
      }
      for (int64_t m = 0; m < M; ++m) {
        finite &= share[m] > 0;
        gap[m * kStatsRows + r] = x[m * K + label] - tops[m];
        sum[m * kStatsRows + r] = share[m];
        share[m] = 1 / (R(M) * share[m]);
      }
      R squares;
      R* const p = a.probability ? a.probability + b * K : own;
      const R most = mean_row(e, row, share, M, K, p, &squares);
      a.confidence[b] = finite ? most : (R)NAN;
      a.prediction[b] = finite ? first_equal(p, K, most) : 0;
      a.disagreement[b] = disagreement_of<R>(places, M);
      a.brier[b] = squares - 2 * p[label] + 1;
    }
    mean_nll(gap, sum, M, count, a.nll + first);
    for (int64_t b = first; b < first + count; ++b) {
      if (!a.labels || a.labels[b] == a.ignore) a.nll[b] = a.brier[b] = 0;
    }
  }
}

}  // namespace
}  // namespace fastseq::core::FASTSEQ_ISA
