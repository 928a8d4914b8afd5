// The rows are made integers once, by all threads; then the threads draw panels of the matrix and run each against all
// rows, while it lies in the nearest caches. With factors the lower ones come first, and what they make is made
// integers in turn.
#include "core/flush.h"
#include "core/matrix_product.h"

namespace fastseq::core {
namespace {

struct Linear {
  const LinearPacked& call;
  Product product;
  float* edges = nullptr;  // per thread: results of a panel that is not whole, [M][gates][16]
};

int64_t edge_size(const Product& p) {
  return p.w.N / p.w.gates % kMatrixPanel ? round_up(p.slots * p.w.gates * kMatrixPanel) : 0;
}

void panel_of(const Linear& l, int64_t panel, float* edge) {
  const Product& p = l.product;
  const int64_t H = p.w.N / p.w.gates, unit = panel * kMatrixPanel, count = std::min(kMatrixPanel, H - unit);
  const LinearPacked& call = l.call;
  if (count == kMatrixPanel) return p.panel(panel, {0, call.M}, call.y + unit, call.y_stride, H);
  const int64_t row = p.w.gates * kMatrixPanel;
  p.panel(panel, {0, call.M}, edge, row, kMatrixPanel);
  for (int64_t m = 0; m < call.M; ++m) {
    for (int g = 0; g < p.w.gates; ++g) {
      std::memcpy(call.y + m * call.y_stride + g * H + unit, edge + m * row + g * kMatrixPanel, count * sizeof(float));
    }
  }
}

void body(const void* context, int rank, int size, Barrier& barrier) {
  const auto& l = *static_cast<const Linear*>(context);
  const FlushDenormals flush;
  const Range mine = share(l.call.M, rank, size);
  for (int64_t m = mine.begin; m < mine.end; ++m) l.product.prepare(m, l.call.x + m * l.call.x_stride);
  barrier.wait();
  if (l.product.lower_panels()) {
    for (int64_t item; (item = barrier.draw()) < l.product.lower_panels();) l.product.lower(item, {0, l.call.M});
    barrier.wait();
    for (int64_t m = mine.begin; m < mine.end; ++m) l.product.prepare_upper(m);
    barrier.wait();
  }
  float* const edge = l.edges + rank * edge_size(l.product);
  for (int64_t item; (item = barrier.draw()) < l.product.panels;) panel_of(l, item, edge);
}

Linear placed(const PackedMatrix& w, const LinearPacked& call, int most, Places& places) {
  Linear l{call, Product(w, *kernels().matrix, call.M)};
  l.product.place(places);
  l.edges = places.take<float>(most * edge_size(l.product));
  return l;
}

}  // namespace

size_t linear_packed_scratch(const PackedMatrix& w, int64_t M, int most) {
  const LinearPacked call{M, nullptr, 0, nullptr, nullptr, 0};
  Places places{nullptr};
  placed(w, call, most, places);
  return static_cast<size_t>(places.used);
}

void linear_packed(const PackedMatrix& w, const LinearPacked& call, uint8_t* scratch, const Team& team) noexcept {
  if (call.M == 0) return;
  Places places{scratch};
  Linear l = placed(w, call, team.most, places);
  l.product.set_bias(call.bias);
  team.run(team_size(double(call.M) * w.N * w.K, team.most), body, &l);
}

}  // namespace fastseq::core
