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

// Of the labels of slot m, those that are not ignored, at least 1.
int64_t given(const int64_t* labels, int64_t N, int64_t M, int64_t m, int64_t ignore) {
  int64_t count = 0;
  for (int64_t n = 0; n < N; ++n) count += labels[n * M + m] != ignore;
  return std::max<int64_t>(1, count);
}

}  // namespace

template <class R>
void mimo_nll(const MimoNll<R>& a, const Team& team) noexcept {
  team.run(team_size(kWork * a.N * a.M * a.K, team.most), forward_body<R>, &a);
  double loss = 0;
  for (int64_t m = 0; m < a.M; ++m) {
    double sum = 0;
    for (int64_t n = 0; n < a.N; ++n) sum += a.nll[n * a.M + m];
    loss += sum / double(given(a.labels, a.N, a.M, m, a.ignore));
  }
  *a.loss = static_cast<R>(loss);
}

template <class R>
void mimo_nll_backward(const MimoNllBackward<R>& a, const Team& team) noexcept {
  for (int64_t m = 0; a.dloss && m < a.M; ++m) {
    a.weight[m] = *a.dloss / static_cast<R>(given(a.labels, a.N, a.M, m, a.ignore));
  }
  team.run(team_size(kWork * a.N * a.M * a.K, team.most), backward_body<R>, &a);
}

template void mimo_nll(const MimoNll<float>&, const Team&) noexcept;
template void mimo_nll(const MimoNll<double>&, const Team&) noexcept;
template void mimo_nll_backward(const MimoNllBackward<float>&, const Team&) noexcept;
template void mimo_nll_backward(const MimoNllBackward<double>&, const Team&) noexcept;

}  // namespace fastseq::core
