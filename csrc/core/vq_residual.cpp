#include "core/vq_residual.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/isa.h"

namespace fastseq::core {
namespace {

constexpr int64_t kBlockRows = 4096;  // rows that go through all levels together

int64_t bytes(int64_t count, size_t size) { return (count * static_cast<int64_t>(size) + 63) / 64 * 64; }

template <class R>
int64_t block_of(const VqResidual<R>& a) {
  const bool sums = a.M && a.level[0].sums;
  return sums ? a.N : std::min(a.N, kBlockRows);
}

template <class R>
VqNearest<R> lookup(const VqResidual<R>& a, int64_t rows, const VqLevel<R>& level, const R* rest, const bool* used,
                    int64_t* index, R* distance, R* codes) {
  return {{1, rows, level.K, a.D, rest, level.codebook, used, false}, 1, 64, index, distance, nullptr, codes};
}

template <class R>
VqSums<R> sums_of(const VqResidual<R>& a, const VqLevel<R>& level, const R* rest, const int64_t* index) {
  return {1, a.N, level.K, a.D, rest, nullptr, nullptr, nullptr, R(1), index, level.counts, level.sums};
}

// What is left of the rows, the codes of a level, its index, which rows use it, and scratch of the parts.
template <class R>
struct Scratch {
  R *rest, *codes;
  int64_t* index;
  bool* used;
  char* parts;
  int64_t total;
  Scratch(const VqResidual<R>& a, int most, char* base) {
    const int64_t rows = block_of(a);
    int64_t at = 0, largest = 0;
    const bool some = true;
    const auto take = [&](int64_t size) {
      char* const p = base ? base + at : nullptr;
      at += size;
      return p;
    };
    rest = reinterpret_cast<R*>(take(bytes(rows * a.D, sizeof(R))));
    codes = reinterpret_cast<R*>(take(bytes(rows * a.D, sizeof(R))));
    index = reinterpret_cast<int64_t*>(take(bytes(rows, sizeof(int64_t))));
    used = reinterpret_cast<bool*>(take(bytes(rows, 1)));
    for (int64_t m = 0; m < a.M; ++m) {
      const VqLevel<R>& level = a.level[m];
      for (const int64_t n : {rows, a.N % rows}) {  // the last block may be smaller, and need more for its size
        // only whether there is a mask matters for its size
        const auto parts_of = lookup(a, n, level, a.x, a.mask || a.levels ? &some : nullptr, index, a.distance, codes);
        largest = std::max<int64_t>(largest, vq_nearest_scratch(parts_of, most));
      }
      if (level.sums) largest = std::max<int64_t>(largest, vq_sums_scratch(sums_of(a, level, a.x, index), most));
    }
    parts = take(largest);
    total = at;
  }
};

// Takes the codes off what is left, and adds them up.
template <class R>
struct Step {
  const VqResidual<R>* args;
  const Scratch<R>* scratch;
  int64_t first, rows, m;
};
template <class R>
void step_body(const void* context, int rank, int size, Barrier&) {
  const auto& s = *static_cast<const Step<R>*>(context);
  const VqResidual<R>& a = *s.args;
  const Range mine = share(s.rows, rank, size);
  R* const out = a.quantized + s.first * a.D;
  R* __restrict const rest = s.scratch->rest;
  const R* __restrict const codes = s.scratch->codes;
  for (int64_t i = mine.begin * a.D; i < mine.end * a.D; ++i) rest[i] -= codes[i];
  if (s.m) {
    for (int64_t i = mine.begin * a.D; i < mine.end * a.D; ++i) out[i] += codes[i];
  } else {
    std::copy(codes + mine.begin * a.D, codes + mine.end * a.D, out + mine.begin * a.D);
  }
  for (int64_t i = mine.begin; i < mine.end; ++i) a.index[(s.first + i) * a.M + s.m] = s.scratch->index[i];
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
  return a.N ? Scratch<R>(a, most, nullptr).total : 0;
}

template <class R>
void vq_residual(const VqResidual<R>& a, void* memory, const Team& team) noexcept {
  if (a.N == 0) {
    for (int64_t m = 0; m < a.M; ++m) {
      if (!a.level[m].sums) continue;
      std::fill_n(a.level[m].counts, a.level[m].K, R(0));
      std::fill_n(a.level[m].sums, a.level[m].K * a.D, R(0));
    }
    return;
  }
  const Scratch<R> s(a, team.most, static_cast<char*>(memory));
  const int64_t block = block_of(a);
  for (int64_t first = 0; first < a.N; first += block) {
    const int64_t rows = std::min(block, a.N - first);
    std::memcpy(s.rest, a.x + first * a.D, rows * a.D * sizeof(R));
    for (int64_t m = 0; m < a.M; ++m) {
      for (int64_t i = 0; i < rows; ++i) {
        s.used[i] = (!a.mask || a.mask[first + i]) && (!a.levels || m < a.levels[first + i]);
      }
      const bool* const used = a.mask || a.levels ? s.used : nullptr;
      vq_nearest(lookup(a, rows, a.level[m], s.rest, used, s.index, a.distance + m * a.N + first, s.codes), s.parts,
                 team);
      if (a.level[m].sums) vq_sums(sums_of(a, a.level[m], s.rest, s.index), s.parts, team);
      const Step<R> step{&a, &s, first, rows, m};
      team.run(team_size(double(rows) * a.D, team.most), step_body<R>, &step);
    }
  }
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
