// The rows are made integers once, by all threads; then the threads draw panels of the matrix and run each against all
// rows, while it lies in the nearest caches. With factors the lower ones come first, and what they make is made integers
// in turn.
#include <cstring>

#include "core/flush.h"
#include "core/matrix_rows.h"

namespace fastseq::core {
namespace {


struct Linear {
  const PackedMatrix& w;
  const LinearPacked& call;
  const MatrixTable& table;
  Integers x;          // of the input
  float* values;       // [M][down.N] what the lower factors make
  Integers upper[4];   // of them, by gate
  float* local;        // per thread: a tile of results
  int64_t local_size;  // floats

  Linear(const PackedMatrix& w, const LinearPacked& call, const MatrixTable& table) : w(w), call(call), table(table) {
    x.init(w.K);
    if (w.down.N) x.groupings.add(w.down);
    for (int g = 0; g < w.gates; ++g) {
      Integers& meets = w.gate[g].rank ? upper[g] : x;
      if (w.gate[g].rank) meets.init(w.gate[g].rank);
      meets.groupings.add(w.gate[g].piece);
    }
    local_size = round_up(table.rows * w.gates * kMatrixPanel);
  }
  void place(Places& places, int most) {
    x.place(places, call.M, true);
    values = places.take<float>(call.M * w.down.N);
    for (Integers& u : upper) u.place(places, call.M, true);
    local = places.take<float>(most * local_size);
  }

  TileRows rows(int64_t first, const float* data, int64_t stride, const Integers& integers) const {
    TileRows t;
    t.count = std::min<int64_t>(table.rows, call.M - first);
    t.integers = &integers;
    for (int64_t i = 0; i < t.count; ++i) {
      t.x[i] = data + (first + i) * stride;
      t.number[i] = first + i;
    }
    return t;
  }
  void lower_panel(int64_t panel) const {
    for (int64_t m = 0; m < call.M; m += table.rows) {
      const TileRows t = rows(m, call.x, call.x_stride, x);
      float* const out = values + m * w.down.N + panel * kMatrixPanel;
      multiply(table, w.down, panel, 1, 1, t, out, w.down.N, kMatrixPanel);
    }
  }
  void store(const float* from, int64_t m, int gate, int64_t panel) const {
    const int64_t H = w.N / w.gates, unit = panel * kMatrixPanel, count = std::min(kMatrixPanel, H - unit);
    float* const y = call.y + m * call.y_stride + gate * H + unit;
    if (!call.bias) return void(std::memcpy(y, from, count * sizeof(float)));
    const float* const bias = call.bias + gate * H + unit;
    for (int64_t n = 0; n < count; ++n) y[n] = from[n] + bias[n];
  }
  // The same panel of every gate.
  void panel(int64_t panel, float* out) const {
    const int64_t row = w.gates * kMatrixPanel;
    for (int64_t m = 0; m < call.M; m += table.rows) {
      const TileRows t = rows(m, call.x, call.x_stride, x);
      if (w.alike && !w.gate[0].rank) {
        multiply(table, w.gate[0].piece, panel, w.gates, w.gates, t, out, row, kMatrixPanel);
      } else {
        for (int g = 0; g < w.gates; ++g) {
          const GateRows& gate = w.gate[g];
          const TileRows from = gate.rank ? rows(m, values + gate.offset, w.down.N, upper[g]) : t;
          multiply(table, gate.piece, panel, 1, 1, from, out + g * kMatrixPanel, row, kMatrixPanel);
        }
      }
      for (int64_t i = 0; i < t.count; ++i) {
        for (int g = 0; g < w.gates; ++g) store(out + i * row + g * kMatrixPanel, m + i, g, panel);
      }
    }
  }
};

void body(const void* context, int rank, int size, Barrier& barrier) {
  const auto& l = *static_cast<const Linear*>(context);
  const FlushDenormals flush;
  const Range mine = share(l.call.M, rank, size);
  if (l.x.used()) {
    for (int64_t m = mine.begin; m < mine.end; ++m) l.x.quantize(l.table, m, l.call.x + m * l.call.x_stride);
  }
  barrier.wait();
  if (l.w.down.N) {
    for (int64_t item; (item = barrier.draw()) < l.w.down.panels();) l.lower_panel(item);
    barrier.wait();
    for (int g = 0; g < l.w.gates; ++g) {
      if (!l.upper[g].used()) continue;
      for (int64_t m = mine.begin; m < mine.end; ++m) {
        l.upper[g].quantize(l.table, m, l.values + m * l.w.down.N + l.w.gate[g].offset);
      }
    }
    barrier.wait();
  }
  const int64_t panels = l.w.gate[0].piece.panels();
  for (int64_t item; (item = barrier.draw()) < panels;) l.panel(item, l.local + rank * l.local_size);
}

}  // namespace

size_t linear_packed_scratch(const PackedMatrix& w, int64_t M, int most) {
  const LinearPacked call{M, nullptr, 0, nullptr, nullptr, 0};
  Places places{nullptr};
  Linear(w, call, *kernels().matrix).place(places, most);
  return static_cast<size_t>(places.used);
}

void linear_packed(const PackedMatrix& w, const LinearPacked& call, uint8_t* scratch, const Team& team) noexcept {
  if (call.M == 0) return;
  Linear l(w, call, *kernels().matrix);
  Places places{scratch};
  l.place(places, team.most);
  team.run(team_size(double(call.M) * w.N * w.K, team.most), body, &l);
}

}  // namespace fastseq::core
