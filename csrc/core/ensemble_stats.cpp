#include "core/ensemble_stats.h"

#include <algorithm>

#include "core/flush.h"
#include "core/isa.h"

namespace fastseq::core {
namespace {

constexpr double kWork = 25;  // of an element, counted in multiply-adds of a product

template <class R>
struct Call {
  const EnsembleStats<R>* args;
  R* scratch;
};

template <class R>
int64_t own_scratch(const EnsembleStats<R>& a) {
  return (a.M + 1) * ensemble_stats_row(a.K) + 2 * round_up(a.M) + 2 * a.M * kStatsRows;
}

// No thread without a row: each has scratch.
template <class R>
int threads(const EnsembleStats<R>& a, int most) {
  const int size = team_size(kWork * a.B * a.M * a.K, most);
  return static_cast<int>(std::min<int64_t>(size, std::max<int64_t>(1, a.B)));
}

template <class R>
void body(const void* context, int rank, int size, Barrier&) {
  const auto& call = *static_cast<const Call<R>*>(context);
  const EnsembleStats<R>& a = *call.args;
  const FlushDenormals flush;
  const Range mine = share(a.B, rank, size);
  table_of<R>(kernels()).ensemble_stats(a, mine.begin, mine.end, call.scratch + rank * own_scratch(a));
}

template <class R>
void add_up(const EnsembleStats<R>& a) {
  std::fill_n(a.histogram, 3 * a.bins, 0.0);
  std::fill_n(a.totals, 5 + a.M, 0.0);
  for (int64_t b = 0; b < a.B; ++b) {
    const bool given = a.labels && a.labels[b] != a.ignore;
    if (a.labels && !given) continue;
    a.totals[0] += 1;
    a.totals[4] += a.disagreement[b];
    if (!given) continue;
    const bool right = a.prediction[b] == a.labels[b];
    a.totals[1] += a.nll[b];
    a.totals[2] += a.brier[b];
    a.totals[3] += right;
    for (int64_t m = 0; m < a.M; ++m) a.totals[5 + m] += a.member_prediction[b * a.M + m] == a.labels[b];
    const R place = a.confidence[b] * static_cast<R>(a.bins);
    // NaN lies in bin 0
    const int64_t bin = place >= 1 ? std::min(a.bins - 1, static_cast<int64_t>(place)) : 0;
    a.histogram[bin] += 1;
    a.histogram[a.bins + bin] += a.confidence[b];
    a.histogram[2 * a.bins + bin] += right;
  }
}

}  // namespace

template <class R>
size_t ensemble_stats_scratch(const EnsembleStats<R>& a, int most) {
  return threads(a, most) * own_scratch(a);
}

template <class R>
void ensemble_stats(const EnsembleStats<R>& args, R* scratch, const Team& team) noexcept {
  const Call<R> call{&args, scratch};
  team.run(threads(args, team.most), body<R>, &call);
  add_up(args);
}

template size_t ensemble_stats_scratch(const EnsembleStats<float>&, int);
template size_t ensemble_stats_scratch(const EnsembleStats<double>&, int);
template void ensemble_stats(const EnsembleStats<float>&, float*, const Team&) noexcept;
template void ensemble_stats(const EnsembleStats<double>&, double*, const Team&) noexcept;

}  // namespace fastseq::core
