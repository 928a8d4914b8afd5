#include "core/lstm.h"

#include "python/lstm.h"

namespace fastseq::python_door {
namespace {

template <class R>
void run(const core::LstmForward<R>& call, int threads) {
  const py::gil_scoped_release release;
  const door::Scratch<R> scratch(core::lstm_forward_scratch(call.args, threads));
  core::lstm_forward(call, scratch.data(), team(threads));
}

template <class R>
void run(const core::LstmGates<R>& call, int threads) {
  const py::gil_scoped_release release;
  const door::Scratch<R> scratch(core::lstm_gates_scratch(call.args, threads));
  core::lstm_gates(call, scratch.data(), team(threads));
}

template <class R>
void run(const core::LstmBackward<R>& call, int threads) {
  const py::gil_scoped_release release;
  const door::Scratch<R> scratch(core::lstm_backward_scratch(call.args, call.dweight_hh != nullptr, threads));
  core::lstm_backward(call, scratch.data(), team(threads));
}

py::tuple lstm_forward(const py::array& x_gates, const py::array& weight_hh, const py::array& h0, const py::array& c0,
                       const Optional& weight_hr, const Optional& lengths, const Optional& batch_sizes,
                       const Optional& reset, const Optional& h_start, const Optional& c_start,
                       const std::optional<int64_t>& seed, const Optional& rows, int64_t row_offset, int64_t stream,
                       double noise_probability, double tau, bool hard, bool reverse, int64_t save, int threads) {
  const char* const op = "lstm_forward";
  check_call(op, threads);
  const door::Array x = view(op, "x_gates", x_gates);
  const door::LstmState s = view_state(op, weight_hh, h0, c0, weight_hr, lengths, batch_sizes, reset, h_start, c_start);
  const door::LstmSizes z = door::check_lstm(op, "x_gates", x, s, tau);
  const core::LstmNoise noise = view_noise(op, seed, rows, z.B, row_offset, stream, noise_probability);
  if (save < 0 || save > 2) door::fail(op, "save must be 0, 1 or 2, got ", save);
  py::array h = empty(z.type, data_size(z, z.P)), h_n = empty(z.type, {z.B, z.P}), c_n = empty(z.type, {z.B, z.H});
  py::array c = empty(z.type, save >= 1 ? data_size(z, z.H) : std::vector<int64_t>{0});
  py::array gates = empty(z.type, save >= 2 ? data_size(z, 4 * z.H) : std::vector<int64_t>{0});
  const auto go = [&]<class R>(R) {
    run<R>({door::lstm_args<R>(z, s, tau, hard, reverse), noise, x.as<R>(), pointer<R>(h),
            save >= 1 ? pointer<R>(c) : nullptr, save >= 2 ? pointer<R>(gates) : nullptr, pointer<R>(h_n),
            pointer<R>(c_n)},
           threads);
  };
  door::by_type(z.type, go);
  return py::make_tuple(h, c, gates, h_n, c_n);
}

py::array lstm_gates(const py::array& x_gates, const py::array& h, const py::array& c, const py::array& weight_hh,
                     const py::array& h0, const py::array& c0, const Optional& weight_hr, const Optional& lengths,
                     const Optional& batch_sizes, const Optional& reset, const Optional& h_start,
                     const Optional& c_start, const std::optional<int64_t>& seed, const Optional& rows,
                     int64_t row_offset, int64_t stream, double noise_probability, double tau, bool hard, bool reverse,
                     int threads) {
  const char* const op = "lstm_gates";
  check_call(op, threads);
  const door::Array x = view(op, "x_gates", x_gates), vh = view(op, "h", h), vc = view(op, "c", c);
  const door::LstmState s = view_state(op, weight_hh, h0, c0, weight_hr, lengths, batch_sizes, reset, h_start, c_start);
  const door::LstmSizes z = door::check_lstm(op, "x_gates", x, s, tau);
  door::check_data(op, "h", vh, z, z.P, "P");
  door::check_data(op, "c", vc, z, z.H, "H");
  const core::LstmNoise noise = view_noise(op, seed, rows, z.B, row_offset, stream, noise_probability);
  py::array gates = empty(z.type, data_size(z, 4 * z.H));
  const auto go = [&]<class R>(R) {
    run<R>({door::lstm_args<R>(z, s, tau, hard, reverse), noise, x.as<R>(), vh.as<R>(), vc.as<R>(), pointer<R>(gates)},
           threads);
  };
  door::by_type(z.type, go);
  return gates;
}

py::tuple lstm_backward(const Optional& dh, const Optional& dc, const Optional& dgates, const Optional& dh_n,
                        const Optional& dc_n, const py::array& gates, const py::array& h, const py::array& c,
                        const py::array& weight_hh, const py::array& h0, const py::array& c0, const Optional& weight_hr,
                        const Optional& lengths, const Optional& batch_sizes, const Optional& reset,
                        const Optional& h_start, const Optional& c_start, double tau, bool hard, bool reverse,
                        bool weights, int threads) {
  const char* const op = "lstm_backward";
  check_call(op, threads);
  const door::LstmState s = view_state(op, weight_hh, h0, c0, weight_hr, lengths, batch_sizes, reset, h_start, c_start);
  const door::LstmGrads g{view(op, "dh", dh),     view(op, "dc", dc),     view(op, "dgates", dgates),
                          view(op, "dh_n", dh_n), view(op, "dc_n", dc_n), view(op, "gates", gates),
                          view(op, "h", h),       view(op, "c", c)};
  const door::LstmSizes z = door::check_lstm_backward(op, g, s, tau);
  const bool start = s.h_start.given() || s.c_start.given(), project = weights && s.weight_hr.given();
  const auto sized = [&](bool wanted, std::vector<int64_t> size) {
    return empty(z.type, wanted ? size : std::vector<int64_t>{0});
  };
  py::array dx_gates = empty(z.type, data_size(z, 4 * z.H)), dh0 = empty(z.type, {z.B, z.P});
  py::array dc0 = empty(z.type, {z.B, z.H}), dweight_hh = sized(weights, {4 * z.H, z.P});
  py::array dweight_hr = sized(project, {z.P, z.H}), dh_start = sized(start, {z.P}), dc_start = sized(start, {z.H});
  const auto go = [&]<class R>(R) {
    run<R>({door::lstm_args<R>(z, s, tau, hard, reverse), g.dh.as<R>(), g.dc.as<R>(), g.dgates.as<R>(), g.dh_n.as<R>(),
            g.dc_n.as<R>(), g.gates.as<R>(), g.h.as<R>(), g.c.as<R>(), pointer<R>(dx_gates),
            weights ? pointer<R>(dweight_hh) : nullptr, project ? pointer<R>(dweight_hr) : nullptr, pointer<R>(dh0),
            pointer<R>(dc0), start ? pointer<R>(dh_start) : nullptr, start ? pointer<R>(dc_start) : nullptr},
           threads);
  };
  door::by_type(z.type, go);
  return py::make_tuple(dx_gates, dweight_hh, dh0, dc0, dweight_hr, dh_start, dc_start);
}

py::array lstm_noise(int64_t seed, int64_t T, int64_t B, int64_t H, const Optional& rows, int64_t row_offset,
                     int64_t stream, double noise_probability, int threads) {
  const char* const op = "lstm_noise";
  check_call(op, threads);
  if (T < 0 || B < 0 || H < 0) door::fail(op, "T, B and H must not be negative, got ", T, ", ", B, ", ", H);
  const core::LstmNoise noise = view_noise(op, seed, rows, B, row_offset, stream, noise_probability);
  py::array_t<float> out({T, B, 2 * H});
  float* const data = out.mutable_data();
  const py::gil_scoped_release release;
  core::lstm_noise(noise, T, B, H, data, team(threads));
  return out;
}

py::array philox(const py::array& counter, uint64_t key) {
  check_call("philox", 1);
  if (!py::isinstance<py::array_t<uint32_t>>(counter) || counter.ndim() < 1 || counter.shape(counter.ndim() - 1) != 4 ||
      !(counter.flags() & py::array::c_style)) {
    door::fail("philox", "counter must be a contiguous uint32 array [..., 4]");
  }
  py::array_t<uint32_t> words(std::vector<int64_t>(counter.shape(), counter.shape() + counter.ndim()));
  core::kernels().philox(counter.size() / 4, static_cast<const uint32_t*>(counter.data()), key, words.mutable_data());
  return words;
}

}  // namespace

void bind_lstm(py::module_& m) {
  using py::arg;
  const auto none = [](const char* name) { return arg(name).noconvert() = py::none(); };
  m.def("lstm_forward", &lstm_forward, arg("x_gates").noconvert(), arg("weight_hh").noconvert(), arg("h0").noconvert(),
        arg("c0").noconvert(), none("weight_hr"), none("lengths"), none("batch_sizes"), none("reset"), none("h_start"),
        none("c_start"), arg("seed") = py::none(), none("rows"), arg("row_offset") = 0, arg("stream") = 0,
        arg("noise_probability") = 1.0, arg("tau") = 1.0, arg("hard") = false, arg("reverse") = false, arg("save") = 0,
        py::kw_only(), arg("threads") = 1);
  m.def("lstm_gates", &lstm_gates, arg("x_gates").noconvert(), arg("h").noconvert(), arg("c").noconvert(),
        arg("weight_hh").noconvert(), arg("h0").noconvert(), arg("c0").noconvert(), none("weight_hr"), none("lengths"),
        none("batch_sizes"), none("reset"), none("h_start"), none("c_start"), arg("seed") = py::none(), none("rows"),
        arg("row_offset") = 0, arg("stream") = 0, arg("noise_probability") = 1.0, arg("tau") = 1.0, arg("hard") = false,
        arg("reverse") = false, py::kw_only(), arg("threads") = 1);
  m.def("lstm_backward", &lstm_backward, none("dh"), none("dc"), none("dgates"), none("dh_n"), none("dc_n"),
        arg("gates").noconvert(), arg("h").noconvert(), arg("c").noconvert(), arg("weight_hh").noconvert(),
        arg("h0").noconvert(), arg("c0").noconvert(), none("weight_hr"), none("lengths"), none("batch_sizes"),
        none("reset"), none("h_start"), none("c_start"), arg("tau") = 1.0, arg("hard") = false, arg("reverse") = false,
        arg("weights") = true, py::kw_only(), arg("threads") = 1);
  m.def("lstm_noise", &lstm_noise, arg("seed"), arg("T"), arg("B"), arg("H"), none("rows"), arg("row_offset") = 0,
        arg("stream") = 0, arg("noise_probability") = 1.0, py::kw_only(), arg("threads") = 1);
  m.def("philox", &philox, arg("counter").noconvert(), arg("key"));
}

}  // namespace fastseq::python_door
