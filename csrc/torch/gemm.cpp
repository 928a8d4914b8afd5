#include "core/gemm.h"

#include "door/gemm.h"
#include "torch/view.h"

namespace fastseq::torch_door {
namespace {

template <class R>
void run(const core::GemmArgs<R>& args) {
  const core::Team t = team();
  const door::Scratch<R> scratch(core::gemm_scratch(args, t.most));
  core::gemm(args, scratch.data(), t);
}

Tensor gemm(Tensor a, Tensor b, Optional bias, bool transpose_a, bool transpose_b) {
  check_isa("gemm");
  const door::Array va = view("gemm", "a", a), vb = view("gemm", "b", b), vbias = view("gemm", "bias", bias);
  const door::GemmSizes s = door::check_gemm(va, vb, vbias, transpose_a, transpose_b);
  Tensor out = empty(a, {s.M, s.N});
  if (s.type == door::Type::f32) {
    run(door::gemm_args(s, va, vb, vbias, transpose_a, transpose_b, pointer<float>(out)));
  } else {
    run(door::gemm_args(s, va, vb, vbias, transpose_a, transpose_b, pointer<double>(out)));
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTSEQ_OPERATORS, CPU, m) { m.impl("gemm", TORCH_BOX(&gemm)); }

}  // namespace fastseq::torch_door
