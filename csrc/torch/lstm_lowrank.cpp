#include "core/lstm_lowrank.h"

#include "door/lstm_lowrank.h"
#include "torch/lstm.h"

namespace fastseq::torch_door {
namespace {

using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Eight = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class R>
void run(const core::LowRankForward<R>& call) {
  const core::Team t = team();
  const door::Scratch<R> scratch(core::lstm_lowrank_scratch(call, t.most));
  core::lstm_lowrank_forward(call, scratch.data(), t);
}

template <class R>
void run(const core::LowRankBackward<R>& call) {
  const core::Team t = team();
  const door::Scratch<R> scratch(core::lstm_lowrank_scratch(call, t.most));
  core::lstm_lowrank_backward(call, scratch.data(), t);
}

struct Gates {
  double tau;
  bool hard, reverse;
};

Five forward(const char* op, const Tensor& x_gates, const door::LowRankState& w, const door::LstmState& s,
             const core::LstmNoise& noise, const Gates& how, int64_t save) {
  const door::Array x = view(op, "x_gates", x_gates);
  const door::LstmSizes z = door::check_lstm(op, "x_gates", x, s, how.tau);
  door::check_lowrank(op, w, z);
  if (save < 0 || save > 2) door::fail(op, "save must be 0, 1 or 2, got ", save);
  Tensor h = empty(x_gates, data_size(z, z.P));
  Tensor c = empty(x_gates, save >= 1 ? data_size(z, z.H) : std::vector<int64_t>{0});
  Tensor gates = empty(x_gates, save >= 2 ? data_size(z, 4 * z.H) : std::vector<int64_t>{0});
  Tensor h_n = empty(x_gates, {z.B, z.P}), c_n = empty(x_gates, {z.B, z.H});
  const auto go = [&]<class R>(R) {
    const core::LstmArgs<R> args = door::lstm_args<R>(z, s, how.tau, how.hard, how.reverse);
    run<R>(core::LowRankForward<R>{door::lowrank_weights<R>(w, z.H),
                                   {args, noise, x.as<R>(), pointer<R>(h), save >= 1 ? pointer<R>(c) : nullptr,
                                    save >= 2 ? pointer<R>(gates) : nullptr, pointer<R>(h_n), pointer<R>(c_n)}});
  };
  door::by_type(z.type, go);
  return {h, c, gates, h_n, c_n};
}

// dx_gates, dweight_hh, dup, ddown, dh0, dc0, dh_start, dc_start
Eight backward(const char* op, const door::LstmGrads& g, const Tensor& like, const door::LowRankState& w,
               const door::LstmState& s, const Gates& how, bool weights) {
  const door::LstmSizes z = door::check_lstm_backward(op, g, s, how.tau);
  door::check_lowrank(op, w, z);
  const bool start = s.h_start.given() || s.c_start.given();
  const auto shaped = [&](bool wanted, const door::Array& as) {
    const int dims = wanted && as.given() ? as.dims : 0;
    return empty(like, dims ? std::vector<int64_t>(as.size, as.size + dims) : std::vector<int64_t>{0});
  };
  Tensor dx_gates = empty(like, data_size(z, 4 * z.H)), dh0 = empty(like, {z.B, z.P}), dc0 = empty(like, {z.B, z.H});
  Tensor dup = shaped(weights, w.up), ddown = shaped(weights, w.down), dweight_hh = shaped(weights, w.weight_hh);
  Tensor dh_start = empty(like, {start ? z.P : 0}), dc_start = empty(like, {start ? z.H : 0});
  const auto go = [&]<class R>(R) {
    const core::LstmBackward<R> recurrence{door::lstm_args<R>(z, s, how.tau, how.hard, how.reverse),
                                           g.dh.as<R>(),
                                           g.dc.as<R>(),
                                           g.dgates.as<R>(),
                                           g.dh_n.as<R>(),
                                           g.dc_n.as<R>(),
                                           g.gates.as<R>(),
                                           g.h.as<R>(),
                                           g.c.as<R>(),
                                           pointer<R>(dx_gates),
                                           nullptr,
                                           nullptr,
                                           pointer<R>(dh0),
                                           pointer<R>(dc0),
                                           start ? pointer<R>(dh_start) : nullptr,
                                           start ? pointer<R>(dc_start) : nullptr};
    run<R>(door::lowrank_backward<R>(w, recurrence, z.H, weights, pointer<R>(dup), pointer<R>(ddown),
                                     pointer<R>(dweight_hh)));
  };
  door::by_type(z.type, go);
  return {dx_gates, dweight_hh, dup, ddown, dh0, dc0, dh_start, dc_start};
}

door::LstmGrads view_grads(const char* op, const Optional& dh, const Optional& dc, const Optional& dgates,
                           const Optional& dh_n, const Optional& dc_n, const Tensor& gates, const Tensor& h,
                           const Tensor& c) {
  return {view(op, "dh", dh),     view(op, "dc", dc),       view(op, "dgates", dgates), view(op, "dh_n", dh_n),
          view(op, "dc_n", dc_n), view(op, "gates", gates), view(op, "h", h),           view(op, "c", c)};
}

door::LowRankState factors(const char* op, const Tensor& up, const Tensor& down) {
  return {view(op, "up", up), view(op, "down", down), {}, false, {}};
}

Five lstm_lowrank_forward(Tensor x_gates, Tensor up, Tensor down, Tensor h0, Tensor c0, Optional lengths,
                          Optional batch_sizes, Optional reset, Optional h_start, Optional c_start, Optional seed,
                          Optional rows, int64_t row_offset, int64_t stream, double noise_probability, double tau,
                          bool hard, bool reverse, int64_t save) {
  const char* const op = "lstm_lowrank_forward";
  const door::LstmState s = view_state(op, {}, h0, c0, {}, lengths, batch_sizes, reset, h_start, c_start);
  const int64_t B = s.c0.dims == 2 ? s.c0.size[0] : 0;
  const core::LstmNoise noise = view_noise(op, seed, rows, B, row_offset, stream, noise_probability);
  return forward(op, x_gates, factors(op, up, down), s, noise, {tau, hard, reverse}, save);
}

Seven lstm_lowrank_backward(Optional dh, Optional dc, Optional dgates, Optional dh_n, Optional dc_n, Tensor gates,
                            Tensor h, Tensor c, Tensor up, Tensor down, Tensor h0, Tensor c0, Optional lengths,
                            Optional batch_sizes, Optional reset, Optional h_start, Optional c_start, double tau,
                            bool hard, bool reverse, bool weights) {
  const char* const op = "lstm_lowrank_backward";
  const door::LstmState s = view_state(op, {}, h0, c0, {}, lengths, batch_sizes, reset, h_start, c_start);
  const door::LstmGrads g = view_grads(op, dh, dc, dgates, dh_n, dc_n, gates, h, c);
  const Eight d = backward(op, g, gates, factors(op, up, down), s, {tau, hard, reverse}, weights);
  return {std::get<0>(d), std::get<2>(d), std::get<3>(d), std::get<4>(d),
          std::get<5>(d), std::get<6>(d), std::get<7>(d)};
}

door::LowRankState mixed(const char* op, const Optional& weight_hh, const Tensor& up, const Tensor& down,
                         const int64_t (&ranks)[4]) {
  return {view(op, "up", up),
          view(op, "down", down),
          view(op, "weight_hh", weight_hh),
          true,
          {ranks[0], ranks[1], ranks[2], ranks[3]}};
}

Five lstm_mixed_forward(Tensor x_gates, Optional weight_hh, Tensor up, Tensor down, int64_t rank_i, int64_t rank_f,
                        int64_t rank_g, int64_t rank_o, Tensor h0, Tensor c0, Optional lengths, Optional batch_sizes,
                        Optional reset, Optional h_start, Optional c_start, Optional seed, Optional rows,
                        int64_t row_offset, int64_t stream, double noise_probability, double tau, bool hard,
                        bool reverse, int64_t save) {
  const char* const op = "lstm_mixed_forward";
  const door::LstmState s = view_state(op, {}, h0, c0, {}, lengths, batch_sizes, reset, h_start, c_start);
  const int64_t B = s.c0.dims == 2 ? s.c0.size[0] : 0;
  const core::LstmNoise noise = view_noise(op, seed, rows, B, row_offset, stream, noise_probability);
  const door::LowRankState w = mixed(op, weight_hh, up, down, {rank_i, rank_f, rank_g, rank_o});
  return forward(op, x_gates, w, s, noise, {tau, hard, reverse}, save);
}

Eight lstm_mixed_backward(Optional dh, Optional dc, Optional dgates, Optional dh_n, Optional dc_n, Tensor gates,
                          Tensor h, Tensor c, Optional weight_hh, Tensor up, Tensor down, int64_t rank_i,
                          int64_t rank_f, int64_t rank_g, int64_t rank_o, Tensor h0, Tensor c0, Optional lengths,
                          Optional batch_sizes, Optional reset, Optional h_start, Optional c_start, double tau,
                          bool hard, bool reverse, bool weights) {
  const char* const op = "lstm_mixed_backward";
  const door::LstmState s = view_state(op, {}, h0, c0, {}, lengths, batch_sizes, reset, h_start, c_start);
  const door::LstmGrads g = view_grads(op, dh, dc, dgates, dh_n, dc_n, gates, h, c);
  const door::LowRankState w = mixed(op, weight_hh, up, down, {rank_i, rank_f, rank_g, rank_o});
  return backward(op, g, gates, w, s, {tau, hard, reverse}, weights);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTSEQ_OPERATORS, CPU, m) {
  m.impl("lstm_lowrank_forward", TORCH_BOX(&lstm_lowrank_forward));
  m.impl("lstm_lowrank_backward", TORCH_BOX(&lstm_lowrank_backward));
  m.impl("lstm_mixed_forward", TORCH_BOX(&lstm_mixed_forward));
  m.impl("lstm_mixed_backward", TORCH_BOX(&lstm_mixed_backward));
}

}  // namespace fastseq::torch_door
