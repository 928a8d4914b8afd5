#include "door/adt.h"

#include <limits>

#include "python/array.h"

namespace fastseq::python_door {
namespace {

core::AdtSource source_of(const char* op, int64_t seed, int64_t step, int threads) {
  check_call(op, threads);
  return {static_cast<uint64_t>(seed), step};
}

door::AdtArrays view_adt(const char* op, const py::array& x, const py::array& mu, const py::array& rho,
                         const py::array& eps) {
  return {view(op, "x", x), view(op, "mu", mu), view(op, "rho", rho), view(op, "eps", eps)};
}

py::array adt_noise(const py::array& like, int64_t seed, int64_t samples, int64_t step, int threads) {
  const core::AdtSource source = source_of("adt_noise", seed, step, threads);
  const door::AdtSizes z = door::check_adt_noise(view("adt_noise", "like", like), samples, step);
  py::array out = empty(z.type, {z.S, z.B, z.N});
  const auto run = [&]<class R>(R) {
    const core::AdtNoise<R> call{z.S, z.B, z.N, source, pointer<R>(out)};
    const py::gil_scoped_release release;
    core::adt_noise(call, team(threads));
  };
  door::by_type(z.type, run);
  return out;
}

py::array adt_sample(const py::array& x, const py::array& mu, const py::array& rho, int64_t seed, const py::array& eps,
                     int64_t samples, int64_t step, double low, double high, int threads) {
  const char* const op = "adt_sample";
  const core::AdtSource source = source_of(op, seed, step, threads);
  const door::AdtArrays a = view_adt(op, x, mu, rho, eps);
  const door::AdtSizes z = door::check_adt(op, a, samples, step, low, high);
  py::array out = empty(z.type, {z.S, z.B, z.N});
  const auto run = [&]<class R>(R) {
    const core::AdtSample<R> call = door::adt_sample_of<R>(z, a, source, low, high, pointer<R>(out));
    const py::gil_scoped_release release;
    core::adt_sample(call, team(threads));
  };
  door::by_type(z.type, run);
  return out;
}

py::array adt_backward(const py::array& g, const py::array& x, const py::array& mu, const py::array& rho, int64_t seed,
                       const py::array& eps, const py::array& weight, int64_t step, double low, double high,
                       int threads) {
  const char* const op = "adt_backward";
  const core::AdtSource source = source_of(op, seed, step, threads);
  const door::AdtArrays a = view_adt(op, x, mu, rho, eps);
  const door::Array up = view(op, "g", g), w = view(op, "weight", weight);
  const door::AdtSizes z = door::check_adt_step(op, up, a, w, step, low, high);
  py::array d = empty(z.type, {2, z.B, z.N});
  const auto run = [&]<class R>(R) {
    core::AdtStep<R> call = door::adt_step_of<R>(z, up, a, w, source, low, high);
    call.d = pointer<R>(d);
    const py::gil_scoped_release release;
    core::adt_step(call, team(threads));
  };
  door::by_type(z.type, run);
  return d;
}

py::tuple adt_ascend(const py::array& g, const py::array& x, const py::array& mu, const py::array& rho, int64_t seed,
                     const py::array& eps, const py::array& weight, const Optional& totals, int64_t step, double rate,
                     double low, double high, int threads) {
  const char* const op = "adt_ascend";
  const core::AdtSource source = source_of(op, seed, step, threads);
  const door::AdtArrays a = view_adt(op, x, mu, rho, eps);
  const door::Array up = view(op, "g", g), w = view(op, "weight", weight), t = view(op, "totals", totals);
  const door::AdtSizes z = door::check_adt_step(op, up, a, w, step, low, high);
  door::check_totals(op, t, z);
  py::array mu_up = empty(z.type, {z.B, z.N}), rho_up = empty(z.type, {z.B, z.N});
  py::array d = t.given() ? empty(z.type, {2, z.B, z.N}) : empty(z.type, {0});
  const auto run = [&]<class R>(R) {
    core::AdtStep<R> call = door::adt_step_of<R>(z, up, a, w, source, low, high);
    call.rate = R(rate);
    call.totals = t.as<R>();
    call.d = t.given() ? pointer<R>(d) : nullptr;
    call.mu_up = pointer<R>(mu_up);
    call.rho_up = pointer<R>(rho_up);
    const py::gil_scoped_release release;
    core::adt_step(call, team(threads));
  };
  door::by_type(z.type, run);
  return py::make_tuple(mu_up, rho_up, d);
}

}  // namespace

void bind_adt(py::module_& m) {
  using py::arg;
  constexpr double kNone = std::numeric_limits<double>::infinity();
  const auto array = [](const char* name) { return arg(name).noconvert(); };
  m.def("adt_noise", &adt_noise, array("like"), arg("seed"), arg("samples"), arg("step") = 0, py::kw_only(),
        arg("threads") = 1);
  m.def("adt_sample", &adt_sample, array("x"), array("mu"), array("rho"), arg("seed"), array("eps"), arg("samples"),
        arg("step") = 0, arg("low") = -kNone, arg("high") = kNone, py::kw_only(), arg("threads") = 1);
  m.def("adt_backward", &adt_backward, array("g"), array("x"), array("mu"), array("rho"), arg("seed"), array("eps"),
        array("weight"), arg("step") = 0, arg("low") = -kNone, arg("high") = kNone, py::kw_only(), arg("threads") = 1);
  m.def("adt_ascend", &adt_ascend, array("g"), array("x"), array("mu"), array("rho"), arg("seed"), array("eps"),
        array("weight"), array("totals"), arg("step"), arg("rate"), arg("low") = -kNone, arg("high") = kNone,
        py::kw_only(), arg("threads") = 1);
}

}  // namespace fastseq::python_door
