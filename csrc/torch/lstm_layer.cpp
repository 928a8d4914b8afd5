#include "core/lstm_layer.h"

#include <tuple>

#include "door/lstm.h"
#include "torch/lstm.h"

namespace fastseq::torch_door {
namespace {

using Nine = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Input {
  door::Array x, weight_ih, bias;
};

Input view_input(const char* op, const Tensor& x, const Tensor& weight_ih, const Optional& bias) {
  return {view(op, "x", x), view(op, "weight_ih", weight_ih), view(op, "bias", bias)};
}

// x with the sizes of its pre-activations, for the checks of the recurrence.
door::Array as_gates(const char* op, const door::Array& x, const door::LstmState& s) {
  door::Array out = x;
  if (x.dims < 1) door::fail(op, "x must be [T, B, I], or [N, I] with batch_sizes, got a scalar");
  out.size[x.dims - 1] = s.c0.dims == 2 ? 4 * s.c0.size[1] : -1;
  return out;
}

void check_input(const char* op, const Input& in, const door::LstmSizes& z) {
  const int64_t I = in.x.size[in.x.dims - 1];
  door::check_data(op, "x", in.x, z, I, "I");
  door::expect(op, "weight_ih", in.weight_ih, z.type, "[4*H, I]", {4 * z.H, I});
  if (in.bias.given()) door::expect(op, "bias", in.bias, z.type, "[4*H]", {4 * z.H});
}

template <class R>
core::LayerInput<R> input_args(const Input& in) {
  return {in.x.size[in.x.dims - 1], in.x.as<R>(), in.weight_ih.as<R>(), in.bias.as<R>()};
}

Five lstm_layer_forward(Tensor x, Tensor weight_ih, Optional bias, Tensor weight_hh, Tensor h0, Tensor c0,
                        Optional weight_hr, Optional lengths, Optional batch_sizes, Optional reset, Optional h_start,
                        Optional c_start, Optional seed, Optional rows, int64_t row_offset, int64_t stream,
                        double noise_probability, double tau, bool hard, bool reverse, int64_t save) {
  const char* const op = "lstm_layer_forward";
  const Input in = view_input(op, x, weight_ih, bias);
  const door::LstmState s = view_state(op, weight_hh, h0, c0, weight_hr, lengths, batch_sizes, reset, h_start, c_start);
  const door::LstmSizes z = door::check_lstm(op, "x", as_gates(op, in.x, s), s, tau);
  check_input(op, in, z);
  const core::LstmNoise noise = view_noise(op, seed, rows, z.B, row_offset, stream, noise_probability);
  if (save < 0 || save > 2) door::fail(op, "save must be 0, 1 or 2, got ", save);
  Tensor h = empty(x, data_size(z, z.P)), h_n = empty(x, {z.B, z.P}), c_n = empty(x, {z.B, z.H});
  Tensor c = empty(x, save >= 1 ? data_size(z, z.H) : std::vector<int64_t>{0});
  Tensor gates = empty(x, save >= 2 ? data_size(z, 4 * z.H) : std::vector<int64_t>{0});
  const auto go = [&]<class R>(R) {
    const core::LstmLayerForward<R> call{input_args<R>(in),
                                         {door::lstm_args<R>(z, s, tau, hard, reverse), noise, nullptr, pointer<R>(h),
                                          save >= 1 ? pointer<R>(c) : nullptr, save >= 2 ? pointer<R>(gates) : nullptr,
                                          pointer<R>(h_n), pointer<R>(c_n)}};
    const core::Team t = team();
    const door::Scratch<R> scratch(core::lstm_layer_scratch(call, t.most));
    core::lstm_layer_forward(call, scratch.data(), t);
  };
  door::by_type(z.type, go);
  return {h, c, gates, h_n, c_n};
}

// `gates` without elements: rebuild them.
Nine lstm_layer_backward(Optional dh, Optional dc, Optional dgates, Optional dh_n, Optional dc_n, Tensor x,
                         Tensor weight_ih, Optional bias, Optional gates, Tensor h, Tensor c, Tensor weight_hh,
                         Tensor h0, Tensor c0, Optional weight_hr, Optional lengths, Optional batch_sizes,
                         Optional reset, Optional h_start, Optional c_start, Optional seed, Optional rows,
                         int64_t row_offset, int64_t stream, double noise_probability, double tau, bool hard,
                         bool reverse, bool needs_x, bool needs_weight_ih, bool needs_bias, bool weights) {
  const char* const op = "lstm_layer_backward";
  const Input in = view_input(op, x, weight_ih, bias);
  const door::LstmState s = view_state(op, weight_hh, h0, c0, weight_hr, lengths, batch_sizes, reset, h_start, c_start);
  const door::Array as_x = as_gates(op, in.x, s);
  const door::LstmGrads g{view(op, "dh", dh),     view(op, "dc", dc),     view(op, "dgates", dgates),
                          view(op, "dh_n", dh_n), view(op, "dc_n", dc_n), gates ? view(op, "gates", gates) : as_x,
                          view(op, "h", h),       view(op, "c", c)};
  const door::LstmSizes z = door::check_lstm_backward(op, g, s, tau);
  check_input(op, in, z);
  const core::LstmNoise noise = view_noise(op, seed, rows, z.B, row_offset, stream, noise_probability);
  const bool start = s.h_start.given() || s.c_start.given(), project = weights && s.weight_hr.given();
  const auto sized = [&](bool wanted, std::vector<int64_t> size) {
    return empty(x, wanted ? size : std::vector<int64_t>{0});
  };
  const int64_t I = in.x.size[in.x.dims - 1];
  Tensor dx = sized(needs_x, data_size(z, I)), dweight_ih = sized(needs_weight_ih, {4 * z.H, I});
  Tensor dbias = sized(needs_bias, {4 * z.H}), dh0 = empty(x, {z.B, z.P}), dc0 = empty(x, {z.B, z.H});
  Tensor dweight_hh = sized(weights, {4 * z.H, z.P}), dweight_hr = sized(project, {z.P, z.H});
  Tensor dh_start = sized(start, {z.P}), dc_start = sized(start, {z.H});
  const auto go = [&]<class R>(R) {
    const core::LstmLayerBackward<R> call{
        input_args<R>(in),
        noise,
        {door::lstm_args<R>(z, s, tau, hard, reverse), g.dh.as<R>(), g.dc.as<R>(), g.dgates.as<R>(), g.dh_n.as<R>(),
         g.dc_n.as<R>(), gates ? g.gates.as<R>() : nullptr, g.h.as<R>(), g.c.as<R>(), nullptr,
         weights ? pointer<R>(dweight_hh) : nullptr, project ? pointer<R>(dweight_hr) : nullptr, pointer<R>(dh0),
         pointer<R>(dc0), start ? pointer<R>(dh_start) : nullptr, start ? pointer<R>(dc_start) : nullptr},
        needs_x ? pointer<R>(dx) : nullptr,
        needs_weight_ih ? pointer<R>(dweight_ih) : nullptr,
        needs_bias ? pointer<R>(dbias) : nullptr};
    const core::Team t = team();
    const door::Scratch<R> scratch(core::lstm_layer_scratch(call, t.most));
    core::lstm_layer_backward(call, scratch.data(), t);
  };
  door::by_type(z.type, go);
  return {dx, dweight_ih, dbias, dweight_hh, dh0, dc0, dweight_hr, dh_start, dc_start};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTSEQ_OPERATORS, CPU, m) {
  m.impl("lstm_layer_forward", TORCH_BOX(&lstm_layer_forward));
  m.impl("lstm_layer_backward", TORCH_BOX(&lstm_layer_backward));
}

}  // namespace fastseq::torch_door
