#include "door/mimo_nll.h"

#include "torch/view.h"

namespace fastseq::torch_door {
namespace {

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Four mimo_nll(Tensor logits, Tensor labels, double smoothing, int64_t ignore) {
  const char* const op = "mimo_nll";
  check_isa(op);
  const door::Array x = view(op, "logits", logits), y = view(op, "labels", labels);
  const door::NllSizes s = door::check_nll(op, x, y, smoothing, ignore);
  Tensor loss = empty(logits, {}), nll = empty(logits, {s.N, s.M});
  Tensor top = empty(logits, {s.N, s.M}), logsum = empty(logits, {s.N, s.M});
  const auto run = [&]<class R>(R) {
    core::mimo_nll(core::MimoNll<R>{s.N, s.M, s.K, x.as<R>(), y.as<int64_t>(), smoothing, ignore, pointer<R>(loss),
                                    pointer<R>(nll), pointer<R>(top), pointer<R>(logsum)},
                   team());
  };
  door::by_type(s.type, run);
  return {loss, nll, top, logsum};
}

Tensor mimo_nll_backward(Optional dloss, Optional dnll, Tensor logits, Tensor labels, Tensor top, Tensor logsum,
                         double smoothing, int64_t ignore) {
  const char* const op = "mimo_nll_backward";
  check_isa(op);
  const door::Array x = view(op, "logits", logits), y = view(op, "labels", labels);
  const door::Array t = view(op, "top", top), l = view(op, "logsum", logsum);
  const door::Array dl = view(op, "dloss", dloss), dn = view(op, "dnll", dnll);
  const door::NllSizes s = door::check_nll_backward(dl, dn, x, y, t, l, smoothing, ignore);
  Tensor out = empty(logits, {s.N, s.M, s.K});
  const auto run = [&]<class R>(R) {
    const door::Scratch<R> weight(s.M);
    core::mimo_nll_backward(
        core::MimoNllBackward<R>{s.N, s.M, s.K, dl.as<R>(), dn.as<R>(), x.as<R>(), y.as<int64_t>(), t.as<R>(),
                                 l.as<R>(), smoothing, ignore, weight.data(), pointer<R>(out)},
        team());
  };
  door::by_type(s.type, run);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTSEQ_OPERATORS, CPU, m) {
  m.impl("mimo_nll", TORCH_BOX(&mimo_nll));
  m.impl("mimo_nll_backward", TORCH_BOX(&mimo_nll_backward));
}

}  // namespace fastseq::torch_door
