// A linear layer of gathered rows. Either (`shared`) the product is made for the B examples and all M slots, a block of
// columns at a time, into parts that stay in the second cache, and the output rows are summed up from there; or it is
// made for each row, whose elements are taken through the index where A is packed, and the slots add up in the product.
// mimo_by_example decides. Backward goes the same way: sums over the rows of each example and slot, then products of
// the examples; or products of the rows.
#include <algorithm>
#include <cstring>

#include "core/column_sum.h"
#include "core/flush.h"
#include "core/gemm.h"
#include "core/isa.h"
#include "core/mimo.h"

namespace fastseq::core {
namespace {

constexpr int64_t kBlockRows = 240;          // of A in the second cache, as in gemm.cpp
constexpr int64_t kPartsBytes = 512 * 1024;  // beside them
constexpr int64_t kItems = 4;                // for each thread to draw
constexpr int64_t kTogether = 4;             // panels for a tile of few rows, to fill the pipeline

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A line is what is worked on together: of one step and place all examples, or one row.
template <class R>
struct Plan {
  bool shared;
  int64_t lines, line_rows, line_outputs;  // rows of the product and of the output, of each line
  int64_t terms;                           // parts that make an output row
  int64_t width, panels, length, a_row;    // of the product, as in gemm.cpp
  int64_t blocks, block_rows;              // of lines
  int64_t group, groups;                   // panels of a block of columns
  int64_t part_row, packed, offsets, local_a, local;

  Plan(const MimoProject<R>& p, const Table<R>& table, int most) {
    const MimoShape& s = p.shape;
    shared = mimo_by_example(s, p.C);
    lines = shared ? s.A * s.S : s.A * s.N * s.S;
    line_rows = shared ? s.B : 1;
    line_outputs = shared ? s.N : 1;
    terms = shared ? s.M : 1;
    width = table.panel_width;
    panels = ceil_div(p.G, width);
    length = block_k(p.C);
    a_row = round_up(length) + 16;
    blocks = ceil_div(lines, std::max<int64_t>(1, kBlockRows / std::max<int64_t>(1, line_rows)));
    block_rows = blocks ? ceil_div(lines, blocks) * line_rows : 0;
    const int64_t bytes = std::max<int64_t>(1, block_rows) * terms * width * static_cast<int64_t>(sizeof(R));
    const int64_t fits = std::min(kPartsBytes / bytes, panels * blocks / (kItems * most));
    group = std::clamp<int64_t>(fits, 1, std::max<int64_t>(1, panels));
    groups = ceil_div(panels, group);
    part_row = terms * group * width;
    packed = round_up(panels * s.M * p.C * width);
    offsets = round_up(line_outputs * terms);
    local_a = std::min(kBlockRows, block_rows) * a_row;
    local = round_up(local_a + block_rows * part_row);
  }
};

template <class R>
struct Call {
  const MimoProject<R>& p;
  const Table<R>& table;
  Plan<R> plan;
  int64_t* at;  // [line_outputs, terms] where the parts of an output row begin
  R *weight, *local;

  void pack_weight(int rank, int size) const;
  const R* row(int64_t line, int64_t i, int64_t m) const;
  void multiply(int64_t first_line, Range rows, int64_t panel, int64_t panels, R* a, R* parts) const;
  void run(int64_t block, int64_t group, R* mine) const;
};

// Panel p of slot m is [C][width], at (p * M + m).
template <class R>
void Call<R>::pack_weight(int rank, int size) const {
  const int64_t M = p.shape.M, width = plan.width;
  const Range mine = share(plan.panels * M, rank, size);
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    const int64_t first = i / M * width;
    table.pack_rows({{p.weight, M * p.C, nullptr},
                     first,
                     i % M * p.C,
                     std::min(width, p.G - first),
                     p.C,
                     width,
                     weight + i * p.C * width});
  }
}

// Row i of a line, as slot m takes it.
template <class R>
const R* Call<R>::row(int64_t line, int64_t i, int64_t m) const {
  const MimoShape& s = p.shape;
  const int64_t place = line % s.S, step = line / s.S;
  const int64_t example = plan.shared ? step * s.B + i : step / s.N * s.B + s.index[m * s.N + step % s.N];
  return p.x + (example * s.S + place) * p.C;
}

// Some rows of a block of lines, at most kBlockRows, against a block of columns.
template <class R>
void Call<R>::multiply(int64_t first_line, Range rows, int64_t panel, int64_t panels, R* a, R* parts) const {
  const int64_t M = p.shape.M, count = rows.end - rows.begin, width = plan.width;
  const int64_t tiles = ceil_div(count, table.tile_rows), cap = ceil_div(count, tiles);
  const int64_t together = cap <= table.tile_rows / 2 ? kTogether : 1;
  TileArgs<R> t;
  t.a_step = 1;
  t.b_panel = M * p.C * width;
  t.c_row = plan.part_row;
  t.c_panel = width;
  t.bias = nullptr;
  for (int64_t k = 0; k < p.C || k == 0; k += plan.length) {
    t.K = std::min(plan.length, p.C - k);
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t i = rows.begin; i < rows.end && (m == 0 || !plan.shared); ++i) {
        const R* const from = row(first_line + i / plan.line_rows, i % plan.line_rows, m) + k;
        std::memcpy(a + (i - rows.begin) * plan.a_row, from, t.K * sizeof(R));
      }
      t.init = k || (m && !plan.shared) ? Init::result : Init::zero;
      R* const c = parts + rows.begin * plan.part_row + (plan.shared ? m * plan.group * width : 0);
      for (int64_t n = 0; n < panels; n += together) {
        t.panels = std::min(together, panels - n);
        t.b = weight + (((panel + n) * M + m) * p.C + k) * width;
        for (int64_t i = 0; i < count; i += cap) {
          t.rows = std::min(cap, count - i);
          for (int64_t r = 0; r < t.rows; ++r) t.a[r] = a + (i + r) * plan.a_row;
          t.c = c + i * plan.part_row + n * width;
          table.tile(t);
        }
      }
    }
  }
}

template <class R>
void Call<R>::run(int64_t block, int64_t group, R* mine) const {
  const MimoShape& s = p.shape;
  R* const parts = mine + plan.local_a;
  const Range lines = {plan.lines * block / plan.blocks, plan.lines * (block + 1) / plan.blocks};
  const int64_t panel = group * plan.group, panels = std::min(plan.group, plan.panels - panel);
  const int64_t rows = (lines.end - lines.begin) * plan.line_rows;
  for (int64_t r = 0; r < rows; r += kBlockRows) {
    multiply(lines.begin, {r, std::min(rows, r + kBlockRows)}, panel, panels, mine, parts);
  }
  const int64_t column = panel * plan.width;
  RowSum<R> sum;
  sum.start = p.bias ? p.bias + column : nullptr;
  sum.count = plan.terms;
  sum.columns = std::min(panels * plan.width, p.G - column);
  for (int64_t line = lines.begin; line < lines.end; ++line) {
    sum.data = parts + (line - lines.begin) * plan.line_rows * plan.part_row;
    R* const out = p.out + (plan.shared ? (line / s.S * s.N * s.S + line % s.S) : line) * p.G + column;
    for (int64_t n = 0; n < plan.line_outputs; ++n) {
      sum.at = at + n * plan.terms;
      sum.out = out + n * s.S * p.G;
      table.add_rows(sum);
    }
  }
}

template <class R>
void project_body(const void* context, int rank, int size, Barrier& barrier) {
  const auto& call = *static_cast<const Call<R>*>(context);
  const FlushDenormals flush;
  call.pack_weight(rank, size);
  barrier.wait();
  R* const mine = call.local + rank * call.plan.local;
  for (int64_t item; (item = barrier.draw()) < call.plan.groups * call.plan.blocks;) {
    call.run(item % call.plan.blocks, item / call.plan.blocks, mine);
  }
}

// ---- backward ----

// Rows of a matrix that lie anywhere: an address for each. Room for the larger of the two products that need them.
template <class R>
int64_t row_places(const MimoProjectBackward<R>& b) {
  const MimoShape& s = b.shape;
  return round_up(mimo_by_example(s, b.C) ? s.M * b.G : s.A * s.N * s.S);
}

// The gradient of the columns of slot m.
template <class R>
GemmArgs<R> product_dweight(const MimoProjectBackward<R>& b, const R* d, int64_t m, const R** rows) {
  const MimoShape& s = b.shape;
  const bool shared = mimo_by_example(s, b.C);
  const int64_t K = s.A * s.S * (shared ? s.B : s.N), stride = shared ? s.M * b.G : b.G;
  const Matrix<R> left{shared ? d + m * b.G : d, stride, nullptr}, right{b.x, b.C, shared ? nullptr : rows};
  return {b.G, b.C, K, left, right, true, false, nullptr, b.dweight + m * b.C, s.M * b.C};
}

// What d [rows, M*G] of the examples gives to x, or d [rows, G] to the gathered rows.
template <class R>
GemmArgs<R> product_dx(const MimoProjectBackward<R>& b, const R* d, const R** rows, R* dx) {
  const MimoShape& s = b.shape;
  if (mimo_by_example(s, b.C)) {
    const int64_t K = s.M * b.G;
    return {s.A * s.B * s.S, b.C, K, {d, K, nullptr}, {b.weight, 0, rows}, false, false, nullptr, dx};
  }
  const int64_t C = s.M * b.C;
  return {s.A * s.N * s.S, C, b.G, {d, b.G, nullptr}, {b.weight, C, nullptr}, false, false, nullptr, dx};
}

// Elements that lie between the two steps of each way.
template <class R>
int64_t between(const MimoProjectBackward<R>& b) {
  const MimoShape& s = b.shape;
  if (mimo_by_example(s, b.C)) return round_up(s.A * s.B * s.S * s.M * b.G);
  return b.dx ? round_up(s.A * s.N * s.S * s.M * b.C) : 0;
}

template <class R>
void columns(const R* data, int64_t rows, int64_t count, int64_t stride, R* out, const Team& team) {
  const ColumnSum<R> sum{data, rows, count, stride, out};
  team.run(team_size(double(rows) * count, team.most), column_sum<R>, &sum);
}

template <class R>
void backward_by_example(const MimoProjectBackward<R>& b, R* parts, const R** rows, R* scratch, const Team& team) {
  const MimoShape& s = b.shape;
  mimo_combine_backward<R>({s, b.G, b.d, nullptr, parts}, scratch, team);
  for (int64_t m = 0; b.dweight && m < s.M; ++m) gemm(product_dweight(b, parts, m, rows), scratch, team);
  if (b.dx) {
    for (int64_t i = 0; i < s.M * b.G; ++i) rows[i] = b.weight + (i % b.G * s.M + i / b.G) * b.C;
    gemm(product_dx(b, parts, rows, b.dx), scratch, team);
  }
  if (b.dbias) columns(parts, s.A * s.B * s.S, b.G, s.M * b.G, b.dbias, team);  // each row is in slot 0 once
}

template <class R>
void backward_by_row(const MimoProjectBackward<R>& b, R* drows, const R** rows, R* scratch, const Team& team) {
  const MimoShape& s = b.shape;
  for (int64_t m = 0; b.dweight && m < s.M; ++m) {
    for (int64_t i = 0; i < s.A * s.N * s.S; ++i) {
      const int64_t row = i / s.S, example = row / s.N * s.B + s.index[m * s.N + row % s.N];
      rows[i] = b.x + (example * s.S + i % s.S) * b.C;
    }
    gemm(product_dweight(b, b.d, m, rows), scratch, team);
  }
  if (b.dx) {
    gemm(product_dx(b, b.d, rows, drows), scratch, team);
    mimo_gather_backward<R>({s, b.C, drows, nullptr, b.dx}, scratch, team);
  }
  if (b.dbias) columns(b.d, s.A * s.N * s.S, b.G, b.G, b.dbias, team);
}

}  // namespace

template <class R>
size_t mimo_project_scratch(const MimoProject<R>& call, int most) {
  const Plan<R> plan(call, table_of<R>(kernels()), most);
  return plan.offsets * sizeof(int64_t) + (plan.packed + most * plan.local) * sizeof(R);
}

template <class R>
void mimo_project(const MimoProject<R>& p, void* scratch, const Team& team) noexcept {
  const MimoShape& s = p.shape;
  if (s.A * s.N * s.S * p.G == 0) return;
  const Table<R>& table = table_of<R>(kernels());
  const Plan<R> plan(p, table, team.most);
  int64_t* const at = static_cast<int64_t*>(scratch);
  for (int64_t i = 0; i < plan.line_outputs * plan.terms; ++i) {
    const int64_t n = i / plan.terms, m = i % plan.terms;
    at[i] = plan.shared ? (s.index[m * s.N + n] * s.M + m) * plan.group * plan.width : 0;
  }
  R* const rest = reinterpret_cast<R*>(at + plan.offsets);
  const Call<R> call{p, table, plan, at, rest, rest + plan.packed};
  const double multiply_adds = double(plan.lines) * plan.line_rows * s.M * p.C * p.G;
  const double adds = double(plan.lines) * plan.line_outputs * plan.terms * p.G;
  team.run(team_size(multiply_adds + kGatheredAdd * adds, team.most), project_body<R>, &call);
}

template <class R>
size_t mimo_project_scratch(const MimoProjectBackward<R>& b, int most) {
  const size_t sums = mimo_sums_scratch(b.shape);
  size_t product = 0;
  if (b.dweight) product = gemm_scratch(product_dweight<R>(b, b.d, 0, nullptr), most);
  if (b.dx) product = std::max(product, gemm_scratch(product_dx<R>(b, b.d, nullptr, nullptr), most));
  return row_places(b) * sizeof(R*) + between(b) * sizeof(R) + std::max(sums, product * sizeof(R));
}

template <class R>
void mimo_project_backward(const MimoProjectBackward<R>& b, void* scratch, const Team& team) noexcept {
  const R** const rows = static_cast<const R**>(scratch);
  R* const first = reinterpret_cast<R*>(rows + row_places(b));
  R* const rest = first + between(b);
  if (mimo_by_example(b.shape, b.C)) {
    backward_by_example(b, first, rows, rest, team);
  } else {
    backward_by_row(b, first, rows, rest, team);
  }
}

template size_t mimo_project_scratch(const MimoProject<float>&, int);
template size_t mimo_project_scratch(const MimoProject<double>&, int);
template size_t mimo_project_scratch(const MimoProjectBackward<float>&, int);
template size_t mimo_project_scratch(const MimoProjectBackward<double>&, int);
template void mimo_project(const MimoProject<float>&, void*, const Team&) noexcept;
template void mimo_project(const MimoProject<double>&, void*, const Team&) noexcept;
template void mimo_project_backward(const MimoProjectBackward<float>&, void*, const Team&) noexcept;
template void mimo_project_backward(const MimoProjectBackward<double>&, void*, const Team&) noexcept;

}  // namespace fastseq::core
