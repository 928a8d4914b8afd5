// Cross-entropy of rows of logits, and its gradient: the exponentials are computed again, as that is cheaper than to
// write and read them. Stores past the caches gained nothing (Emerald Rapids, 8 and 80 MB): a large gradient lies on
// fresh pages, which the system has just cleared.
namespace fastseq::core::FASTSEQ_ISA {
namespace {

constexpr int kNllRows = 32;  // whose logarithms are computed together

// Rows [begin, end) of N*M.
template <class R>
void mimo_nll_rows(const MimoNll<R>& a, int64_t begin, int64_t end) {
  constexpr int64_t L = kLanes<R>;
  const R kept = R(1 - a.smoothing), spread = R(a.smoothing);
  const int64_t together = rows_together<R>(a.K, kNllRows);
  for (int64_t first = begin; first < end; first += kNllRows) {
    const int64_t count = end - first < kNllRows ? end - first : (int64_t)kNllRows;
    R sum[kNllRows] = {}, mean[kNllRows] = {};  // of distances from the largest
    const R* const x = a.logits + first * a.K;
    R *const top = a.top + first, *const logsum = a.logsum + first;
    for (int64_t r = 0, stop; r < count; r = stop) {
      stop = count - r < together ? count : r + together;
      for (int64_t i = r; i < stop; ++i) top[i] = row_largest(x + i * a.K, a.K);
      for (int64_t i = r; i < stop; ++i) sum[i] = row_exp_sum<R, false>(x + i * a.K, a.K, top[i], nullptr);
      for (int64_t i = r; spread != 0 && i < stop; ++i) mean[i] = row_sum(x + i * a.K, a.K, top[i]) / R(a.K);
    }
    for (int64_t r = 0; r < count; r += L) {
      const int64_t rest = count - r < L ? count - r : L;
      store_part(logsum + r, log_of_sum<R>(load(sum + r)), rest);
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t label = a.labels[first + r];
      R nll = 0;
      if (label != a.ignore) nll = kept * (logsum[r] - (x[r * a.K + label] - top[r]));
      if (label != a.ignore && spread != 0) nll += spread * (logsum[r] - mean[r]);
      a.nll[first + r] = nll;
      if (!(sum[r] > 0) && first_nan(x + r * a.K, a.K) < a.K) top[r] = (R)NAN;  // it was passed over
    }
  }
}

// out = weight * exp((x - top) - logsum) - weight * spread
template <class R>
inline void gradient_row(const R* x, int64_t K, R top, R logsum, R weight, R spread, R* out) {
  constexpr int64_t L = kLanes<R>;
  const Vec<R> most = broadcast(top), below = broadcast(logsum), times = broadcast(weight),
               less = broadcast(-weight * spread);
  int64_t k = 0;
  for (; k + 2 * L <= K; k += 2 * L) {
    Vec<R> v[2];
    FASTSEQ_EACH(i, 2) v[i] = (load(x + k + i * L) - most) - below;
    exp_below<R, 2>(v);
    FASTSEQ_EACH(i, 2) store(out + k + i * L, fma(v[i], times, less));
  }
  for (; k < K; k += L) {
    const int64_t count = K - k < L ? K - k : L;
    Vec<R> v = (load_part(x + k, count, most) - most) - below;
    exp_below<R, 1>(&v);
    store_part(out + k, fma(v, times, less), count);
  }
}

template <class R>
void mimo_nll_gradient(const MimoNllBackward<R>& a, int64_t begin, int64_t end) {
  const R kept = R(1 - a.smoothing), spread = R(a.smoothing / double(a.K));
  for (int64_t first = begin; first < end; first += kNllRows) {
    const int64_t count = end - first < kNllRows ? end - first : (int64_t)kNllRows;
    R weight[kNllRows], place[kNllRows] = {};  // of labels
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = first + r, label = a.labels[row];
      const bool given = label != a.ignore;
      weight[r] = given && a.dloss ? a.weight[row % a.M] : R(0);
      if (given && a.dnll) weight[r] += a.dnll[row];
      place[r] = given ? (a.logits[row * a.K + label] - a.top[row]) - a.logsum[row] : R(0);
    }
    for (int64_t r = 0; r < kNllRows; r += kLanes<R>) {
      Vec<R> p = load(place + r);
      exp_below<R, 1>(&p);
      store(place + r, p);
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = first + r, label = a.labels[row];
      R* const out = a.dlogits + row * a.K;
      if (label == a.ignore) {
        __builtin_memset(out, 0, a.K * sizeof(R));
        continue;
      }
      gradient_row(a.logits + row * a.K, a.K, a.top[row], a.logsum[row], weight[r], spread, out);
      out[label] = weight[r] * (place[r] - (kept + spread));
    }
  }
}

}  // namespace
}  // namespace fastseq::core::FASTSEQ_ISA
