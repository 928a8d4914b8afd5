#include "door/mimo.h"

#include "python/array.h"

namespace fastseq::python_door {
namespace {

// Of the type of `like`, whatever it is.
py::array empty_like(const py::array& like, const std::vector<int64_t>& size) { return py::array(like.dtype(), size); }

// A plain copy: of any type but objects, whose references it would not count.
py::tuple mimo_gather(const py::array& x, const py::array& index, const Optional& labels, int threads) {
  const char* const op = "mimo_gather";
  check_call(op, threads);
  const door::Array vx = view(op, "x", x), vi = view(op, "index", index), vl = view(op, "labels", labels);
  for (const py::array& array : {x, labels ? *labels : x}) {
    if (array.dtype().attr("hasobject").cast<bool>()) door::fail(op, "x and labels must not hold Python objects");
  }
  const core::MimoShape s = door::check_gather(vx, vi, vl);
  const int64_t C = vx.size[3], L = vl.given() ? vl.size[1] : 0;
  py::array out = empty_like(x, {s.A, s.N, s.S, s.M * C});
  py::array taken = labels ? empty_like(*labels, {s.N, s.M, L}) : py::array(py::array_t<int64_t>(0));
  void *const to = out.mutable_data(), *const labels_to = taken.mutable_data();
  const py::gil_scoped_release release;
  core::mimo_gather({s, C * vx.bytes, vx.data, to}, team(threads));
  if (labels) {
    core::mimo_gather({{1, s.B, s.N, 1, s.M, s.index}, L * vl.bytes, vl.data, labels_to}, team(threads));
  }
  const py::gil_scoped_acquire acquire;
  return py::make_tuple(out, taken);
}

template <class R>
using Sums = void (*)(const core::MimoSums<R>& call, void* scratch, const core::Team& team);

template <class R>
void run(Sums<R> sums, const door::MimoSizes& z, const door::Array& in, const door::Array& bias, py::array& out,
         int threads) {
  const core::MimoSums<R> call{z.shape, z.width, in.as<R>(), bias.as<R>(), pointer<R>(out)};
  const py::gil_scoped_release release;
  const door::Scratch<char> scratch(core::mimo_sums_scratch(z.shape));
  sums(call, scratch.data(), team(threads));
}

py::array mimo_gather_backward(const py::array& d, const py::array& index, int64_t B, int threads) {
  const char* const op = "mimo_gather_backward";
  check_call(op, threads);
  const door::Array vd = view(op, "d", d);
  const door::MimoSizes z = door::check_adjoint(op, vd, view(op, "index", index), B, true);
  py::array out = empty(z.type, {z.shape.A, B, z.shape.S, z.width});
  door::by_type(z.type, [&]<class R>(R) { run<R>(core::mimo_gather_backward<R>, z, vd, door::Array{}, out, threads); });
  return out;
}

py::array mimo_combine(const py::array& parts, const py::array& index, const Optional& bias, int threads) {
  const char* const op = "mimo_combine";
  check_call(op, threads);
  const door::Array vp = view(op, "parts", parts), vb = view(op, "bias", bias);
  const door::MimoSizes z = door::check_combine(vp, view(op, "index", index), vb);
  py::array out = empty(z.type, {z.shape.A, z.shape.N, z.shape.S, z.width});
  door::by_type(z.type, [&]<class R>(R) { run<R>(core::mimo_combine<R>, z, vp, vb, out, threads); });
  return out;
}

py::array mimo_combine_backward(const py::array& d, const py::array& index, int64_t B, int threads) {
  const char* const op = "mimo_combine_backward";
  check_call(op, threads);
  const door::Array vd = view(op, "d", d);
  const door::MimoSizes z = door::check_adjoint(op, vd, view(op, "index", index), B, false);
  py::array out = empty(z.type, {z.shape.A, B, z.shape.S, z.shape.M * z.width});
  door::by_type(z.type,
                [&]<class R>(R) { run<R>(core::mimo_combine_backward<R>, z, vd, door::Array{}, out, threads); });
  return out;
}

py::array mimo_project(const py::array& x, const py::array& weight, const Optional& bias, const py::array& index,
                       int threads) {
  const char* const op = "mimo_project";
  check_call(op, threads);
  const door::Array vx = view(op, "x", x), vw = view(op, "weight", weight), vb = view(op, "bias", bias);
  const door::MimoProjectSizes z = door::check_project(op, vx, vw, view(op, "index", index));
  if (vb.given()) door::expect(op, "bias", vb, z.type, "[G]", {z.G});
  py::array out = empty(z.type, {z.shape.A, z.shape.N, z.shape.S, z.G});
  door::by_type(z.type, [&]<class R>(R) {
    const core::MimoProject<R> call{z.shape, z.C, z.G, vx.as<R>(), vw.as<R>(), vb.as<R>(), pointer<R>(out)};
    const py::gil_scoped_release release;
    const door::Scratch<char> scratch(core::mimo_project_scratch(call, threads));
    core::mimo_project(call, scratch.data(), team(threads));
  });
  return out;
}

py::tuple mimo_project_backward(const py::array& d, const py::array& x, const py::array& weight, const py::array& index,
                                bool needs_x, bool needs_weight, bool needs_bias, int threads) {
  const char* const op = "mimo_project_backward";
  check_call(op, threads);
  const door::Array vd = view(op, "d", d), vx = view(op, "x", x), vw = view(op, "weight", weight);
  const door::MimoProjectSizes z = door::check_project(op, vx, vw, view(op, "index", index));
  const core::MimoShape& s = z.shape;
  door::expect(op, "d", vd, z.type, "[A, N, S, G]", {s.A, s.N, s.S, z.G});
  const auto sized = [&](bool wanted, const std::vector<int64_t>& size) {
    return empty(z.type, wanted ? size : std::vector<int64_t>{0});
  };
  py::array dx = sized(needs_x, {s.A, s.B, s.S, z.C}), dweight = sized(needs_weight, {z.G, s.M * z.C});
  py::array dbias = sized(needs_bias, {z.G});
  door::by_type(z.type, [&]<class R>(R) {
    const core::MimoProjectBackward<R> call{s,
                                            z.C,
                                            z.G,
                                            vd.as<R>(),
                                            vx.as<R>(),
                                            vw.as<R>(),
                                            needs_x ? pointer<R>(dx) : nullptr,
                                            needs_weight ? pointer<R>(dweight) : nullptr,
                                            needs_bias ? pointer<R>(dbias) : nullptr};
    const py::gil_scoped_release release;
    const door::Scratch<char> scratch(core::mimo_project_scratch(call, threads));
    core::mimo_project_backward(call, scratch.data(), team(threads));
  });
  return py::make_tuple(dx, dweight, dbias);
}

}  // namespace

void bind_mimo(py::module_& m) {
  using py::arg;
  m.def("mimo_gather", &mimo_gather, arg("x").noconvert(), arg("index").noconvert(),
        arg("labels").noconvert() = py::none(), py::kw_only(), arg("threads") = 1);
  m.def("mimo_gather_backward", &mimo_gather_backward, arg("d").noconvert(), arg("index").noconvert(), arg("B"),
        py::kw_only(), arg("threads") = 1);
  m.def("mimo_combine", &mimo_combine, arg("parts").noconvert(), arg("index").noconvert(),
        arg("bias").noconvert() = py::none(), py::kw_only(), arg("threads") = 1);
  m.def("mimo_combine_backward", &mimo_combine_backward, arg("d").noconvert(), arg("index").noconvert(), arg("B"),
        py::kw_only(), arg("threads") = 1);
  m.def("mimo_project", &mimo_project, arg("x").noconvert(), arg("weight").noconvert(), arg("bias").noconvert(),
        arg("index").noconvert(), py::kw_only(), arg("threads") = 1);
  m.def("mimo_project_backward", &mimo_project_backward, arg("d").noconvert(), arg("x").noconvert(),
        arg("weight").noconvert(), arg("index").noconvert(), arg("needs_x") = true, arg("needs_weight") = true,
        arg("needs_bias") = true, py::kw_only(), arg("threads") = 1);
}

}  // namespace fastseq::python_door
