#include "core/gemm.h"

#include "door/gemm.h"
#include "python/array.h"

namespace fastseq::python_door {
namespace {

template <class R>
void run(const core::GemmArgs<R>& args, int threads) {
  const py::gil_scoped_release release;
  const door::Scratch<R> scratch(core::gemm_scratch(args, threads));
  core::gemm(args, scratch.data(), team(threads));
}

py::array gemm(const py::array& a, const py::array& b, const Optional& bias, bool transpose_a, bool transpose_b,
               int threads) {
  check_call("gemm", threads);
  const door::Array va = view("gemm", "a", a), vb = view("gemm", "b", b), vbias = view("gemm", "bias", bias);
  const door::GemmSizes s = door::check_gemm(va, vb, vbias, transpose_a, transpose_b);
  py::array out = empty(s.type, {s.M, s.N});
  if (s.type == door::Type::f32) {
    run(door::gemm_args(s, va, vb, vbias, transpose_a, transpose_b, pointer<float>(out)), threads);
  } else {
    run(door::gemm_args(s, va, vb, vbias, transpose_a, transpose_b, pointer<double>(out)), threads);
  }
  return out;
}

}  // namespace

void bind_gemm(py::module_& m) {
  using py::arg;
  m.def("gemm", &gemm, arg("a").noconvert(), arg("b").noconvert(), arg("bias").noconvert() = py::none(),
        arg("transpose_a") = false, arg("transpose_b") = false, py::kw_only(), arg("threads") = 1);
}

}  // namespace fastseq::python_door
