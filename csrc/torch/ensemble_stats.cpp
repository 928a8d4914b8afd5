#include "door/ensemble_stats.h"

#include "torch/view.h"

namespace fastseq::torch_door {
namespace {

using Nine = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Nine ensemble_stats(Tensor logits, Optional labels, int64_t bins, int64_t ignore, bool probability) {
  const char* const op = "ensemble_stats";
  check_isa(op);
  const door::Array x = view(op, "logits", logits), y = view(op, "labels", labels);
  const door::StatsSizes s = door::check_stats(x, y, bins, ignore);
  const auto of = [&](std::vector<int64_t> size, ScalarType type) {
    return torch::stable::new_empty(logits, size, type);
  };
  Tensor mean = empty(logits, probability ? std::vector<int64_t>{s.B, s.K} : std::vector<int64_t>{0});
  Tensor prediction = of({s.B}, ScalarType::Long), members = of({s.B, s.M}, ScalarType::Long);
  Tensor confidence = empty(logits, {s.B}), disagreement = empty(logits, {s.B});
  Tensor nll = empty(logits, {s.B}), brier = empty(logits, {s.B});
  Tensor histogram = of({3, bins}, ScalarType::Double), totals = of({5 + s.M}, ScalarType::Double);
  const auto run = [&]<class R>(R) {
    const core::EnsembleStats<R> call{s.B,
                                      s.M,
                                      s.K,
                                      bins,
                                      ignore,
                                      x.as<R>(),
                                      y.as<int64_t>(),
                                      probability ? pointer<R>(mean) : nullptr,
                                      pointer<int64_t>(prediction),
                                      pointer<R>(confidence),
                                      pointer<int64_t>(members),
                                      pointer<R>(disagreement),
                                      pointer<R>(nll),
                                      pointer<R>(brier),
                                      pointer<double>(histogram),
                                      pointer<double>(totals)};
    const core::Team t = team();
    const door::Scratch<R> scratch(core::ensemble_stats_scratch(call, t.most));
    core::ensemble_stats(call, scratch.data(), t);
  };
  door::by_type(s.type, run);
  return {mean, prediction, confidence, members, disagreement, nll, brier, histogram, totals};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTSEQ_OPERATORS, CPU, m) { m.impl("ensemble_stats", TORCH_BOX(&ensemble_stats)); }

}  // namespace fastseq::torch_door
