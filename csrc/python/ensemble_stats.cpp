#include "door/ensemble_stats.h"

#include "python/array.h"

namespace fastseq::python_door {
namespace {

py::tuple ensemble_stats(const py::array& logits, const Optional& labels, int64_t bins, int64_t ignore,
                         bool probability, int threads) {
  const char* const op = "ensemble_stats";
  check_call(op, threads);
  const door::Array x = view(op, "logits", logits), y = view(op, "labels", labels);
  const door::StatsSizes s = door::check_stats(x, y, bins, ignore);
  py::array mean = empty(s.type, probability ? std::vector<int64_t>{s.B, s.K} : std::vector<int64_t>{0});
  py::array_t<int64_t> prediction({s.B}), members({s.B, s.M});
  py::array confidence = empty(s.type, {s.B}), disagreement = empty(s.type, {s.B});
  py::array nll = empty(s.type, {s.B}), brier = empty(s.type, {s.B});
  py::array_t<double> histogram({int64_t(3), bins}), totals({5 + s.M});
  const auto run = [&]<class R>(R) {
    const core::EnsembleStats<R> call{s.B,
                                      s.M,
                                      s.K,
                                      bins,
                                      ignore,
                                      x.as<R>(),
                                      y.as<int64_t>(),
                                      probability ? pointer<R>(mean) : nullptr,
                                      prediction.mutable_data(),
                                      pointer<R>(confidence),
                                      members.mutable_data(),
                                      pointer<R>(disagreement),
                                      pointer<R>(nll),
                                      pointer<R>(brier),
                                      histogram.mutable_data(),
                                      totals.mutable_data()};
    const py::gil_scoped_release release;
    const door::Scratch<R> scratch(core::ensemble_stats_scratch(call, threads));
    core::ensemble_stats(call, scratch.data(), team(threads));
  };
  door::by_type(s.type, run);
  return py::make_tuple(mean, prediction, confidence, members, disagreement, nll, brier, histogram, totals);
}

}  // namespace

void bind_ensemble_stats(py::module_& m) {
  using py::arg;
  m.def("ensemble_stats", &ensemble_stats, arg("logits").noconvert(), arg("labels").noconvert() = py::none(),
        arg("bins") = 15, arg("ignore") = -100, arg("probability") = true, py::kw_only(), arg("threads") = 1);
}

}  // namespace fastseq::python_door
