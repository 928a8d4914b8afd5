#include "core/vq_residual.h"

#include "door/vq_residual.h"
#include "torch/view.h"

namespace fastseq::torch_door {
namespace {

using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Six vq_residual(Tensor x, std::vector<Tensor> codebooks, Optional mask, Optional levels, bool sums, bool keep) {
  const char* const op = "vq_residual";
  check_isa(op);
  const door::Array vx = view(op, "x", x), vm = view(op, "mask", mask), vl = view(op, "levels", levels);
  const std::vector<door::Array> books = view(op, "codebooks", codebooks);
  const door::VqResidualSizes s = door::check_residual(op, vx, books, vm, vl);
  Tensor quantized = empty(x, {s.N, s.D}), distance = empty(x, {s.M, s.N});
  Tensor index = torch::stable::new_empty(x, std::vector<int64_t>{s.N, s.M}, ScalarType::Long);
  Tensor counts = empty(x, {sums ? s.K : 0});
  Tensor total = empty(x, sums ? std::vector<int64_t>{s.K, s.D} : std::vector<int64_t>{0});
  Tensor kept = empty(x, keep ? std::vector<int64_t>{s.K, s.D} : std::vector<int64_t>{0});
  const auto go = [&]<class R>(R) {
    if (keep) door::join<R>(books, pointer<R>(kept));
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
                                   pointer<int64_t>(index),
                                   pointer<R>(distance)};
    const core::Team t = team();
    const door::Scratch<char> scratch(core::vq_residual_scratch(call, t.most));
    core::vq_residual(call, scratch.data(), t);
  };
  door::by_type(s.type, go);
  return {quantized, index, distance, counts, total, kept};
}

Tensor vq_residual_backward(Optional dquantized, Optional dcommitment, Tensor x, Tensor codes,
                            std::vector<int64_t> sizes, Tensor index, int64_t gradient) {
  const char* const op = "vq_residual_backward";
  check_isa(op);
  const door::Array vx = view(op, "x", x), vi = view(op, "index", index), none;
  const door::Array vq = view(op, "dquantized", dquantized), vd = view(op, "dcommitment", dcommitment);
  const std::vector<door::Array> books = door::split(op, view(op, "codes", codes), sizes);
  const door::VqResidualSizes s = door::check_residual(op, vx, books, none, none);
  door::check_residual_backward(op, s, books, vq, vd, vi, gradient);
  Tensor dx = empty(x, {s.N, s.D});
  const auto go = [&]<class R>(R) {
    std::vector<const R*> book;
    for (const door::Array& b : books) book.push_back(b.as<R>());
    const core::VqResidualRows<R> call{s.N,           s.D,           s.M,         vq.as<R>(),
                                       vd.as<R>(),    vx.as<R>(),    book.data(), vi.as<int64_t>(),
                                       gradient == 1, pointer<R>(dx)};
    const core::Team t = team();
    const door::Scratch<char> scratch(core::vq_residual_rows_scratch(call, t.most));
    core::vq_residual_rows(call, scratch.data(), t);
  };
  door::by_type(s.type, go);
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTSEQ_OPERATORS, CPU, m) {
  m.impl("vq_residual", TORCH_BOX(&vq_residual));
  m.impl("vq_residual_backward", TORCH_BOX(&vq_residual_backward));
}

}  // namespace fastseq::torch_door
