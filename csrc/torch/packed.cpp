#include "door/packed.h"

#include "torch/lstm.h"

namespace fastseq::torch_door {
namespace {

Tensor pack_matrix(std::vector<Tensor> rows, std::vector<Tensor> rows_scale, std::vector<int64_t> group,
                   std::vector<Tensor> down, std::vector<Tensor> down_scale, std::vector<int64_t> down_group, int64_t K,
                   bool bounded) {
  const char* const op = "pack_matrix";
  check_isa(op);
  const core::MatrixSource source =
      door::check_parts(op, {view(op, "rows", rows), view(op, "rows_scale", rows_scale), view(op, "down", down),
                             view(op, "down_scale", down_scale), group, down_group, K, bounded});
  const auto bytes = static_cast<int64_t>(core::packed_bytes(source));
  Tensor out = torch::stable::new_empty(rows[0], std::vector<int64_t>{bytes}, ScalarType::Byte);
  core::pack_matrix(source, pointer<uint8_t>(out));
  return out;
}

Tensor linear_packed(Tensor x, Tensor weight, Optional bias, int64_t N) {
  const char* const op = "linear_packed";
  check_isa(op);
  const door::Array vx = view(op, "x", x), vb = view(op, "bias", bias);
  const core::PackedMatrix w = door::open_packed(op, "weight", view(op, "weight", weight), 0);
  const int64_t M = door::check_linear(op, w, vx, vb);
  if (w.N != N) door::fail(op, "N must be the rows of weight = ", w.N, ", got ", N);
  Tensor y = empty(x, {M, N});
  const core::LinearPacked call{M, vx.as<float>(), w.K, vb.as<float>(), pointer<float>(y), N};
  const core::Team t = team();
  const door::Scratch<uint8_t> scratch(core::linear_packed_scratch(w, M, t.most));
  core::linear_packed(w, call, scratch.data(), t);
  return y;
}

// Tensors of the results, and the call that fills them.
struct Results {
  Tensor h, c, gates, h_n, c_n;
  Results(const Tensor& like, const door::LstmSizes& z, int64_t save)
      : h(empty(like, data_size(z, z.P))),
        c(empty(like, save >= 1 ? data_size(z, z.H) : std::vector<int64_t>{0})),
        gates(empty(like, save >= 2 ? data_size(z, 4 * z.H) : std::vector<int64_t>{0})),
        h_n(empty(like, {z.B, z.P})),
        c_n(empty(like, {z.B, z.H})) {}
  core::LstmForward<float> forward(const core::LstmArgs<float>& args, const core::LstmNoise& noise,
                                   const float* x_gates, int64_t save) const {
    return {args,
            noise,
            x_gates,
            pointer<float>(h),
            save >= 1 ? pointer<float>(c) : nullptr,
            save >= 2 ? pointer<float>(gates) : nullptr,
            pointer<float>(h_n),
            pointer<float>(c_n)};
  }
  Five all() const { return {h, c, gates, h_n, c_n}; }
};

void run(const core::LstmPacked& call) {
  const core::Team t = team();
  const door::Scratch<uint8_t> scratch(core::lstm_packed_scratch(call, t.most));
  core::lstm_packed(call, scratch.data(), t);
}

Five lstm_packed_forward(Tensor x, Tensor weight_hh, Tensor h0, Tensor c0, Optional weight_ih, Optional bias,
                         Optional weight_hr, Optional lengths, Optional batch_sizes, Optional reset, Optional h_start,
                         Optional c_start, double tau, bool hard, bool reverse, int64_t save) {
  const char* const op = "lstm_packed_forward";
  check_isa(op);
  const door::Array vx = view(op, "x", x), vb = view(op, "bias", bias);
  door::LstmState s{{},
                    view(op, "h0", h0),
                    view(op, "c0", c0),
                    {},
                    view(op, "lengths", lengths),
                    view(op, "batch_sizes", batch_sizes),
                    view(op, "reset", reset),
                    view(op, "h_start", h_start),
                    view(op, "c_start", c_start)};
  door::PackedWeights w = door::check_packed(op, view(op, "weight_hh", weight_hh), view(op, "weight_hr", weight_hr), s);
  const door::Array gates_like = door::check_input(op, vx, view(op, "weight_ih", weight_ih), vb, w);
  const char* const name = weight_ih ? "x" : "x_gates";
  door::check_float(op, name, vx, save);
  const door::LstmSizes z = door::check_lstm(op, name, gates_like, s, tau);
  const Results out(x, z, save);
  const float* const x_gates = weight_ih ? nullptr : vx.as<float>();
  run({out.forward(door::lstm_args<float>(z, s, tau, hard, reverse), {}, x_gates, save), &w.hh,
       weight_hr ? &w.hr : nullptr, weight_ih ? &w.ih : nullptr, vx.as<float>(), vb.as<float>()});
  return out.all();
}

// The rows of all gates, one scale each, packed for this call.
core::MatrixSource int8_source(const char* op, const door::LstmSizes& z, const Tensor& weight_hh, const Tensor& scale) {
  const door::Array w = view(op, "weight_hh", weight_hh), s = view(op, "scale", scale);
  door::expect(op, "weight_hh", w, door::Type::i8, "[4*H, H]", {4 * z.H, z.H});
  door::expect(op, "scale", s, door::Type::f32, "[4*H]", {4 * z.H});
  core::MatrixSource source{};
  source.N = 4 * z.H;
  source.K = z.H;
  source.gates = 4;
  source.bounded = true;
  for (int64_t g = 0; g < 4; ++g) {
    source.gate[g].rows = {core::Storage::int8, 0, w.as<int8_t>() + g * z.H * z.H, s.as<float>() + g * z.H};
  }
  if (const char* const fault = core::matrix_fault(source)) door::fail(op, fault);
  return source;
}

Five lstm_int8_forward(Tensor x_gates, Tensor weight_hh, Tensor scale, Tensor h0, Tensor c0, Optional lengths,
                       Optional batch_sizes, Optional reset, Optional h_start, Optional c_start, Optional seed,
                       Optional rows, int64_t row_offset, int64_t stream, double noise_probability, double tau,
                       bool hard, bool reverse, int64_t save) {
  const char* const op = "lstm_int8_forward";
  const door::Array x = view(op, "x_gates", x_gates);
  door::LstmState s = view_state(op, x_gates, h0, c0, std::nullopt, lengths, batch_sizes, reset, h_start, c_start);
  door::check_float(op, "x_gates", x, save);
  const int64_t H = s.c0.dims == 2 ? s.c0.size[1] : 0;
  s.weight_hh = door::Array{nullptr, door::Type::f32, 2, {4 * H, H}, true};
  const door::LstmSizes z = door::check_lstm(op, "x_gates", x, s, tau);
  const core::LstmNoise noise = view_noise(op, seed, rows, z.B, row_offset, stream, noise_probability);
  const core::MatrixSource source = int8_source(op, z, weight_hh, scale);
  const size_t bytes = core::packed_bytes(source);
  const door::Scratch<uint8_t> packed(bytes);
  core::pack_matrix(source, packed.data());
  core::PackedMatrix w;
  if (!core::open_matrix(packed.data(), bytes, &w)) door::fail(op, "weight_hh could not be packed");
  const Results out(x_gates, z, save);
  run({out.forward(door::lstm_args<float>(z, s, tau, hard, reverse), noise, x.as<float>(), save), &w, nullptr});
  return out.all();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTSEQ_OPERATORS, CPU, m) {
  m.impl("pack_matrix", TORCH_BOX(&pack_matrix));
  m.impl("linear_packed", TORCH_BOX(&linear_packed));
  m.impl("lstm_packed_forward", TORCH_BOX(&lstm_packed_forward));
  m.impl("lstm_int8_forward", TORCH_BOX(&lstm_int8_forward));
}

}  // namespace fastseq::torch_door
