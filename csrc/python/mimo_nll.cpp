#include "door/mimo_nll.h"

#include "python/array.h"

namespace fastseq::python_door {
namespace {

py::tuple mimo_nll(const py::array& logits, const py::array& labels, double smoothing, int64_t ignore, int threads) {
  const char* const op = "mimo_nll";
  check_call(op, threads);
  const door::Array x = view(op, "logits", logits), y = view(op, "labels", labels);
  const door::NllSizes s = door::check_nll(op, x, y, smoothing, ignore);
  py::array loss = empty(s.type, {}), nll = empty(s.type, {s.N, s.M});
  py::array top = empty(s.type, {s.N, s.M}), logsum = empty(s.type, {s.N, s.M});
  const auto run = [&]<class R>(R) {
    const core::MimoNll<R> call{s.N,
                                s.M,
                                s.K,
                                x.as<R>(),
                                y.as<int64_t>(),
                                smoothing,
                                ignore,
                                pointer<R>(loss),
                                pointer<R>(nll),
                                pointer<R>(top),
                                pointer<R>(logsum)};
    const py::gil_scoped_release release;
    core::mimo_nll(call, team(threads));
  };
  door::by_type(s.type, run);
  return py::make_tuple(loss, nll, top, logsum);
}

py::array mimo_nll_backward(const Optional& dloss, const Optional& dnll, const py::array& logits,
                            const py::array& labels, const py::array& top, const py::array& logsum, double smoothing,
                            int64_t ignore, int threads) {
  const char* const op = "mimo_nll_backward";
  check_call(op, threads);
  const door::Array x = view(op, "logits", logits), y = view(op, "labels", labels);
  const door::Array t = view(op, "top", top), l = view(op, "logsum", logsum);
  const door::Array dl = view(op, "dloss", dloss), dn = view(op, "dnll", dnll);
  const door::NllSizes s = door::check_nll_backward(dl, dn, x, y, t, l, smoothing, ignore);
  py::array out = empty(s.type, {s.N, s.M, s.K});
  const auto run = [&]<class R>(R) {
    const door::Scratch<R> weight(s.M);
    const core::MimoNllBackward<R> call{
        s.N,       s.M,       s.K,       dl.as<R>(), dn.as<R>(),    x.as<R>(),      y.as<int64_t>(),
        t.as<R>(), l.as<R>(), smoothing, ignore,     weight.data(), pointer<R>(out)};
    const py::gil_scoped_release release;
    core::mimo_nll_backward(call, team(threads));
  };
  door::by_type(s.type, run);
  return out;
}

}  // namespace

void bind_mimo_nll(py::module_& m) {
  using py::arg;
  m.def("mimo_nll", &mimo_nll, arg("logits").noconvert(), arg("labels").noconvert(), arg("smoothing") = 0.0,
        arg("ignore") = -100, py::kw_only(), arg("threads") = 1);
  m.def("mimo_nll_backward", &mimo_nll_backward, arg("dloss").noconvert(), arg("dnll").noconvert(),
        arg("logits").noconvert(), arg("labels").noconvert(), arg("top").noconvert(), arg("logsum").noconvert(),
        arg("smoothing") = 0.0, arg("ignore") = -100, py::kw_only(), arg("threads") = 1);
}

}  // namespace fastseq::python_door
