// Gathering copies in the order of the output. Sums go by lists: for each row of the output, which rows of the input it
// is the sum of. A counting sort makes those of the adjoints, so that rows stand in ascending order.
#include "core/mimo.h"

#include <algorithm>
#include <cstring>

#include "core/isa.h"

namespace fastseq::core {
namespace {

constexpr int64_t kItems = 4;               // for each thread to draw
constexpr int64_t kNearBytes = 512 * 1024;  // of input rows that a thread goes through again and again
constexpr int64_t kLeastColumns = 64;

// ---- gather ----

// Rows [begin, end) of out [A * N * S, M], of elements that `copy` knows the size of.
template <class Copy>
void gather_rows(const MimoShape& s, Range rows, Copy copy) {
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const int64_t place = r % s.S, row = r / s.S, n = row % s.N, first = row / s.N * s.B;
    for (int64_t m = 0; m < s.M; ++m) copy(r * s.M + m, (first + s.index[m * s.N + n]) * s.S + place);
  }
}

// Of a size that is known here, so that a copy is one load and one store; arrays need not be aligned to it.
template <int kBytes>
void gather_elements(const MimoGather& g, Range rows) {
  const char* const x = static_cast<const char*>(g.x);
  char* const out = static_cast<char*>(g.out);
  gather_rows(g.shape, rows,
              [=](int64_t to, int64_t from) { std::memcpy(out + to * kBytes, x + from * kBytes, kBytes); });
}

void gather_body(const void* context, int, int size, Barrier& barrier) {
  const auto& g = *static_cast<const MimoGather*>(context);
  const int64_t rows = g.shape.A * g.shape.N * g.shape.S, pieces = std::min(rows, kItems * size);
  for (int64_t piece; (piece = barrier.draw()) < pieces;) {
    const Range mine{rows * piece / pieces, rows * (piece + 1) / pieces};
    if (g.bytes == 8) {
      gather_elements<8>(g, mine);
    } else if (g.bytes == 4) {
      gather_elements<4>(g, mine);
    } else if (g.bytes == 1) {
      gather_elements<1>(g, mine);
    } else {
      const char* const x = static_cast<const char*>(g.x);
      char* const out = static_cast<char*>(g.out);
      const int64_t bytes = g.bytes;
      gather_rows(g.shape, mine, [=](int64_t to, int64_t from) {
        std::memcpy(out + to * bytes, x + from * bytes, static_cast<size_t>(bytes));
      });
    }
  }
}

// ---- sums ----

// Row j of the output, at to[j] of its step and place, is the sum of the input rows at at[begin[j] .. begin[j + 1]].
struct Lists {
  int64_t rows;
  int64_t *begin, *at, *to;
  int64_t in_step, in_place, out_step, out_place;  // elements from one step to the next, and from place to place
};

Lists empty_lists(const MimoShape& s, void* scratch) {
  const int64_t most = std::max(s.N, s.B * s.M);
  int64_t* const begin = static_cast<int64_t*>(scratch);
  int64_t* const to = begin + round_up(most + 1);
  return {0, begin, to + round_up(most), to, 0, 0, 0, 0};
}

Lists combine_lists(const MimoShape& s, int64_t width, void* scratch) {
  Lists l = empty_lists(s, scratch);
  const int64_t wide = s.M * width;
  l.rows = s.N;
  for (int64_t n = 0; n <= s.N; ++n) l.begin[n] = n * s.M;
  for (int64_t n = 0; n < s.N; ++n) {
    l.to[n] = n * s.S * width;
    for (int64_t m = 0; m < s.M; ++m) l.at[n * s.M + m] = s.index[m * s.N + n] * s.S * wide + m * width;
  }
  l.in_step = s.B * s.S * wide, l.in_place = wide;
  l.out_step = s.N * s.S * width, l.out_place = width;
  return l;
}

// `slots`: a list for each example and slot, else for each example, those of slot 0 first.
Lists example_lists(const MimoShape& s, int64_t width, bool slots, void* scratch) {
  Lists l = empty_lists(s, scratch);
  const int64_t wide = s.M * width, per = slots ? s.M : 1, in = slots ? width : wide, out = slots ? wide : width;
  l.rows = s.B * per;
  std::fill_n(l.begin, l.rows + 1, int64_t(0));
  for (int64_t i = 0; i < s.M * s.N; ++i) ++l.begin[s.index[i] * per + (slots ? i / s.N : 0) + 1];
  for (int64_t j = 0; j < l.rows; ++j) {
    l.begin[j + 1] += l.begin[j];
    l.to[j] = l.begin[j];  // where its next row goes, until all have gone there
  }
  for (int64_t m = 0; m < s.M; ++m) {
    for (int64_t n = 0; n < s.N; ++n) {
      const int64_t j = s.index[m * s.N + n] * per + (slots ? m : 0);
      l.at[l.to[j]++] = n * s.S * in + (slots ? 0 : m * width);
    }
  }
  for (int64_t j = 0; j < l.rows; ++j) l.to[j] = j / per * s.S * out + j % per * width;
  l.in_step = s.N * s.S * in, l.in_place = in;
  l.out_step = s.B * s.S * out, l.out_place = out;
  return l;
}

template <class R>
struct Sums {
  const MimoSums<R>* call;
  Lists lists;
};

template <class R>
void sums_body(const void* context, int, int size, Barrier& barrier) {
  const auto& [call, l] = *static_cast<const Sums<R>*>(context);
  const MimoShape& s = call->shape;
  const Table<R>& table = table_of<R>(kernels());
  // Blocks of columns, whose input rows stay near while all lists go through them.
  const int64_t near =
      kNearBytes / static_cast<int64_t>(sizeof(R)) / std::max<int64_t>(1, l.in_step / s.S / call->width);
  const int64_t columns = std::max(kLeastColumns, near / kLeastColumns * kLeastColumns);
  const int64_t blocks = (call->width + columns - 1) / columns, lines = s.A * s.S * blocks;
  const int64_t pieces = lines ? std::min(l.rows, (kItems * size + lines - 1) / lines) : 0;
  for (int64_t item; (item = barrier.draw()) < lines * pieces;) {
    const int64_t piece = item % pieces, line = item / pieces / blocks, column = item / pieces % blocks * columns;
    const int64_t a = line / s.S, place = line % s.S;
    RowSum<R> sum;
    sum.start = call->bias ? call->bias + column : nullptr;
    sum.data = call->in + a * l.in_step + place * l.in_place + column;
    sum.columns = std::min(columns, call->width - column);
    R* const out = call->out + a * l.out_step + place * l.out_place + column;
    for (int64_t j = l.rows * piece / pieces; j < l.rows * (piece + 1) / pieces; ++j) {
      sum.at = l.at + l.begin[j];
      sum.count = l.begin[j + 1] - l.begin[j];
      sum.out = out + l.to[j];
      table.add_rows(sum);
    }
  }
}

template <class R>
void run_sums(const MimoSums<R>& call, const Lists& lists, const Team& team) {
  const MimoShape& s = call.shape;
  if (s.S == 0 || call.width == 0) return;
  const Sums<R> sums{&call, lists};
  const double rows = double(s.A) * s.S * (double(s.N) * s.M + lists.rows);
  team.run(team_size(kGatheredAdd * rows * call.width, team.most), sums_body<R>, &sums);
}

}  // namespace

void mimo_gather(const MimoGather& call, const Team& team) noexcept {
  const MimoShape& s = call.shape;
  if (call.bytes == 0) return;
  const double copies = double(s.A) * s.N * s.S * s.M;
  team.run(team_size(copies * (call.bytes / 4 + kGatheredAdd), team.most), gather_body, &call);
}

size_t mimo_sums_scratch(const MimoShape& s) {
  const int64_t most = std::max(s.N, s.B * s.M);
  return (round_up(most + 1) + round_up(most) + round_up(s.M * s.N)) * sizeof(int64_t);
}

template <class R>
void mimo_combine(const MimoSums<R>& call, void* scratch, const Team& team) noexcept {
  run_sums(call, combine_lists(call.shape, call.width, scratch), team);
}

template <class R>
void mimo_combine_backward(const MimoSums<R>& call, void* scratch, const Team& team) noexcept {
  run_sums(call, example_lists(call.shape, call.width, true, scratch), team);
}

template <class R>
void mimo_gather_backward(const MimoSums<R>& call, void* scratch, const Team& team) noexcept {
  run_sums(call, example_lists(call.shape, call.width, false, scratch), team);
}

template void mimo_combine(const MimoSums<float>&, void*, const Team&) noexcept;
template void mimo_combine(const MimoSums<double>&, void*, const Team&) noexcept;
template void mimo_combine_backward(const MimoSums<float>&, void*, const Team&) noexcept;
template void mimo_combine_backward(const MimoSums<double>&, void*, const Team&) noexcept;
template void mimo_gather_backward(const MimoSums<float>&, void*, const Team&) noexcept;
template void mimo_gather_backward(const MimoSums<double>&, void*, const Team&) noexcept;

}  // namespace fastseq::core
