#include "core/lstm.h"

#include "torch/lstm.h"

namespace fastseq::torch_door {
namespace {

using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class R>
void run(const core::LstmForward<R>& call) {
  const core::Team t = team();
  const door::Scratch<R> scratch(core::lstm_forward_scratch(call.args, t.most));
  core::lstm_forward(call, scratch.data(), t);
}

template <class R>
void run(const core::LstmGates<R>& call) {
  const core::Team t = team();
  const door::Scratch<R> scratch(core::lstm_gates_scratch(call.args, t.most));
  core::lstm_gates(call, scratch.data(), t);
}

template <class R>
void run(const core::LstmBackward<R>& call) {
  const core::Team t = team();
  const door::Scratch<R> scratch(core::lstm_backward_scratch(call.args, call.dweight_hh != nullptr, t.most));
  core::lstm_backward(call, scratch.data(), t);
}

Five lstm_forward(Tensor x_gates, Tensor weight_hh, Tensor h0, Tensor c0, Optional weight_hr, Optional lengths,
                  Optional batch_sizes, Optional reset, Optional h_start, Optional c_start, Optional seed,
                  Optional rows, int64_t row_offset, int64_t stream, double noise_probability, double tau, bool hard,
                  bool reverse, int64_t save) {
  const char* const op = "lstm_forward";
  const door::Array x = view(op, "x_gates", x_gates);
  const door::LstmState s = view_state(op, weight_hh, h0, c0, weight_hr, lengths, batch_sizes, reset, h_start, c_start);
  const door::LstmSizes z = door::check_lstm(op, "x_gates", x, s, tau);
  const core::LstmNoise noise = view_noise(op, seed, rows, z.B, row_offset, stream, noise_probability);
  if (save < 0 || save > 2) door::fail(op, "save must be 0, 1 or 2, got ", save);
  Tensor h = empty(x_gates, data_size(z, z.P));
  Tensor c = empty(x_gates, save >= 1 ? data_size(z, z.H) : std::vector<int64_t>{0});
  Tensor gates = empty(x_gates, save >= 2 ? data_size(z, 4 * z.H) : std::vector<int64_t>{0});
  Tensor h_n = empty(x_gates, {z.B, z.P}), c_n = empty(x_gates, {z.B, z.H});
  const auto go = [&]<class R>(R) {
    run<R>(core::LstmForward<R>{door::lstm_args<R>(z, s, tau, hard, reverse), noise, x.as<R>(), pointer<R>(h),
                                save >= 1 ? pointer<R>(c) : nullptr, save >= 2 ? pointer<R>(gates) : nullptr,
                                pointer<R>(h_n), pointer<R>(c_n)});
  };
  door::by_type(z.type, go);
  return {h, c, gates, h_n, c_n};
}

Tensor lstm_gates(Tensor x_gates, Tensor h, Tensor c, Tensor weight_hh, Tensor h0, Tensor c0, Optional weight_hr,
                  Optional lengths, Optional batch_sizes, Optional reset, Optional h_start, Optional c_start,
                  Optional seed, Optional rows, int64_t row_offset, int64_t stream, double noise_probability,
                  double tau, bool hard, bool reverse) {
  const char* const op = "lstm_gates";
  const door::Array x = view(op, "x_gates", x_gates), vh = view(op, "h", h), vc = view(op, "c", c);
  const door::LstmState s = view_state(op, weight_hh, h0, c0, weight_hr, lengths, batch_sizes, reset, h_start, c_start);
  const door::LstmSizes z = door::check_lstm(op, "x_gates", x, s, tau);
  door::check_data(op, "h", vh, z, z.P, "P");
  door::check_data(op, "c", vc, z, z.H, "H");
  const core::LstmNoise noise = view_noise(op, seed, rows, z.B, row_offset, stream, noise_probability);
  Tensor gates = empty(x_gates, data_size(z, 4 * z.H));
  const auto go = [&]<class R>(R) {
    run<R>(core::LstmGates<R>{door::lstm_args<R>(z, s, tau, hard, reverse), noise, x.as<R>(), vh.as<R>(), vc.as<R>(),
                              pointer<R>(gates)});
  };
  door::by_type(z.type, go);
  return gates;
}

Seven lstm_backward(Optional dh, Optional dc, Optional dgates, Optional dh_n, Optional dc_n, Tensor gates, Tensor h,
                    Tensor c, Tensor weight_hh, Tensor h0, Tensor c0, Optional weight_hr, Optional lengths,
                    Optional batch_sizes, Optional reset, Optional h_start, Optional c_start, double tau, bool hard,
                    bool reverse, bool weights) {
  const char* const op = "lstm_backward";
  const door::LstmState s = view_state(op, weight_hh, h0, c0, weight_hr, lengths, batch_sizes, reset, h_start, c_start);
  const door::LstmGrads g{view(op, "dh", dh),     view(op, "dc", dc),     view(op, "dgates", dgates),
                          view(op, "dh_n", dh_n), view(op, "dc_n", dc_n), view(op, "gates", gates),
                          view(op, "h", h),       view(op, "c", c)};
  const door::LstmSizes z = door::check_lstm_backward(op, g, s, tau);
  const bool start = s.h_start.given() || s.c_start.given(), project = weights && s.weight_hr.given();
  const auto sized = [&](bool wanted, std::vector<int64_t> size) {
    return empty(gates, wanted ? size : std::vector<int64_t>{0});
  };
  Tensor dx_gates = empty(gates, data_size(z, 4 * z.H)), dh0 = empty(gates, {z.B, z.P}), dc0 = empty(gates, {z.B, z.H});
  Tensor dweight_hh = sized(weights, {4 * z.H, z.P}), dweight_hr = sized(project, {z.P, z.H});
  Tensor dh_start = sized(start, {z.P}), dc_start = sized(start, {z.H});
  const auto go = [&]<class R>(R) {
    run<R>(core::LstmBackward<R>{door::lstm_args<R>(z, s, tau, hard, reverse), g.dh.as<R>(), g.dc.as<R>(),
                                 g.dgates.as<R>(), g.dh_n.as<R>(), g.dc_n.as<R>(), g.gates.as<R>(), g.h.as<R>(),
                                 g.c.as<R>(), pointer<R>(dx_gates), weights ? pointer<R>(dweight_hh) : nullptr,
                                 project ? pointer<R>(dweight_hr) : nullptr, pointer<R>(dh0), pointer<R>(dc0),
                                 start ? pointer<R>(dh_start) : nullptr, start ? pointer<R>(dc_start) : nullptr});
  };
  door::by_type(z.type, go);
  return {dx_gates, dweight_hh, dh0, dc0, dweight_hr, dh_start, dc_start};
}

Tensor lstm_noise(Tensor seed, int64_t T, int64_t B, int64_t H, Optional rows, int64_t row_offset, int64_t stream,
                  double noise_probability) {
  const char* const op = "lstm_noise";
  check_isa(op);
  if (T < 0 || B < 0 || H < 0) door::fail(op, "T, B and H must not be negative, got ", T, ", ", B, ", ", H);
  const core::LstmNoise noise = view_noise(op, seed, rows, B, row_offset, stream, noise_probability);
  Tensor out = torch::stable::new_empty(seed, std::vector<int64_t>{T, B, 2 * H}, ScalarType::Float);
  core::lstm_noise(noise, T, B, H, pointer<float>(out), team());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTSEQ_OPERATORS, CPU, m) {
  m.impl("lstm_forward", TORCH_BOX(&lstm_forward));
  m.impl("lstm_gates", TORCH_BOX(&lstm_gates));
  m.impl("lstm_backward", TORCH_BOX(&lstm_backward));
  m.impl("lstm_noise", TORCH_BOX(&lstm_noise));
}

}  // namespace fastseq::torch_door
