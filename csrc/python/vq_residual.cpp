#include "core/vq_residual.h"

#include "door/vq_residual.h"
#include "python/array.h"

namespace fastseq::python_door {
namespace {

py::tuple vq_residual(const py::array& x, const std::vector<py::array>& codebooks, const Optional& mask,
                      const Optional& levels, bool sums, int threads) {
  const char* const op = "vq_residual";
  check_call(op, threads);
  const door::Array vx = view(op, "x", x), vm = view(op, "mask", mask), vl = view(op, "levels", levels);
  std::vector<door::Array> books;
  for (const py::array& codebook : codebooks) books.push_back(view(op, "codebooks", codebook));
  const door::VqResidualSizes s = door::check_residual(op, vx, books, vm, vl);
  py::array quantized = empty(s.type, {s.N, s.D}), distance = empty(s.type, {s.M, s.N});
  py::array_t<int64_t> index({s.N, s.M});
  py::array counts = empty(s.type, {sums ? s.K : 0});
  py::array total = empty(s.type, sums ? std::vector<int64_t>{s.K, s.D} : std::vector<int64_t>{0});
  const auto go = [&]<class R>(R) {
    const auto level =
        door::residual_levels<R>(s, books, sums ? pointer<R>(counts) : nullptr, sums ? pointer<R>(total) : nullptr);
    const core::VqResidual<R> call{s.N,
                                   s.D,
                                   s.M,
                                   vx.as<R>(),
                                   level.data(),
                                   vm.as<bool>(),
                                   vl.as<int64_t>(),
                                   pointer<R>(quantized),
                                   index.mutable_data(),
                                   pointer<R>(distance)};
    const py::gil_scoped_release release;
    const door::Scratch<char> scratch(core::vq_residual_scratch(call, threads));
    core::vq_residual(call, scratch.data(), team(threads));
  };
  door::by_type(s.type, go);
  return py::make_tuple(quantized, index, distance, counts, total);
}

}  // namespace

void bind_vq_residual(py::module_& m) {
  using py::arg;
  m.def("vq_residual", &vq_residual, arg("x").noconvert(), arg("codebooks"), arg("mask").noconvert() = py::none(),
        arg("levels").noconvert() = py::none(), arg("sums") = false, py::kw_only(), arg("threads") = 1);
}

}  // namespace fastseq::python_door
