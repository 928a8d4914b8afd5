// The gates of a forward, rebuilt: one product for all steps, with the same order of summation as the recurrence, then
// the same cell. And the noise by itself.
#include <cstring>

#include "core/flush.h"
#include "core/gemm.h"
#include "core/isa.h"
#include "core/lstm.h"
#include "core/lstm_rows.h"

namespace fastseq::core {
namespace {

template <class R>
struct Cells {
  const LstmGates<R>& call;
  const Table<R>& table;
  const Rows& rows;
};

// One row, all its units: the recurrent part stands in `gates` already.
template <class R>
void cell_row(const Cells<R>& cells, int64_t t, int64_t r) {
  const LstmGates<R>& call = cells.call;
  const LstmArgs<R>& a = call.args;
  const Rows& rows = cells.rows;
  const int64_t width = cells.table.panel_width, e = rows.element(t, r), before = rows.before(t);
  const R* c_in = r < rows.count(before) ? call.c + rows.element(before, r) * a.H : a.c0 + rows.batch(r) * a.H;
  if (rows.cut(t, r)) c_in = a.c_start;
  R pre[4 * kMostPanelWidth], noise[2 * kMostPanelWidth], out[kMostPanelWidth], state[kMostPanelWidth];
  std::memset(pre, 0, sizeof pre);
  for (int64_t unit = 0; unit < a.H; unit += width) {
    const int64_t units = std::min(width, a.H - unit);
    R* const gates = call.gates + e * 4 * a.H + unit;
    for (int64_t g = 0; g < 4; ++g) std::memcpy(pre + g * width, gates + g * a.H, units * sizeof(R));
    const int64_t batch = rows.batch(r);
    if (call.noise.on) cells.table.lstm_noise(call.noise, unit, t, &batch, 1, noise);
    CellForward<R> cell;
    cell.rows = 1;
    cell.units = units;
    cell.H = cell.x_gate = a.H;
    cell.pre_gate = width;
    cell.inverse_tau = R(1.0 / a.tau);
    cell.hard = a.hard;
    cell.pre = pre;
    cell.noise = call.noise.on ? noise : nullptr;
    cell.out[0] = out;
    cell.c[0] = nullptr;
    cell.x_gates[0] = call.x_gates + e * 4 * a.H + unit;
    cell.c_in[0] = c_in ? c_in + unit : nullptr;
    cell.c_state[0] = state;
    cell.gates[0] = gates;
    cells.table.lstm_cell_forward(cell);
  }
}

template <class R>
void body(const void* context, int rank, int size, Barrier&) {
  const auto& cells = *static_cast<const Cells<R>*>(context);
  const FlushDenormals flush;
  const Range steps = share(cells.rows.T, rank, size);
  for (int64_t t = steps.begin; t < steps.end; ++t) {
    for (int64_t r = 0; r < cells.rows.count(t); ++r) cell_row(cells, t, r);
  }
}

template <class R>
struct NoiseCall {
  const LstmNoise& noise;
  int64_t T, B, H;
  R* out;
};

template <class R>
void noise_body(const void* context, int rank, int size, Barrier&) {
  const auto& call = *static_cast<const NoiseCall<R>*>(context);
  const Table<R>& table = table_of<R>(kernels());
  const Range rows = share(call.T * call.B, rank, size);
  R tile[2 * kMostPanelWidth];
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    for (int64_t unit = 0; unit < call.H; unit += table.panel_width) {
      const int64_t units = std::min<int64_t>(table.panel_width, call.H - unit);
      const int64_t batch = row % call.B;
      table.lstm_noise(call.noise, unit, row / call.B, &batch, 1, tile);
      for (int64_t g = 0; g < 2; ++g) {
        std::memcpy(call.out + (2 * row + g) * call.H + unit, tile + g * table.panel_width, units * sizeof(R));
      }
    }
  }
}

template <class R>
GemmArgs<R> product(const LstmArgs<R>& a, const R* const* h_in, R* gates) {
  return {a.N, 4 * a.H, a.P, {nullptr, 0, h_in}, {a.weight_hh, a.P, nullptr}, false, true, nullptr, gates};
}

}  // namespace

template <class R>
size_t lstm_gates_scratch(const LstmArgs<R>& a, int most) {
  return index_size(a, a.N) + round_up(a.P) + gemm_scratch(product<R>(a, nullptr, nullptr), most);
}

template <class R>
void lstm_gates(const LstmGates<R>& call, R* scratch, const Team& team) noexcept {
  const LstmArgs<R>& a = call.args;
  int64_t* const index = reinterpret_cast<int64_t*>(take(scratch, index_size(a, a.N)));
  const Rows rows(a, index);
  R* const zeros = take(scratch, round_up(a.P));
  std::fill(zeros, zeros + a.P, R(0));
  const R** const h_in = reinterpret_cast<const R**>(index + Rows::need(a.T, a.B));
  entering<R>(rows, a, call.h, zeros, h_in);
  gemm(product<R>(a, h_in, call.gates), scratch, team);
  const Cells<R> cells{call, table_of<R>(kernels()), rows};
  team.run(team_size(40.0 * a.N * a.H, team.most), body<R>, &cells);
  for (int64_t b = 0; a.lengths && b < a.B; ++b) {
    for (int64_t t = a.lengths[b]; t < a.T; ++t) {
      std::memset(call.gates + (t * a.B + b) * 4 * a.H, 0, 4 * a.H * sizeof(R));
    }
  }
}

template <class R>
void lstm_noise(const LstmNoise& noise, int64_t T, int64_t B, int64_t H, R* out, const Team& team) noexcept {
  const NoiseCall<R> call{noise, T, B, H, out};
  team.run(team_size(40.0 * T * B * H, team.most), noise_body<R>, &call);
}

template size_t lstm_gates_scratch(const LstmArgs<float>&, int);
template size_t lstm_gates_scratch(const LstmArgs<double>&, int);
template void lstm_gates(const LstmGates<float>&, float*, const Team&) noexcept;
template void lstm_gates(const LstmGates<double>&, double*, const Team&) noexcept;
template void lstm_noise(const LstmNoise&, int64_t, int64_t, int64_t, float*, const Team&) noexcept;
template void lstm_noise(const LstmNoise&, int64_t, int64_t, int64_t, double*, const Team&) noexcept;

}  // namespace fastseq::core
