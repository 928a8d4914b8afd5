#include "core/lstm_layer.h"

#include <algorithm>

#include "core/column_sum.h"
#include "core/gemm.h"
#include "core/lstm_rows.h"

namespace fastseq::core {
namespace {

template <class R>
int64_t buffer_size(const LstmArgs<R>& a) {
  return round_up(a.N * 4 * a.H);
}

template <class R>
GemmArgs<R> product(const LayerInput<R>& in, const LstmArgs<R>& a, R* x_gates) {
  return {a.N, 4 * a.H, in.I, {in.x, in.I, nullptr}, {in.weight_ih, in.I, nullptr}, false, true, in.bias, x_gates};
}
template <class R>
GemmArgs<R> product_dx(const LayerInput<R>& in, const LstmArgs<R>& a, const R* d, R* dx) {
  return {a.N, in.I, 4 * a.H, {d, 4 * a.H, nullptr}, {in.weight_ih, in.I, nullptr}, false, false, nullptr, dx};
}
template <class R>
GemmArgs<R> product_dweight(const LayerInput<R>& in, const LstmArgs<R>& a, const R* d, R* dweight) {
  return {4 * a.H, in.I, a.N, {d, 4 * a.H, nullptr}, {in.x, in.I, nullptr}, true, false, nullptr, dweight};
}

}  // namespace

template <class R>
size_t lstm_layer_scratch(const LstmLayerForward<R>& call, int most) {
  const LstmArgs<R>& a = call.recurrence.args;
  const size_t parts = std::max(gemm_scratch(product<R>(call.input, a, nullptr), most), lstm_forward_scratch(a, most));
  return parts + (call.recurrence.gates ? 0 : buffer_size(a));
}

template <class R>
void lstm_layer_forward(const LstmLayerForward<R>& call, R* scratch, const Team& team) noexcept {
  LstmForward<R> recurrence = call.recurrence;
  R* const x_gates = recurrence.gates ? recurrence.gates : take(scratch, buffer_size(recurrence.args));
  gemm(product(call.input, recurrence.args, x_gates), scratch, team);
  recurrence.x_gates = x_gates;
  lstm_forward(recurrence, scratch, team);
}

template <class R>
size_t lstm_layer_scratch(const LstmLayerBackward<R>& call, int most) {
  const LstmArgs<R>& a = call.recurrence.args;
  const LayerInput<R>& in = call.input;
  size_t parts = lstm_backward_scratch(a, call.recurrence.dweight_hh != nullptr, most);
  if (call.dx) parts = std::max(parts, gemm_scratch(product_dx<R>(in, a, nullptr, nullptr), most));
  if (call.dweight_ih) parts = std::max(parts, gemm_scratch(product_dweight<R>(in, a, nullptr, nullptr), most));
  if (call.recurrence.gates) return parts + buffer_size(a);
  parts = std::max(parts, gemm_scratch(product<R>(in, a, nullptr), most));
  return std::max(parts, lstm_gates_scratch(a, most)) + 2 * buffer_size(a);
}

template <class R>
void lstm_layer_backward(const LstmLayerBackward<R>& call, R* scratch, const Team& team) noexcept {
  LstmBackward<R> recurrence = call.recurrence;
  const LstmArgs<R>& a = recurrence.args;
  R* const d = take(scratch, buffer_size(a));
  if (!recurrence.gates) {
    R* const gates = take(scratch, buffer_size(a));
    gemm(product(call.input, a, d), scratch, team);
    lstm_gates(LstmGates<R>{a, call.noise, d, recurrence.h, recurrence.c, gates}, scratch, team);
    recurrence.gates = gates;
  }
  recurrence.dx_gates = d;
  lstm_backward(recurrence, scratch, team);
  if (call.dx) gemm(product_dx<R>(call.input, a, d, call.dx), scratch, team);
  if (call.dweight_ih) gemm(product_dweight<R>(call.input, a, d, call.dweight_ih), scratch, team);
  if (call.dbias) {
    const ColumnSum<R> sum{d, a.N, 4 * a.H, 4 * a.H, call.dbias};
    team.run(team_size(4.0 * a.N * a.H, team.most), column_sum<R>, &sum);
  }
}

template size_t lstm_layer_scratch(const LstmLayerForward<float>&, int);
template size_t lstm_layer_scratch(const LstmLayerForward<double>&, int);
template size_t lstm_layer_scratch(const LstmLayerBackward<float>&, int);
template size_t lstm_layer_scratch(const LstmLayerBackward<double>&, int);
template void lstm_layer_forward(const LstmLayerForward<float>&, float*, const Team&) noexcept;
template void lstm_layer_forward(const LstmLayerForward<double>&, double*, const Team&) noexcept;
template void lstm_layer_backward(const LstmLayerBackward<float>&, float*, const Team&) noexcept;
template void lstm_layer_backward(const LstmLayerBackward<double>&, double*, const Team&) noexcept;

}  // namespace fastseq::core
