#include "core/lstm_lowrank.h"

#include <array>

#include "door/lstm_lowrank.h"
#include "python/lstm.h"

namespace fastseq::python_door {
namespace {

template <class R>
void run(const core::LowRankForward<R>& call, int threads) {
  const py::gil_scoped_release release;
  const door::Scratch<R> scratch(core::lstm_lowrank_scratch(call, threads));
  core::lstm_lowrank_forward(call, scratch.data(), team(threads));
}

template <class R>
void run(const core::LowRankBackward<R>& call, int threads) {
  const py::gil_scoped_release release;
  const door::Scratch<R> scratch(core::lstm_lowrank_scratch(call, threads));
  core::lstm_lowrank_backward(call, scratch.data(), team(threads));
}

struct Options {
  double tau;
  bool hard, reverse;
  int threads;
};

py::tuple forward(const char* op, const py::array& x_gates, const door::LowRankState& w, const door::LstmState& s,
                  const core::LstmNoise& noise, const Options& how, int64_t save) {
  const door::Array x = view(op, "x_gates", x_gates);
  const door::LstmSizes z = door::check_lstm(op, "x_gates", x, s, how.tau);
  door::check_lowrank(op, w, z);
  if (save < 0 || save > 2) door::fail(op, "save must be 0, 1 or 2, got ", save);
  py::array h = empty(z.type, data_size(z, z.P)), h_n = empty(z.type, {z.B, z.P}), c_n = empty(z.type, {z.B, z.H});
  py::array c = empty(z.type, save >= 1 ? data_size(z, z.H) : std::vector<int64_t>{0});
  py::array gates = empty(z.type, save >= 2 ? data_size(z, 4 * z.H) : std::vector<int64_t>{0});
  const auto go = [&]<class R>(R) {
    const core::LstmArgs<R> args = door::lstm_args<R>(z, s, how.tau, how.hard, how.reverse);
    run<R>({door::lowrank_weights<R>(w, z.H),
            {args, noise, x.as<R>(), pointer<R>(h), save >= 1 ? pointer<R>(c) : nullptr,
             save >= 2 ? pointer<R>(gates) : nullptr, pointer<R>(h_n), pointer<R>(c_n)}},
           how.threads);
  };
  door::by_type(z.type, go);
  return py::make_tuple(h, c, gates, h_n, c_n);
}

// dx_gates, dweight_hh (mixed only), dup, ddown, dh0, dc0, dh_start, dc_start
py::tuple backward(const char* op, const door::LstmGrads& g, const door::LowRankState& w, const door::LstmState& s,
                   const Options& how, bool weights) {
  const door::LstmSizes z = door::check_lstm_backward(op, g, s, how.tau);
  door::check_lowrank(op, w, z);
  const bool start = s.h_start.given() || s.c_start.given();
  const auto shaped = [&](const door::Array& as) {
    const int dims = weights && as.given() ? as.dims : 0;
    return empty(z.type, dims ? std::vector<int64_t>(as.size, as.size + dims) : std::vector<int64_t>{0});
  };
  py::array dx_gates = empty(z.type, data_size(z, 4 * z.H)), dh0 = empty(z.type, {z.B, z.P});
  py::array dc0 = empty(z.type, {z.B, z.H}), dup = shaped(w.up), ddown = shaped(w.down), dfull = shaped(w.weight_hh);
  py::array dh_start = empty(z.type, {start ? z.P : 0}), dc_start = empty(z.type, {start ? z.H : 0});
  const auto go = [&]<class R>(R) {
    core::LstmBackward<R> recurrence{};
    recurrence.args = door::lstm_args<R>(z, s, how.tau, how.hard, how.reverse);
    recurrence.dh = g.dh.as<R>();
    recurrence.dc = g.dc.as<R>();
    recurrence.dgates = g.dgates.as<R>();
    recurrence.dh_n = g.dh_n.as<R>();
    recurrence.dc_n = g.dc_n.as<R>();
    recurrence.gates = g.gates.as<R>();
    recurrence.h = g.h.as<R>();
    recurrence.c = g.c.as<R>();
    recurrence.dx_gates = pointer<R>(dx_gates);
    recurrence.dh0 = pointer<R>(dh0);
    recurrence.dc0 = pointer<R>(dc0);
    recurrence.dh_start = start ? pointer<R>(dh_start) : nullptr;
    recurrence.dc_start = start ? pointer<R>(dc_start) : nullptr;
    R *const up = pointer<R>(dup), *const down = pointer<R>(ddown), *const full = pointer<R>(dfull);
    run<R>(door::lowrank_backward<R>(w, recurrence, z.H, weights, up, down, full), how.threads);
  };
  door::by_type(z.type, go);
  if (w.mixed) return py::make_tuple(dx_gates, dfull, dup, ddown, dh0, dc0, dh_start, dc_start);
  return py::make_tuple(dx_gates, dup, ddown, dh0, dc0, dh_start, dc_start);
}

door::LstmGrads view_grads(const char* op, const Optional& dh, const Optional& dc, const Optional& dgates,
                           const Optional& dh_n, const Optional& dc_n, const py::array& gates, const py::array& h,
                           const py::array& c) {
  return {view(op, "dh", dh),     view(op, "dc", dc),       view(op, "dgates", dgates), view(op, "dh_n", dh_n),
          view(op, "dc_n", dc_n), view(op, "gates", gates), view(op, "h", h),           view(op, "c", c)};
}

door::LowRankState factors(const char* op, const py::array& up, const py::array& down) {
  return {view(op, "up", up), view(op, "down", down), {}, false, {}};
}

py::tuple lstm_lowrank_forward(const py::array& x_gates, const py::array& up, const py::array& down,
                               const py::array& h0, const py::array& c0, const Optional& lengths,
                               const Optional& batch_sizes, const Optional& reset, const Optional& h_start,
                               const Optional& c_start, const std::optional<int64_t>& seed, const Optional& rows,
                               int64_t row_offset, int64_t stream, double noise_probability, double tau, bool hard,
                               bool reverse, int64_t save, int threads) {
  const char* const op = "lstm_lowrank_forward";
  check_call(op, threads);
  const door::LstmState s = view_state(op, {}, h0, c0, {}, lengths, batch_sizes, reset, h_start, c_start);
  const int64_t B = s.c0.dims == 2 ? s.c0.size[0] : 0;
  const core::LstmNoise noise = view_noise(op, seed, rows, B, row_offset, stream, noise_probability);
  return forward(op, x_gates, factors(op, up, down), s, noise, {tau, hard, reverse, threads}, save);
}

py::tuple lstm_lowrank_backward(const Optional& dh, const Optional& dc, const Optional& dgates, const Optional& dh_n,
                                const Optional& dc_n, const py::array& gates, const py::array& h, const py::array& c,
                                const py::array& up, const py::array& down, const py::array& h0, const py::array& c0,
                                const Optional& lengths, const Optional& batch_sizes, const Optional& reset,
                                const Optional& h_start, const Optional& c_start, double tau, bool hard, bool reverse,
                                bool weights, int threads) {
  const char* const op = "lstm_lowrank_backward";
  check_call(op, threads);
  const door::LstmState s = view_state(op, {}, h0, c0, {}, lengths, batch_sizes, reset, h_start, c_start);
  const door::LstmGrads g = view_grads(op, dh, dc, dgates, dh_n, dc_n, gates, h, c);
  return backward(op, g, factors(op, up, down), s, {tau, hard, reverse, threads}, weights);
}

using Ranks = std::array<int64_t, 4>;

door::LowRankState mixed(const char* op, const Optional& weight_hh, const py::array& up, const py::array& down,
                         const Ranks& ranks) {
  return {view(op, "up", up),
          view(op, "down", down),
          view(op, "weight_hh", weight_hh),
          true,
          {ranks[0], ranks[1], ranks[2], ranks[3]}};
}

py::tuple lstm_mixed_forward(const py::array& x_gates, const Optional& weight_hh, const py::array& up,
                             const py::array& down, int64_t rank_i, int64_t rank_f, int64_t rank_g, int64_t rank_o,
                             const py::array& h0, const py::array& c0, const Optional& lengths,
                             const Optional& batch_sizes, const Optional& reset, const Optional& h_start,
                             const Optional& c_start, const std::optional<int64_t>& seed, const Optional& rows,
                             int64_t row_offset, int64_t stream, double noise_probability, double tau, bool hard,
                             bool reverse, int64_t save, int threads) {
  const char* const op = "lstm_mixed_forward";
  check_call(op, threads);
  const door::LstmState s = view_state(op, {}, h0, c0, {}, lengths, batch_sizes, reset, h_start, c_start);
  const int64_t B = s.c0.dims == 2 ? s.c0.size[0] : 0;
  const core::LstmNoise noise = view_noise(op, seed, rows, B, row_offset, stream, noise_probability);
  const door::LowRankState w = mixed(op, weight_hh, up, down, {rank_i, rank_f, rank_g, rank_o});
  return forward(op, x_gates, w, s, noise, {tau, hard, reverse, threads}, save);
}

py::tuple lstm_mixed_backward(const Optional& dh, const Optional& dc, const Optional& dgates, const Optional& dh_n,
                              const Optional& dc_n, const py::array& gates, const py::array& h, const py::array& c,
                              const Optional& weight_hh, const py::array& up, const py::array& down, int64_t rank_i,
                              int64_t rank_f, int64_t rank_g, int64_t rank_o, const py::array& h0, const py::array& c0,
                              const Optional& lengths, const Optional& batch_sizes, const Optional& reset,
                              const Optional& h_start, const Optional& c_start, double tau, bool hard, bool reverse,
                              bool weights, int threads) {
  const char* const op = "lstm_mixed_backward";
  check_call(op, threads);
  const door::LstmState s = view_state(op, {}, h0, c0, {}, lengths, batch_sizes, reset, h_start, c_start);
  const door::LstmGrads g = view_grads(op, dh, dc, dgates, dh_n, dc_n, gates, h, c);
  const door::LowRankState w = mixed(op, weight_hh, up, down, {rank_i, rank_f, rank_g, rank_o});
  return backward(op, g, w, s, {tau, hard, reverse, threads}, weights);
}

}  // namespace

void bind_lstm_lowrank(py::module_& m) {
  using py::arg;
  const auto none = [](const char* name) { return arg(name).noconvert() = py::none(); };
  const auto array = [](const char* name) { return arg(name).noconvert(); };
  m.def("lstm_lowrank_forward", &lstm_lowrank_forward, array("x_gates"), array("up"), array("down"), array("h0"),
        array("c0"), none("lengths"), none("batch_sizes"), none("reset"), none("h_start"), none("c_start"),
        arg("seed") = py::none(), none("rows"), arg("row_offset") = 0, arg("stream") = 0,
        arg("noise_probability") = 1.0, arg("tau") = 1.0, arg("hard") = false, arg("reverse") = false, arg("save") = 0,
        py::kw_only(), arg("threads") = 1);
  m.def("lstm_lowrank_backward", &lstm_lowrank_backward, none("dh"), none("dc"), none("dgates"), none("dh_n"),
        none("dc_n"), array("gates"), array("h"), array("c"), array("up"), array("down"), array("h0"), array("c0"),
        none("lengths"), none("batch_sizes"), none("reset"), none("h_start"), none("c_start"), arg("tau") = 1.0,
        arg("hard") = false, arg("reverse") = false, arg("weights") = true, py::kw_only(), arg("threads") = 1);
  m.def("lstm_mixed_forward", &lstm_mixed_forward, array("x_gates"), arg("weight_hh").noconvert().none(true),
        array("up"), array("down"), arg("rank_i"), arg("rank_f"), arg("rank_g"), arg("rank_o"), array("h0"),
        array("c0"), none("lengths"), none("batch_sizes"), none("reset"), none("h_start"), none("c_start"),
        arg("seed") = py::none(), none("rows"), arg("row_offset") = 0, arg("stream") = 0,
        arg("noise_probability") = 1.0, arg("tau") = 1.0, arg("hard") = false, arg("reverse") = false, arg("save") = 0,
        py::kw_only(), arg("threads") = 1);
  m.def("lstm_mixed_backward", &lstm_mixed_backward, none("dh"), none("dc"), none("dgates"), none("dh_n"), none("dc_n"),
        array("gates"), array("h"), array("c"), arg("weight_hh").noconvert().none(true), array("up"), array("down"),
        arg("rank_i"), arg("rank_f"), arg("rank_g"), arg("rank_o"), array("h0"), array("c0"), none("lengths"),
        none("batch_sizes"), none("reset"), none("h_start"), none("c_start"), arg("tau") = 1.0, arg("hard") = false,
        arg("reverse") = false, arg("weights") = true, py::kw_only(), arg("threads") = 1);
}

}  // namespace fastseq::python_door
