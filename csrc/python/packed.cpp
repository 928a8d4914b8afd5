#include "door/packed.h"

#include "python/array.h"

namespace fastseq::python_door {
namespace {

py::array pack_matrix(const std::vector<py::array>& rows, const std::vector<py::array>& rows_scale,
                      const std::vector<int64_t>& group, const std::vector<py::array>& down,
                      const std::vector<py::array>& down_scale, const std::vector<int64_t>& down_group, int64_t K,
                      bool bounded) {
  const char* const op = "pack_matrix";
  check_call(op, 1);
  const core::MatrixSource source =
      door::check_parts(op, {view(op, "rows", rows), view(op, "rows_scale", rows_scale), view(op, "down", down),
                             view(op, "down_scale", down_scale), group, down_group, K, bounded});
  py::array_t<uint8_t> out(static_cast<py::ssize_t>(core::packed_bytes(source)));
  core::pack_matrix(source, out.mutable_data());
  return out;
}

py::array linear_packed(const py::array& x, const py::array& weight, const Optional& bias, int threads) {
  const char* const op = "linear_packed";
  check_call(op, threads);
  const door::Array vx = view(op, "x", x), vb = view(op, "bias", bias);
  const core::PackedMatrix w = door::open_packed(op, "weight", view(op, "weight", weight), 0);
  const int64_t M = door::check_linear(op, w, vx, vb);
  py::array out = empty(door::Type::f32, {M, w.N});
  const core::LinearPacked call{M, vx.as<float>(), w.K, vb.as<float>(), pointer<float>(out), w.N};
  const py::gil_scoped_release release;
  const door::Scratch<uint8_t> scratch(core::linear_packed_scratch(w, M, threads));
  core::linear_packed(w, call, scratch.data(), team(threads));
  return out;
}

py::tuple lstm_packed(const py::array& x, const py::array& weight_hh, const py::array& h0, const py::array& c0,
                      const Optional& weight_ih, const Optional& bias, const Optional& weight_hr,
                      const Optional& lengths, const Optional& batch_sizes, const Optional& reset,
                      const Optional& h_start, const Optional& c_start, double tau, bool hard, bool reverse,
                      int64_t save, int threads) {
  const char* const op = "lstm_packed";
  check_call(op, threads);
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
  const auto sized = [&](bool wanted, int64_t width) {
    if (!wanted) return empty(z.type, {0});
    return empty(z.type, z.packed ? std::vector<int64_t>{z.N, width} : std::vector<int64_t>{z.T, z.B, width});
  };
  py::array h = sized(true, z.P), c = sized(save >= 1, z.H), gates = sized(save >= 2, 4 * z.H);
  py::array h_n = empty(z.type, {z.B, z.P}), c_n = empty(z.type, {z.B, z.H});
  const core::LstmPacked call{{door::lstm_args<float>(z, s, tau, hard, reverse),
                               {},
                               weight_ih ? nullptr : vx.as<float>(),
                               pointer<float>(h),
                               save >= 1 ? pointer<float>(c) : nullptr,
                               save >= 2 ? pointer<float>(gates) : nullptr,
                               pointer<float>(h_n),
                               pointer<float>(c_n)},
                              &w.hh,
                              weight_hr ? &w.hr : nullptr,
                              weight_ih ? &w.ih : nullptr,
                              vx.as<float>(),
                              vb.as<float>()};
  {
    const py::gil_scoped_release release;
    const door::Scratch<uint8_t> scratch(core::lstm_packed_scratch(call, threads));
    core::lstm_packed(call, scratch.data(), team(threads));
  }
  return py::make_tuple(h, c, gates, h_n, c_n);
}

}  // namespace

void bind_packed(py::module_& m) {
  using py::arg;
  const auto none = [](const char* name) { return arg(name).noconvert() = py::none(); };
  m.def("pack_matrix", &pack_matrix, arg("rows"), arg("rows_scale"), arg("group"), arg("down"), arg("down_scale"),
        arg("down_group"), arg("K"), arg("bounded"));
  m.def("linear_packed", &linear_packed, arg("x").noconvert(), arg("weight").noconvert(), none("bias"), py::kw_only(),
        arg("threads") = 1);
  m.def("lstm_packed", &lstm_packed, arg("x").noconvert(), arg("weight_hh").noconvert(), arg("h0").noconvert(),
        arg("c0").noconvert(), none("weight_ih"), none("bias"), none("weight_hr"), none("lengths"), none("batch_sizes"),
        none("reset"), none("h_start"), none("c_start"), arg("tau") = 1.0, arg("hard") = false, arg("reverse") = false,
        arg("save") = 0, py::kw_only(), arg("threads") = 1);
}

}  // namespace fastseq::python_door
