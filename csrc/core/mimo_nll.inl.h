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
    R top[kNllRows] = {}, sum[kNllRows] = {}, picked[kNllRows] = {}, mean[kNllRows] = {};
    const R* const x = a.logits + first * a.K;
    for (int64_t r = 0, stop; r < count; r = stop) {
      stop = count - r < together ? count : r + together;
      for (int64_t i = r; i < stop; ++i) top[i] = row_largest(x + i * a.K, a.K);
      for (int64_t i = r; i < stop; ++i) sum[i] = row_exp_sum<R, false>(x + i * a.K, a.K, top[i], nullptr);
      for (int64_t i = r; spread != 0 && i < stop; ++i) mean[i] = row_sum(x + i * a.K, a.K) / R(a.K);
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t label = a.labels[first + r];
      picked[r] = label == a.ignore ? R(0) : x[r * a.K + label];
    }
    for (int64_t r = 0; r < count; r += L) {
      const int64_t rest = count - r < L ? count - r : L;
      store_part(a.lse + first + r, load(top + r) + log_of_sum<R>(load(sum + r)), rest);
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = first + r;
      if (!(sum[r] > 0)) {  // something is NaN, or the largest is infinite and the others do not matter
        a.lse[row] = first_nan(x + r * a.K, a.K) < a.K ? (R)NAN : top[r];
      }
      R nll = a.lse[row] - kept * picked[r];
      if (spread != 0) nll -= spread * mean[r];
      a.nll[row] = a.labels[row] == a.ignore ? R(0) : nll;
    }
  }
}

// out = weight * exp(x - lse) - weight * spread
template <class R>
inline void gradient_row(const R* x, int64_t K, R lse, R weight, R spread, R* out) {
  constexpr int64_t L = kLanes<R>;
  const Vec<R> middle = broadcast(lse), times = broadcast(weight), less = broadcast(-weight * spread);
  int64_t k = 0;
  for (; k + 2 * L <= K; k += 2 * L) {
    Vec<R> v[2];
    FASTSEQ_EACH(i, 2) v[i] = load(x + k + i * L) - middle;
    exp_below<R, 2>(v);
    FASTSEQ_EACH(i, 2) store(out + k + i * L, fma(v[i], times, less));
  }
  for (; k < K; k += L) {
    const int64_t count = K - k < L ? K - k : L;
    Vec<R> v = load_part(x + k, count, middle) - middle;
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
      place[r] = given ? a.logits[row * a.K + label] - a.lse[row] : R(0);
    }
    for (int64_t r = 0; r < kNllRows; r += kLanes<R>) {
      Vec<R> p = load(place + r);
      exp_below<R, 1>(&p);
      store(place + r, p);
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = first + r, label = a.labels[row];
      R* const out = a.dlogits + row * a.K;
      gradient_row(a.logits + row * a.K, a.K, a.lse[row], weight[r], spread, out);
      if (label != a.ignore) out[label] = weight[r] * (place[r] - (kept + spread));
    }
  }
}

}  // namespace
}  // namespace fastseq::core::FASTSEQ_ISA
