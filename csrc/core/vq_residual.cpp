#include "core/vq_residual.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/isa.h"
#include "core/vq_rows.h"

namespace fastseq::core {
namespace {

template <class R>
int64_t codes_of(const VqResidual<R>& a) {
  int64_t K = 0;
  for (int64_t m = 0; m < a.M; ++m) K += a.level[m].K;
  return K;
}
template <class R>
bool wants_sums(const VqResidual<R>& a) {
  return a.M && a.level[0].sums;
}

// The sums of all levels at once: M * N rows, and the codes of the levels one after the other.
template <class R>
VqSums<R> sums_of(const VqResidual<R>& a, const R* rest, const int64_t* index, int64_t K) {
  return {1, a.M * a.N, K, a.D, rest, nullptr, nullptr, nullptr, R(1), index, a.level[0].counts, a.level[0].sums};
}

template <class R>
struct Scratch {
  R* start;             // of the codes of each level, from starts(m) on
  R* rest;              // [M, N, D] what is left before each level, where sums are wanted
  int64_t* code;        // [M, N] number of the code among those of all levels, or -1
  char *parts, *local;  // of the sums, and of each thread
  int64_t local_bytes, total;
  Scratch(const VqResidual<R>& a, int most, char* base) {
    const Table<R>& table = table_of<R>(kernels());
    int64_t at = 0;
    const auto take = [&](int64_t size) {
      char* const p = base ? base + at : nullptr;
      at += size;
      return p;
    };
    const int64_t K = codes_of(a), rows = wants_sums(a) ? a.M * a.N : 0;
    start = reinterpret_cast<R*>(take(bytes<R>(K + a.M * table.panel_width)));
    rest = reinterpret_cast<R*>(take(bytes<R>(rows * a.D)));
    code = reinterpret_cast<int64_t*>(take(bytes<int64_t>(rows)));
    parts = take(rows ? vq_sums_scratch(sums_of(a, rest, code, K), most) : 0);
    const int64_t lanes = RowBlock<R>::most_panels(table, a.D) * table.panel_width;
    local_bytes = RowBlock<R>::memory(table, a.D) + bytes<R>(lanes * a.D);
    local = take(most * local_bytes);
    total = at;
  }
};

template <class R>
struct Call {
  const VqResidual<R>* args;
  const Scratch<R>* scratch;
};

// Where the starts of the codes of level m begin: each level has whole panels.
template <class R>
int64_t starts(const VqResidual<R>& a, int64_t m, int64_t width) {
  int64_t at = 0;
  for (int64_t i = 0; i < m; ++i) at += (a.level[i].K + width - 1) / width * width;
  return at;
}

// Rows [first, first + count) through all levels. Level m finds those that use it in front.
template <class R>
void block(const VqResidual<R>& a, const Scratch<R>& s, const Table<R>& table, char* local, int64_t first,
           int64_t count) {
  const int64_t D = a.D;
  RowBlock<R> lanes(table, D, local);
  R* const rest = reinterpret_cast<R*>(local + RowBlock<R>::memory(table, D));
  std::memcpy(rest, a.x + first * D, count * D * sizeof(R));
  std::fill_n(a.quantized + first * D, count * D, R(0));
  int64_t used[kMostRowPanels * kMostPanelWidth], offset = 0;
  for (int64_t m = 0; m < a.M; ++m) {
    const VqLevel<R>& level = a.level[m];
    int64_t rows = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t n = first + i;
      if (wants_sums(a)) std::memcpy(s.rest + (m * a.N + n) * D, rest + i * D, D * sizeof(R));
      if ((!a.mask || a.mask[n]) && (!a.levels || m < a.levels[n])) {
        used[rows++] = i;
        continue;
      }
      a.index[n * a.M + m] = -1;
      a.distance[m * a.N + n] = R(0);
      if (wants_sums(a)) s.code[m * a.N + n] = -1;
    }
    lanes.load(rows, [&](int64_t i) { return rest + used[i] * D; });
    lanes.meet(level.codebook, s.start + starts(a, m, table.panel_width), 0, rows ? level.K : 0);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t n = first + used[i], k = lanes.index(i);
      R* const left = rest + used[i] * D;
      R* const sum = a.quantized + n * D;
      const R* const code = level.codebook + k * D;
      a.index[n * a.M + m] = k;
      a.distance[m * a.N + n] = table.vq_distance(left, code, D, nullptr);
      if (wants_sums(a)) s.code[m * a.N + n] = offset + k;
      for (int64_t d = 0; d < D; ++d) {
        left[d] -= code[d];
        sum[d] += code[d];
      }
    }
    offset += level.K;
  }
}

template <class R>
void body(const void* context, int rank, int size, Barrier& barrier) {
  const auto& call = *static_cast<const Call<R>*>(context);
  const VqResidual<R>& a = *call.args;
  const Scratch<R>& s = *call.scratch;
  const Table<R>& table = table_of<R>(kernels());
  const int64_t width = table.panel_width;
  char* const local = s.local + rank * s.local_bytes;
  for (int64_t m = 0; m < a.M; ++m) {
    const Range mine = share((a.level[m].K + width - 1) / width, rank, size);
    R* const start = s.start + starts(a, m, width);
    for (int64_t panel = mine.begin; panel < mine.end; ++panel) {
      transpose_codes(table, a.level[m].codebook, a.level[m].K, a.D, false, panel, reinterpret_cast<R*>(local),
                      start + panel * width);
    }
  }
  barrier.wait();
  const int64_t panels = (a.N + width - 1) / width;
  const int64_t rows = width * std::clamp<int64_t>(panels / (4 * size), 1, RowBlock<R>::most_panels(table, a.D));
  for (int64_t item; (item = barrier.draw()) * rows < a.N;) {
    block(a, s, table, local, item * rows, std::min(rows, a.N - item * rows));
  }
}

template <class R>
void rows_body(const void* context, int rank, int size, Barrier&) {
  const auto& call = *static_cast<const std::pair<const VqResidualRows<R>*, R*>*>(context);
  const VqResidualRows<R>& a = *call.first;
  const Table<R>& table = table_of<R>(kernels());
  R* const rest = call.second + rank * round_up(2 * a.D);
  R* const part = rest + a.D;
  const Range mine = share(a.N, rank, size);
  for (int64_t n = mine.begin; n < mine.end; ++n) {
    std::memcpy(rest, a.x + n * a.D, a.D * sizeof(R));
    R* const dx = a.dx + n * a.D;
    std::fill_n(dx, a.D, R(0));
    for (int64_t m = 0; m < a.M; ++m) {
      const int64_t k = a.index[n * a.M + m];
      if (k < 0) continue;
      const R* const code = a.codebook[m] + k * a.D;
      const VqRows<R> row{1,
                          a.D,
                          a.dquantized ? a.dquantized + n * a.D : nullptr,
                          a.dcommitment ? a.dcommitment + m * a.N + n : nullptr,
                          rest,
                          code,
                          &k,
                          a.rotation,
                          part};
      table.vq_rows(row, 0, 1);
      for (int64_t d = 0; d < a.D; ++d) dx[d] += part[d], rest[d] -= code[d];
    }
  }
}

}  // namespace

template <class R>
size_t vq_residual_scratch(const VqResidual<R>& a, int most) {
  return Scratch<R>(a, most, nullptr).total;
}

template <class R>
void vq_residual(const VqResidual<R>& a, void* memory, const Team& team) noexcept {
  const Scratch<R> s(a, team.most, static_cast<char*>(memory));
  const int64_t K = codes_of(a);
  const Call<R> call{&a, &s};
  if (a.N) team.run(team_size(double(a.N) * K * a.D, team.most), body<R>, &call);
  if (wants_sums(a)) vq_sums(sums_of(a, s.rest, s.code, K), s.parts, team);
}

template <class R>
size_t vq_residual_rows_scratch(const VqResidualRows<R>& a, int most) {
  return most * round_up(2 * a.D) * sizeof(R);
}

template <class R>
void vq_residual_rows(const VqResidualRows<R>& a, void* scratch, const Team& team) noexcept {
  const std::pair<const VqResidualRows<R>*, R*> call{&a, static_cast<R*>(scratch)};
  team.run(team_size(4.0 * a.N * a.D * a.M, team.most), rows_body<R>, &call);
}

template size_t vq_residual_scratch(const VqResidual<float>&, int);
template size_t vq_residual_scratch(const VqResidual<double>&, int);
template void vq_residual(const VqResidual<float>&, void*, const Team&) noexcept;
template void vq_residual(const VqResidual<double>&, void*, const Team&) noexcept;
template size_t vq_residual_rows_scratch(const VqResidualRows<float>&, int);
template size_t vq_residual_rows_scratch(const VqResidualRows<double>&, int);
template void vq_residual_rows(const VqResidualRows<float>&, void*, const Team&) noexcept;
template void vq_residual_rows(const VqResidualRows<double>&, void*, const Team&) noexcept;

}  // namespace fastseq::core
