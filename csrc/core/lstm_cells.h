// The cells of a step and what surrounds them, forward and backward, whatever the recurrent weights are made of.
#pragma once

#include <algorithm>
#include <cstring>

#include "core/isa.h"
#include "core/lstm.h"
#include "core/lstm_rows.h"

namespace fastseq::core {

// Input parts of pre-activations that lie elsewhere than in x_gates, for the rows of a tile one after the other.
template <class R>
struct TileInput {
  const R* first;
  int64_t row, gate;  // elements from one to the next
};

template <class R>
struct CellsForward {
  const LstmForward<R>& call;
  const Table<R>& table;
  const Rows& rows;
  R* inner = nullptr;  // [B, H] o * tanh(c) of a step, with projection only
  const LstmArgs<R>& a = call.args;
  R inverse_tau = R(1.0 / a.tau);
  int64_t pre_gate = table.panel_width;  // elements of a tile's products from one gate to the next

  void first_state(int rank, int size) const;
  void ahead(int64_t t, int64_t unit, int64_t units, Range part) const;
  void run(int64_t t, int64_t unit, int64_t units, Range part, const R* pre, R* noise,
           const TileInput<R>* input = nullptr) const;
  // What a cell writes for the units from `unit` on: o * tanh(c).
  R* out(int64_t t, int64_t r, int64_t unit) const {
    return (inner ? inner + r * a.H : call.h + rows.element(t, r) * a.H) + unit;
  }
  void last_state(int64_t t, int64_t unit, int64_t units, Range part) const;
};

// Each row's place among the last states holds its latest c, and h where the row has no steps at all.
template <class R>
void CellsForward<R>::first_state(int rank, int size) const {
  const Range mine = share(a.B, rank, size);
  if (mine.begin == mine.end) return;
  std::memcpy(call.h_n + mine.begin * a.P, a.h0 + mine.begin * a.P, (mine.end - mine.begin) * a.P * sizeof(R));
  std::memcpy(call.c_n + mine.begin * a.H, a.c0 + mine.begin * a.H, (mine.end - mine.begin) * a.H * sizeof(R));
}

// Rows that end with step t.
template <class R>
void CellsForward<R>::last_state(int64_t t, int64_t unit, int64_t units, Range part) const {
  for (int64_t r = std::max(part.begin, rows.count(rows.after(t))); r < part.end; ++r) {
    std::memcpy(call.h_n + rows.batch(r) * a.P + unit, call.h + rows.element(t, r) * a.P + unit, units * sizeof(R));
  }
}

// What the cells of a tile will read and write.
template <class R>
void CellsForward<R>::ahead(int64_t t, int64_t unit, int64_t units, Range part) const {
  for (int64_t r = part.begin; r < part.end; ++r) {
    const int64_t e = rows.element(t, r);
    prefetch<4>(call.x_gates + e * 4 * a.H + unit, a.H, units);
    if (call.gates && call.gates != call.x_gates) prefetch<4>(call.gates + e * 4 * a.H + unit, a.H, units);
    if (call.c) prefetch<1>(call.c + e * a.H + unit, 0, units);
    if (!inner) prefetch<1>(call.h + e * a.P + unit, 0, units);
  }
}

// The cells of a panel for a tile of rows. pre: their products, [rows][4][pre_gate]. noise: room for [rows][2][width].
template <class R>
void CellsForward<R>::run(int64_t t, int64_t unit, int64_t units, Range part, const R* pre, R* noise,
                          const TileInput<R>* input) const {
  CellForward<R> cell;
  cell.rows = part.end - part.begin;
  cell.units = units;
  cell.H = a.H;
  cell.x_gate = input ? input->gate : a.H;
  cell.pre_gate = pre_gate;
  cell.inverse_tau = inverse_tau;
  cell.hard = a.hard;
  cell.pre = pre;
  cell.noise = call.noise.on ? noise : nullptr;
  int64_t batch[kMostTileRows];
  for (int64_t r = part.begin, i = 0; r < part.end; ++r, ++i) {
    const int64_t b = batch[i] = rows.batch(r), e = rows.element(t, r);
    cell.x_gates[i] = (input ? input->first + i * input->row : call.x_gates + e * 4 * a.H) + unit;
    cell.c_state[i] = call.c_n + b * a.H + unit;
    cell.c_in[i] = !rows.cut(t, r) ? cell.c_state[i] : a.c_start ? a.c_start + unit : nullptr;
    cell.c[i] = call.c ? call.c + e * a.H + unit : nullptr;
    cell.gates[i] = call.gates ? call.gates + e * 4 * a.H + unit : nullptr;
    cell.out[i] = out(t, r, unit);
  }
  if (call.noise.on) table.lstm_noise(call.noise, unit, t, batch, cell.rows, noise);
  table.lstm_cell_forward(cell);
  if (!inner) last_state(t, unit, units, part);
}

// Steps beyond a row's end.
template <class R>
void zero_padding(const LstmForward<R>& call) {
  const LstmArgs<R>& a = call.args;
  for (int64_t b = 0; a.lengths && b < a.B; ++b) {
    for (int64_t t = a.lengths[b]; t < a.T; ++t) {
      const int64_t e = t * a.B + b;
      std::memset(call.h + e * a.P, 0, a.P * sizeof(R));
      if (call.c) std::memset(call.c + e * a.H, 0, a.H * sizeof(R));
      if (call.gates) std::memset(call.gates + e * 4 * a.H, 0, 4 * a.H * sizeof(R));
    }
  }
}

template <class R>
struct CellsBackward {
  const LstmBackward<R>& call;
  const Table<R>& table;
  const Rows& rows;
  const R* zeros;        // a row of zeros
  R* dh_step = nullptr;  // [B, P] gradient of h of a step, with projection only
  R* dh_all = nullptr;   // [N, P] the same for all steps, and
  R* inner = nullptr;    // [N, H] o * tanh(c), for the gradient of weight_hr
  const LstmArgs<R>& a = call.args;
  R inverse_tau = R(1.0 / a.tau);

  const R* c_before(int64_t t, int64_t r) const;
  void begin(int rank, int size) const;
  void ahead(int64_t t, int64_t unit, int64_t units, Range part) const;
  void state(int64_t t, int64_t last, int64_t unit, Range part, const R* from_last, int64_t from_row, R* dh) const;
  void cut_c(int64_t last, int64_t unit, Range part) const;
  void run(int64_t t, int64_t unit, Range part, const R* dh) const;
  void zero_padding() const;
};

template <class R>
const R* CellsBackward<R>::c_before(int64_t t, int64_t r) const {
  if (rows.cut(t, r)) return a.c_start;
  const int64_t before = rows.before(t);
  return r < rows.count(before) ? call.c + rows.element(before, r) * a.H : a.c0 + rows.batch(r) * a.H;
}

// Each row's place among the first states holds the gradient of its latest state until the row is done.
template <class R>
void CellsBackward<R>::begin(int rank, int size) const {
  const Range batch = share(a.B, rank, size);
  const auto copy = [&](R* out, const R* in, int64_t n) {
    if (batch.begin == batch.end) return;
    if (in) {
      std::memcpy(out + batch.begin * n, in + batch.begin * n, (batch.end - batch.begin) * n * sizeof(R));
    } else {
      std::memset(out + batch.begin * n, 0, (batch.end - batch.begin) * n * sizeof(R));
    }
  };
  copy(call.dh0, call.dh_n, a.P);
  copy(call.dc0, call.dc_n, a.H);
}

// What the cells of a tile will read and write.
template <class R>
void CellsBackward<R>::ahead(int64_t t, int64_t unit, int64_t units, Range part) const {
  for (int64_t r = part.begin; r < std::min(part.end, rows.count(t)); ++r) {
    const int64_t e = rows.element(t, r);
    const R* const c_in = c_before(t, r);
    prefetch<4>(call.gates + e * 4 * a.H + unit, a.H, units);
    prefetch<4>(call.dx_gates + e * 4 * a.H + unit, a.H, units);
    prefetch<1>(call.c + e * a.H + unit, 0, units);
    if (c_in) prefetch<1>(c_in + unit, 0, units);
    if (call.dh && !a.weight_hr) prefetch<1>(call.dh + e * a.P + unit, 0, units);
  }
}

// dh of step t from its own gradient and from the step processed after it, `last`: [rows][width]. Where a segment ends
// between the two the latter goes to the start state, where the row begins at `last` to the initial state. t may lie
// outside 0 .. T-1: then only the latter two happen.
template <class R>
void CellsBackward<R>::state(int64_t t, int64_t last, int64_t unit, Range part, const R* from_last, int64_t from_row,
                             R* dh) const {
  const int64_t width = table.panel_width, units = std::min(width, a.P - unit);
  const int64_t n = rows.count(t), n_last = rows.count(last);
  for (int64_t r = part.begin; r < part.end; ++r) {
    const int64_t i = r - part.begin;
    R* const initial = call.dh0 + rows.batch(r) * a.P + unit;
    const R* from = r < n_last ? from_last + i * from_row : initial;
    if (r < n_last && rows.cut(last, r)) {
      for (int64_t u = 0; u < units && call.dh_start; ++u) call.dh_start[unit + u] += from[u];
      from = zeros;
    }
    if (r >= n) {
      std::memcpy(initial, from, units * sizeof(R));
      continue;
    }
    const R* const own = call.dh ? call.dh + rows.element(t, r) * a.P + unit : zeros;
    R* const out = dh + i * width;
    for (int64_t u = 0; u < units; ++u) out[u] = own[u] + from[u];
    if (dh_step) std::memcpy(dh_step + r * a.P + unit, out, units * sizeof(R));
    if (dh_all) std::memcpy(dh_all + rows.element(t, r) * a.P + unit, out, units * sizeof(R));
  }
}

// The gradient of c that crosses the border of a segment, as in `state`.
template <class R>
void CellsBackward<R>::cut_c(int64_t last, int64_t unit, Range part) const {
  const int64_t units = std::min<int64_t>(table.panel_width, a.H - unit);
  if (!a.reset) return;
  for (int64_t r = part.begin; r < std::min(part.end, rows.count(last)); ++r) {
    if (!rows.cut(last, r)) continue;
    R* const dc = call.dc0 + rows.batch(r) * a.H + unit;
    for (int64_t u = 0; u < units && call.dc_start; ++u) call.dc_start[unit + u] += dc[u];
    std::memset(dc, 0, units * sizeof(R));
  }
}

// The cells of a panel for a tile of rows. dh: [rows][width], the gradient of o * tanh(c).
template <class R>
void CellsBackward<R>::run(int64_t t, int64_t unit, Range part, const R* dh) const {
  CellBackward<R> cell;
  cell.rows = std::min(part.end, rows.count(t)) - part.begin;
  cell.units = std::min<int64_t>(table.panel_width, a.H - unit);
  cell.H = a.H;
  cell.inverse_tau = inverse_tau;
  cell.hard = a.hard;
  cell.dh = dh;
  for (int64_t i = 0; i < cell.rows; ++i) {
    const int64_t r = part.begin + i, e = rows.element(t, r);
    const R* const c_in = c_before(t, r);
    cell.gates[i] = call.gates + e * 4 * a.H + unit;
    cell.dgates[i] = call.dgates ? call.dgates + e * 4 * a.H + unit : nullptr;
    cell.c[i] = call.c + e * a.H + unit;
    cell.c_in[i] = c_in ? c_in + unit : nullptr;
    cell.dc[i] = call.dc ? call.dc + e * a.H + unit : nullptr;
    cell.dc_state[i] = call.dc0 + rows.batch(r) * a.H + unit;
    cell.dx_gates[i] = call.dx_gates + e * 4 * a.H + unit;
    cell.out[i] = inner ? inner + e * a.H + unit : nullptr;
  }
  if (cell.rows > 0) table.lstm_cell_backward(cell);
}

// Where no step writes: beyond each row's end. And sums over rows begin.
template <class R>
void CellsBackward<R>::zero_padding() const {
  for (int64_t row = 0; a.lengths && row < a.B; ++row) {
    for (int64_t t = a.lengths[row]; t < a.T; ++t) {
      const int64_t e = t * a.B + row;
      std::memset(call.dx_gates + e * 4 * a.H, 0, 4 * a.H * sizeof(R));
      if (dh_all) std::memset(dh_all + e * a.P, 0, a.P * sizeof(R));
      if (inner) std::memset(inner + e * a.H, 0, a.H * sizeof(R));
    }
  }
  if (call.dh_start) {
    std::fill(call.dh_start, call.dh_start + a.P, R(0));
    std::fill(call.dc_start, call.dc_start + a.H, R(0));
  }
}

// Gradients of the start state are sums over rows within the loop over time.
template <class R>
bool sums(const LstmArgs<R>& a) {
  return a.reset && (a.h_start || a.c_start);
}

}  // namespace fastseq::core
