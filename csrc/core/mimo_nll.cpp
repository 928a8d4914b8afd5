#include "core/mimo_nll.h"

#include <algorithm>

#include "core/flush.h"
#include "core/isa.h"

namespace fastseq::core {
namespace {

constexpr double kWork = 20;  // of an element, counted in multiply-adds of a product

template <class R>
void forward_body(const void* context, int rank, int size, Barrier&) {
  const auto& a = *static_cast<const MimoNll<R>*>(context);
  const FlushDenormals flush;
  const Range mine = share(a.N * a.M, rank, size);
  table_of<R>(kernels()).mimo_nll(a, mine.begin, mine.end);
}

template <class R>
void backward_body(const void* context, int rank, int size, Barrier&) {
  const auto& a = *static_cast<const MimoNllBackward<R>*>(context);
  const FlushDenormals flush;
  const Range mine = share(a.N * a.M, rank, size);
  table_of<R>(kernels()).mimo_nll_backward(a, mine.begin, mine.end);
}

// Of the labels of each slot, those that are not ignored; at least 1.
constexpr int64_t kSlots = 4;  // added side by side: a sum alone waits for itself
struct Slots {
  double sum[kSlots] = {};
  int64_t given[kSlots] = {};
  int64_t count(int64_t m) const { return std::max<int64_t>(1, given[m]); }
};
// Of slots first .. first + kSlots - 1; nll may be null.
template <class R>
Slots slots(const int64_t* labels, const R* nll, int64_t N, int64_t M, int64_t first, int64_t ignore) {
  Slots s;
  const int64_t some = std::min(kSlots, M - first);
  for (int64_t i = first; i < N * M; i += M) {
    for (int64_t m = 0; m < some; ++m) {
      s.given[m] += labels[i + m] != ignore;
      if (nll) s.sum[m] += nll[i + m];
    }
  }
  return s;
}

}  // namespace

template <class R>
void mimo_nll(const MimoNll<R>& a, const Team& team) noexcept {
  team.run(team_size(kWork * a.N * a.M * a.K, team.most), forward_body<R>, &a);
  double loss = 0;
  for (int64_t first = 0; first < a.M; first += kSlots) {
    const Slots s = slots(a.labels, a.nll, a.N, a.M, first, a.ignore);
    for (int64_t m = 0; m < std::min(kSlots, a.M - first); ++m) loss += s.sum[m] / double(s.count(m));
  }
  *a.loss = static_cast<R>(loss);
}

template <class R>
void mimo_nll_backward(const MimoNllBackward<R>& a, const Team& team) noexcept {
  for (int64_t first = 0; a.dloss && first < a.M; first += kSlots) {
    const Slots s = slots<R>(a.labels, nullptr, a.N, a.M, first, a.ignore);
    for (int64_t m = 0; m < std::min(kSlots, a.M - first); ++m) {
      a.weight[first + m] = *a.dloss / static_cast<R>(s.count(m));
    }
  }
  team.run(team_size(kWork * a.N * a.M * a.K, team.most), backward_body<R>, &a);
}

template void mimo_nll(const MimoNll<float>&, const Team&) noexcept;
template void mimo_nll(const MimoNll<double>&, const Team&) noexcept;
template void mimo_nll_backward(const MimoNllBackward<float>&, const Team&) noexcept;
template void mimo_nll_backward(const MimoNllBackward<double>&, const Team&) noexcept;

}  // namespace fastseq::core
