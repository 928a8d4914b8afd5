// Sums of rows by code: a counting sort puts the rows of each code side by side, in ascending order; then each code is
// one sum in that order. No thread adds to what another does, so nothing depends on their number.
#include <algorithm>

#include "core/isa.h"
#include "core/vq.h"

namespace fastseq::core {
namespace {

constexpr int64_t kPieces = 8;  // for each thread to draw

template <class R>
struct Call {
  const VqSums<R>* args;
  int64_t* scratch;
};

// Exclusive sums over codes, and for each code over threads: where each thread puts its rows. `totals` [size].
void places(int64_t* first, int64_t* totals, int64_t K, int rank, int size, Barrier& barrier) {
  const Range mine = share(K, rank, size);
  int64_t sum = 0;
  for (int64_t k = mine.begin; k < mine.end; ++k) {
    for (int t = 0; t < size; ++t) {
      const int64_t count = first[t * (K + 1) + k];
      first[t * (K + 1) + k] = sum;
      sum += count;
    }
  }
  totals[rank] = sum;
  barrier.wait();
  int64_t before = 0;
  for (int t = 0; t < rank; ++t) before += totals[t];
  for (int64_t k = mine.begin; k < mine.end; ++k) {
    for (int t = 0; t < size; ++t) first[t * (K + 1) + k] += before;
  }
}

template <class R>
void body(const void* context, int rank, int size, Barrier& barrier) {
  const auto& call = *static_cast<const Call<R>*>(context);
  const VqSums<R>& a = *call.args;
  const Table<R>& table = table_of<R>(kernels());
  const int64_t K = a.K, N = a.N;
  int64_t* const order = call.scratch;              // [N] rows by code
  int64_t* const begin = order + round_up(N);       // [K + 1] where each code begins
  int64_t* const totals = begin + round_up(K + 1);  // [size]
  int64_t* const first = totals + round_up(size);   // [size, K + 1]
  int64_t* const own = first + rank * (K + 1);
  for (int64_t g = 0; g < a.G; ++g) {
    const int64_t* const index = a.index + g * N;
    const Range rows = share(N, rank, size);
    std::fill_n(own, K, int64_t(0));
    for (int64_t n = rows.begin; n < rows.end; ++n) {
      if (index[n] >= 0) ++own[index[n]];
    }
    barrier.wait();
    places(first, totals, K, rank, size, barrier);
    barrier.wait();
    if (rank == 0) {
      std::copy_n(first, K, begin);
      begin[K] = 0;
      for (int t = 0; t < size; ++t) begin[K] += totals[t];
    }
    barrier.wait();
    for (int64_t n = rows.begin; n < rows.end; ++n) {
      if (index[n] >= 0) order[own[index[n]]++] = n;
    }
    barrier.wait();
    // Pieces of about as many rows: a code belongs to the piece in which its first row lies.
    const int64_t pieces = std::min<int64_t>(kPieces * size, K);
    const auto code_at = [&](int64_t piece) {
      if (piece == pieces) return K;
      const int64_t row = begin[K] * piece / pieces, even = K * piece / pieces;
      return begin[K] == 0 ? even : std::lower_bound(begin, begin + K, row) - begin;
    };
    for (int64_t piece; (piece = barrier.draw()) < pieces;) {
      for (int64_t k = piece ? code_at(piece) : 0; k < code_at(piece + 1); ++k) {
        if (a.counts) a.counts[g * K + k] = static_cast<R>(begin[k + 1] - begin[k]);
        if (a.sums) table.vq_sum(a, g * N, order + begin[k], begin[k + 1] - begin[k], a.sums + (g * K + k) * a.D);
      }
    }
    barrier.wait();
  }
}

template <class R>
void rows_body(const void* context, int rank, int size, Barrier&) {
  const auto& a = *static_cast<const VqRows<R>*>(context);
  const Range mine = share(a.rows, rank, size);
  table_of<R>(kernels()).vq_rows(a, mine.begin, mine.end);
}

}  // namespace

template <class R>
size_t vq_sums_scratch(const VqSums<R>& a, int most) {
  const int64_t K = a.K + 1;
  return (round_up(a.N) + round_up(K) + round_up(most) + most * K) * sizeof(int64_t);
}

template <class R>
void vq_sums(const VqSums<R>& args, void* scratch, const Team& team) noexcept {
  const Call<R> call{&args, static_cast<int64_t*>(scratch)};
  team.run(team_size(double(args.G) * args.N * (args.D + 16), team.most), body<R>, &call);
}

template <class R>
void vq_rows(const VqRows<R>& args, const Team& team) noexcept {
  team.run(team_size(4.0 * args.rows * args.D, team.most), rows_body<R>, &args);
}

template size_t vq_sums_scratch(const VqSums<float>&, int);
template size_t vq_sums_scratch(const VqSums<double>&, int);
template void vq_sums(const VqSums<float>&, void*, const Team&) noexcept;
template void vq_sums(const VqSums<double>&, void*, const Team&) noexcept;
template void vq_rows(const VqRows<float>&, const Team&) noexcept;
template void vq_rows(const VqRows<double>&, const Team&) noexcept;

}  // namespace fastseq::core
