// One team for the whole sequence. A step: with factors what the lower ones make of h, then tile by tile the
// pre-activations of some units and their cell, then the projection where there is one; a barrier after each. Before
// some steps their input product, each thread for the units, or the rows, that it works on in these steps.
#include "core/lstm_packed.h"

#include <cstring>
#include <optional>

#include "core/flush.h"
#include "core/lstm_cells.h"
#include "core/lstm_rows.h"
#include "core/matrix_product.h"

namespace fastseq::core {
namespace {

int64_t weight_bytes(const PackedMatrix& w) {
  int64_t bytes = w.down.panels() * w.down.stride;
  for (int g = 0; g < w.gates; ++g) {
    const Piece& p = w.gate[g].piece;
    bytes += p.panels() * (w.alike ? p.stride / w.gates : p.stride);
  }
  return bytes;
}

// As the Split of lstm_rows.h, by the bytes that a step reads: they, not the arithmetic, are what integers save.
Split split_of(const LstmPacked& call, int most) {
  const LstmArgs<float>& a = call.forward.args;
  const int64_t bytes = weight_bytes(*call.weight_hh) + (call.weight_hr ? weight_bytes(*call.weight_hr) : 0);
  const double step = double(a.B) * static_cast<double>(bytes) / 4;  // 64 KB a thread; the barrier costs as much
  const int size = a.T > 1 ? step_team_size(step, most) : team_size(step, most);
  const int64_t rows = a.B / size;
  const bool dense = !a.lengths && !a.batch_sizes;
  return {size, size > 1 && dense && (rows >= 16 || (rows >= 4 && bytes <= 1024 * 1024))};
}

constexpr int64_t kMostSteps = 64;
// Steps whose input product is made at once. Few enough to stay in the second cache, enough rows to be worth a pass
// over the weights.
int64_t input_steps(const LstmPacked& call) {
  constexpr int64_t kBytes = 512 * 1024, kLeastRows = 32;
  const LstmArgs<float>& a = call.forward.args;
  if (!call.weight_ih || !a.B) return 1;
  const int64_t fit = kBytes / (a.B * 4 * a.H * static_cast<int64_t>(sizeof(float)));
  const int64_t steps = std::max({fit, (kLeastRows + a.B - 1) / a.B, int64_t(1)});
  return std::min({steps, kMostSteps, std::max(a.T, int64_t(1))});
}

// What one thread has to itself.
struct Own {
  std::optional<Product> input;  // memory of its own where the threads split rows, else that of all
  float* x_gates;                // [slots][4][padded H]
  Range rows;                    // those of a step that are its own
  int64_t slot[kMostSteps];      // the first of each step
  Integers h;                    // shared rows and own sums; with projection all its own
  Integers upper[4];             // of what the lower factors make
  Integers inner;                // shared rows, own sums
  float* pre;
  float* noise;
};

struct Packed {
  const LstmPacked& call;
  const LstmForward<float>& f;
  const LstmArgs<float>& a;
  const PackedMatrix& w;
  const PackedMatrix* hr;
  const Table<float>& table;
  const MatrixTable& matrix;
  const Rows& rows;
  Split split;
  Tiling tiling;
  Integers h;      // without projection: rows 0 .. B - 1 enter even steps, B .. 2 B - 1 odd ones, then the start, zeros
  Integers inner;  // [B] of o * tanh(c), with projection
  Integers upper[4];
  float* values;  // [B, down.N]
  float* zeros;   // a row of zeros
  uint8_t* own;   // of each thread
  int64_t own_size;
  uint8_t* input = nullptr;  // of all threads
  CellsForward<float> cells{f, table, rows};
  int64_t steps, padded;  // of an input product; H rounded up to whole panels

  Packed(const LstmPacked& call, const Rows& rows, Split split)
      : call(call),
        f(call.forward),
        a(f.args),
        w(*call.weight_hh),
        hr(call.weight_hr),
        table(kernels().f32),
        matrix(*kernels().matrix),
        rows(rows),
        split(split),
        tiling(split, matrix.rows, std::max<int64_t>(table.panel_width, kMatrixPanel)),
        steps(input_steps(call)),
        padded((a.H + kMatrixPanel - 1) / kMatrixPanel * kMatrixPanel) {
    cells.pre_gate = tiling.width;
    h.init(a.P);
    inner.init(a.H);
    if (w.down.N) h.groupings.add(w.down);
    for (int g = 0; g < 4; ++g) {
      Integers& meets = w.gate[g].rank ? upper[g] : h;
      if (w.gate[g].rank) meets.init(w.gate[g].rank);
      meets.groupings.add(w.gate[g].piece);
    }
    if (hr) {
      if (hr->down.N) inner.groupings.add(hr->down);
      if (!hr->gate[0].rank) inner.groupings.add(hr->gate[0].piece);
    }
    Own nowhere;
    Places places{nullptr};
    place_own(places, nowhere);
    own_size = places.used;
  }
  int64_t slots() const {
    return steps * (split.by_rows ? (a.B + split.size - 1) / split.size + tiling.tile_rows : a.B);
  }
  void place_input(Places& places, Own& mine) const {
    if (!call.weight_ih) return;
    mine.input.emplace(*call.weight_ih, matrix, slots());
    mine.input->place(places);
    mine.x_gates = places.take<float>(slots() * 4 * padded);
  }
  int64_t h_rows() const { return hr ? a.B : 2 * a.B + 2; }
  void place_own(Places& places, Own& mine) const;
  void place(Places& places, int most);
  // The rows that this thread works on in a step of so many.
  Range own_rows(int64_t count, int rank, int size) const {
    if (!split.by_rows) return {0, count};
    const Range tiles = share(tiling.tiles(count), rank, size);
    return {tiling.tile(tiles.begin, count).begin, tiling.tile(tiles.end - 1, count).end};
  }
  void first_state(int rank, int size) const;
  void enter(int64_t s, int64_t t, Range part, Own& mine) const;
  TileRows entering(int64_t s, int64_t t, Range part, const Own& mine) const;
  void lower_tile(int64_t s, int64_t t, int64_t panel, Range part, const Own& mine) const;
  void make_inputs(int64_t s, int rank, int size, Barrier& barrier, Own& mine) const;
  void cell_tile(int64_t s, int64_t t, int64_t panel, Range part, const Own& mine) const;
  void pre_activations(int64_t s, int64_t t, int64_t first, int64_t panels, Range part, const Own& mine) const;
  void projection_tile(int64_t t, int64_t panel, Range part, const Own& mine) const;
};

void Packed::place_own(Places& places, Own& mine) const {
  mine.h = h;
  mine.inner = inner;
  if (split.by_rows) {
    place_input(places, mine);
  } else if (input) {
    Places shared{input};
    place_input(shared, mine);
  }
  if (hr) {
    mine.h.place(places, a.B, true);
  } else if (h.used()) {
    mine.h.sums = places.take<int32_t>(h_rows() * h.groupings.total);
  }
  if (inner.used()) mine.inner.sums = places.take<int32_t>(a.B * inner.groupings.total);
  for (int g = 0; g < 4; ++g) {
    mine.upper[g] = upper[g];
    mine.upper[g].place(places, a.B, true);
  }
  mine.pre = places.take<float>(tiling.tile_rows * 4 * tiling.width);
  mine.noise = places.take<float>(tiling.tile_rows * 2 * tiling.width);
}

void Packed::place(Places& places, int most) {
  if (!hr && h.used()) h.q = places.take<int8_t>(h_rows() * h.width);
  if (inner.used()) inner.q = places.take<int8_t>(a.B * inner.width);
  cells.inner = hr ? places.take<float>(a.B * a.H) : nullptr;
  values = places.take<float>(a.B * w.down.N);
  zeros = places.take<float>(a.P);
  own = places.take<uint8_t>(most * own_size);
  if (split.by_rows) return;
  Own nowhere;
  Places count{nullptr};
  place_input(count, nowhere);
  if (count.used) input = places.take<uint8_t>(count.used);
}

void Packed::first_state(int rank, int size) const {
  cells.first_state(rank, size);
  const Range mine = share(a.B, rank, size);
  for (int64_t b = mine.begin; b < mine.end; ++b) {
    if (inner.used()) std::memset(inner.row(b), 0, inner.width);
    if (hr || !h.used()) continue;
    matrix.to_integers(a.h0 + b * a.P, a.P, 127.0f, h.row(b));
    std::memset(h.row(b) + a.P, 0, h.width - a.P);
    std::memcpy(h.row(a.B + b), h.row(b), h.width);
  }
  if (rank || hr || !h.used()) return;
  std::memset(h.row(2 * a.B), 0, 2 * h.width);
  if (a.h_start) matrix.to_integers(a.h_start, a.P, 127.0f, h.row(2 * a.B));
}

// Before this thread meets the state that enters step t, number s: its rows of integers and their sums.
void Packed::enter(int64_t s, int64_t t, Range part, Own& mine) const {
  if (!h.used()) return;
  for (int64_t r = part.begin; r < part.end; ++r) {
    if (hr) {
      const float* x = nullptr;
      rows.entering(a, f.h, zeros, t, {r, r + 1}, &x);
      mine.h.quantize(matrix, r, x);
    } else {
      mine.h.sum(matrix, (s & 1) * a.B + rows.batch(r));
    }
  }
  if (a.reset && !hr) {
    for (int64_t r = 2 * a.B; r < h_rows(); ++r) mine.h.sum(matrix, r);
  }
}

TileRows Packed::entering(int64_t s, int64_t t, Range part, const Own& mine) const {
  TileRows out;
  out.count = part.end - part.begin;
  out.integers = &mine.h;
  rows.entering(a, f.h, zeros, t, part, out.x);
  for (int64_t i = 0; i < out.count; ++i) {
    const int64_t r = part.begin + i;
    out.number[i] = hr ? r : rows.cut(t, r) ? 2 * a.B + (a.h_start ? 0 : 1) : (s & 1) * a.B + rows.batch(r);
  }
  return out;
}

void Packed::lower_tile(int64_t s, int64_t t, int64_t panel, Range part, const Own& mine) const {
  float* const out = values + part.begin * w.down.N + panel * kMatrixPanel;
  multiply(matrix, w.down, panel, 1, 1, entering(s, t, part, mine), nullptr, out, w.down.N, 0);
}

// Of 16-unit panels first .. first + panels - 1, [rows][4][width].
void Packed::pre_activations(int64_t s, int64_t t, int64_t first, int64_t panels, Range part, const Own& mine) const {
  const int64_t width = tiling.width;
  const TileRows in = entering(s, t, part, mine);
  if (w.alike && !w.gate[0].rank) {
    for (int64_t p = 0; p < panels; ++p) {
      multiply(matrix, w.gate[0].piece, first + p, 4, 4, in, nullptr, mine.pre + p * kMatrixPanel, 4 * width, width);
    }
    return;
  }
  for (int g = 0; g < 4; ++g) {
    const GateRows& gate = w.gate[g];
    TileRows from = in;
    if (gate.rank) {
      from.integers = &mine.upper[g];
      for (int64_t i = 0; i < in.count; ++i) {
        from.number[i] = part.begin + i;
        from.x[i] = values + from.number[i] * w.down.N + gate.offset;
      }
    }
    multiply(matrix, gate.piece, first, panels, 1, from, nullptr, mine.pre + g * width, 4 * width, kMatrixPanel);
  }
}

// The input product of the steps from number `s` on.
void Packed::make_inputs(int64_t s, int rank, int size, Barrier& barrier, Own& mine) const {
  int64_t slots = 0;
  for (int64_t n = 0; n < steps && s + n < a.T; ++n) {
    mine.slot[n] = slots;
    const Range part = own_rows(rows.count(rows.step(s + n)), rank, size);
    slots += part.end - part.begin;
  }
  const Product& product = *mine.input;
  const Range share_of = split.by_rows ? Range{0, slots} : share(slots, rank, size);
  for (int64_t n = 0; n < steps && s + n < a.T; ++n) {
    const int64_t t = rows.step(s + n);
    const Range part = own_rows(rows.count(t), rank, size);
    for (int64_t r = part.begin; r < part.end; ++r) {
      const int64_t slot = mine.slot[n] + r - part.begin;
      if (slot < share_of.begin || slot >= share_of.end) continue;
      product.prepare(slot, call.x + rows.element(t, r) * call.weight_ih->K);
    }
  }
  if (!split.by_rows) barrier.wait();
  if (product.lower_panels()) {
    const Range lower = split.by_rows ? Range{0, product.lower_panels()} : share(product.lower_panels(), rank, size);
    for (int64_t panel = lower.begin; panel < lower.end; ++panel) product.lower(panel, {0, slots});
    if (!split.by_rows) barrier.wait();
    for (int64_t slot = share_of.begin; slot < share_of.end; ++slot) product.prepare_upper(slot);
    if (!split.by_rows) barrier.wait();
  }
  const int64_t each = tiling.width / kMatrixPanel, all = tiling.panels(a.H);
  const Range units = split.by_rows ? Range{0, all} : share(all, rank, size);
  for (int64_t panel = units.begin * each; panel < std::min(units.end * each, product.panels); ++panel) {
    product.panel(panel, {0, slots}, mine.x_gates + panel * kMatrixPanel, 4 * padded, padded);
  }
}

void Packed::cell_tile(int64_t s, int64_t t, int64_t panel, Range part, const Own& mine) const {
  const int64_t width = tiling.width, unit = panel * width, units = std::min(width, a.H - unit);
  pre_activations(s, t, unit / kMatrixPanel, (units + kMatrixPanel - 1) / kMatrixPanel, part, mine);
  TileInput<float> input{nullptr, 4 * padded, padded};
  if (mine.input) input.first = mine.x_gates + (mine.slot[s % steps] + part.begin - mine.rows.begin) * 4 * padded;
  for (int64_t u = 0; u < units; u += table.panel_width) {
    const int64_t here = std::min<int64_t>(table.panel_width, units - u);
    cells.run(t, unit + u, here, part, mine.pre + u, mine.noise, input.first ? &input : nullptr);
  }
  for (int64_t r = part.begin; r < part.end; ++r) {
    const float* const out = cells.out(t, r, unit);
    if (hr && inner.used()) matrix.to_integers(out, units, 127.0f, inner.row(r) + unit);
    if (!hr && h.used()) matrix.to_integers(out, units, 127.0f, h.row(((s + 1) & 1) * a.B + rows.batch(r)) + unit);
  }
}

void Packed::projection_tile(int64_t t, int64_t panel, Range part, const Own& mine) const {
  const int64_t unit = panel * kMatrixPanel, units = std::min(kMatrixPanel, a.P - unit);
  TileRows in;
  in.count = part.end - part.begin;
  in.integers = &mine.inner;
  for (int64_t i = 0; i < in.count; ++i) {
    in.number[i] = part.begin + i;
    in.x[i] = cells.inner + in.number[i] * a.H;
  }
  multiply(matrix, hr->gate[0].piece, panel, 1, 1, in, nullptr, mine.pre, kMatrixPanel, 0);
  for (int64_t i = 0; i < in.count; ++i) {
    float* const out = f.h + rows.element(t, part.begin + i) * a.P + unit;
    std::memcpy(out, mine.pre + i * kMatrixPanel, units * sizeof(float));
  }
  cells.last_state(t, unit, units, part);
}

void body(const void* context, int rank, int size, Barrier& barrier) {
  const auto& p = *static_cast<const Packed*>(context);
  const FlushDenormals flush;
  Own mine;
  Places places{p.own + rank * p.own_size};
  p.place_own(places, mine);
  if (mine.input) mine.input->set_bias(p.call.bias, p.split.by_rows || rank == 0);
  p.first_state(rank, size);
  barrier.wait();
  const auto each = [&](int64_t panels, int64_t s, int64_t n, auto visit) {
    p.tiling.each(true, panels, n, s, rank, size,
                  [&](int64_t panel, int64_t tile) { visit(panel, p.tiling.tile(tile, n)); });
    if (!p.split.by_rows) barrier.wait();
  };
  for (int64_t s = 0; s < p.a.T; ++s) {
    const int64_t t = p.rows.step(s), n = p.rows.count(t);
    if (mine.input && s % p.steps == 0) p.make_inputs(s, rank, size, barrier, mine);
    const Range own = mine.rows = p.own_rows(n, rank, size);
    p.enter(s, t, own, mine);
    if (p.w.down.N) {
      each(p.w.down.panels(), s, n, [&](int64_t panel, Range part) { p.lower_tile(s, t, panel, part, mine); });
      for (int g = 0; g < 4; ++g) {
        if (!p.upper[g].used()) continue;
        for (int64_t r = own.begin; r < own.end; ++r) {
          mine.upper[g].quantize(p.matrix, r, p.values + r * p.w.down.N + p.w.gate[g].offset);
        }
      }
    }
    each(p.tiling.panels(p.a.H), s, n, [&](int64_t panel, Range part) { p.cell_tile(s, t, panel, part, mine); });
    if (!p.hr) continue;
    if (p.inner.used()) {
      for (int64_t r = own.begin; r < own.end; ++r) mine.inner.sum(p.matrix, r);
    }
    const int64_t panels = p.hr->gate[0].piece.panels();
    each(panels, s, n, [&](int64_t panel, Range part) { p.projection_tile(t, panel, part, mine); });
  }
}

}  // namespace

size_t lstm_packed_scratch(const LstmPacked& call, int most) {
  const LstmArgs<float>& a = call.forward.args;
  LstmArgs<float> dense = a;
  dense.lengths = dense.batch_sizes = nullptr;
  const Rows rows(dense, nullptr);
  Places places{nullptr};
  places.take<int64_t>(Rows::need(a.T, a.B));
  Packed(call, rows, split_of(call, most)).place(places, most);
  return static_cast<size_t>(places.used);
}

void lstm_packed(const LstmPacked& call, uint8_t* scratch, const Team& team) noexcept {
  const LstmArgs<float>& a = call.forward.args;
  Places places{scratch};
  const Rows rows(a, places.take<int64_t>(Rows::need(a.T, a.B)));
  Packed p(call, rows, split_of(call, team.most));
  p.place(places, team.most);
  std::fill(p.zeros, p.zeros + a.P, 0.0f);
  zero_padding(call.forward);
  team.run(p.split.size, body, &p);
}

}  // namespace fastseq::core
