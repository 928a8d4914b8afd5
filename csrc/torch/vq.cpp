#include "door/vq.h"

#include "torch/view.h"

namespace fastseq::torch_door {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Pair = std::tuple<Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class R>
void run(const core::VqNearest<R>& call) {
  const core::Team t = team();
  const door::Scratch<char> scratch(core::vq_nearest_scratch(call, t.most));
  core::vq_nearest(call, scratch.data(), t);
}

template <class R>
void run(const core::VqSums<R>& call) {
  const core::Team t = team();
  const door::Scratch<char> scratch(core::vq_sums_scratch(call, t.most));
  core::vq_sums(call, scratch.data(), t);
}

Tensor integers(const Tensor& like, const std::vector<int64_t>& size, int64_t bits) {
  return torch::stable::new_empty(like, size,
                                  bits == 16   ? ScalarType::Short
                                  : bits == 32 ? ScalarType::Int
                                               : ScalarType::Long);
}

Three vq_nearest(Tensor x, Tensor codebook, Optional mask, bool dot, int64_t best, int64_t bits, bool distance,
                 bool score, int64_t screen) {
  const char* const op = "vq_nearest";
  check_isa(op);
  const door::Array vx = view(op, "x", x), vc = view(op, "codebook", codebook), vm = view(op, "mask", mask);
  const door::VqSizes s = door::check_vq(op, vx, vc, vm);
  door::check_best(op, s, best, bits, screen);
  Tensor index = integers(x, {s.G, s.N, best}, bits);
  Tensor found = empty(x, distance ? std::vector<int64_t>{s.G, s.N, best} : std::vector<int64_t>{0});
  Tensor scores = empty(x, score ? std::vector<int64_t>{s.G, s.N, best} : std::vector<int64_t>{0});
  door::by_type(s.type, [&]<class R>(R) {
    run<R>(core::VqNearest<R>{door::vq_shape<R>(s, vx, vc, vm, dot), best, static_cast<int>(bits),
                              index.mutable_data_ptr(), distance ? pointer<R>(found) : nullptr,
                              score ? pointer<R>(scores) : nullptr, nullptr, static_cast<core::Screen>(screen)});
  });
  return {index, found, scores};
}

Five vq_quantize(Tensor x, Tensor codebook, Optional mask, bool dot, bool sums) {
  const char* const op = "vq_quantize";
  check_isa(op);
  const door::Array vx = view(op, "x", x), vc = view(op, "codebook", codebook), vm = view(op, "mask", mask);
  const door::VqSizes s = door::check_vq(op, vx, vc, vm);
  Tensor codes = empty(x, {s.G, s.N, s.D}), index = integers(x, {s.G, s.N}, 64), distance = empty(x, {s.G, s.N});
  Tensor counts = empty(x, sums ? std::vector<int64_t>{s.G, s.K} : std::vector<int64_t>{0});
  Tensor total = empty(x, sums ? std::vector<int64_t>{s.G, s.K, s.D} : std::vector<int64_t>{0});
  door::by_type(s.type, [&]<class R>(R) {
    run<R>(core::VqNearest<R>{door::vq_shape<R>(s, vx, vc, vm, dot), 1, 64, index.mutable_data_ptr(),
                              pointer<R>(distance), nullptr, pointer<R>(codes)});
    if (!sums) return;
    run<R>(core::VqSums<R>{s.G, s.N, s.K, s.D, vx.as<R>(), nullptr, nullptr, nullptr, R(1), pointer<int64_t>(index),
                           pointer<R>(counts), pointer<R>(total)});
  });
  return {codes, index, distance, counts, total};
}

Pair vq_sums(Tensor x, Tensor index, int64_t K) {
  const char* const op = "vq_sums";
  check_isa(op);
  const door::Array vx = view(op, "x", x), vi = view(op, "index", index);
  const door::VqSizes s = door::check_index(op, "x", vx, vi, K);
  Tensor counts = empty(x, {s.G, K}), sums = empty(x, {s.G, K, s.D});
  door::by_type(s.type, [&]<class R>(R) {
    run<R>(core::VqSums<R>{s.G, s.N, K, s.D, vx.as<R>(), nullptr, nullptr, nullptr, R(1), vi.as<int64_t>(),
                           pointer<R>(counts), pointer<R>(sums)});
  });
  return {counts, sums};
}

Pair vq_backward(Optional dquantized, Optional dcommitment, Optional dcodebook_error, Tensor x, Tensor codes,
                 Tensor index, int64_t K, int64_t gradient, bool need_x, bool need_codebook) {
  const char* const op = "vq_backward";
  check_isa(op);
  const door::Array vx = view(op, "x", x), vc = view(op, "codes", codes), vi = view(op, "index", index);
  const door::Array vq = view(op, "dquantized", dquantized), vd = view(op, "dcommitment", dcommitment);
  const door::Array ve = view(op, "dcodebook_error", dcodebook_error);
  const door::VqSizes s = door::check_index(op, "x", vx, vi, K);
  door::expect(op, "codes", vc, s.type, "[G, N, D]", {s.G, s.N, s.D});
  if (vq.given()) door::expect(op, "dquantized", vq, s.type, "[G, N, D]", {s.G, s.N, s.D});
  if (vd.given()) door::expect(op, "dcommitment", vd, s.type, "[G, N]", {s.G, s.N});
  if (ve.given()) door::expect(op, "dcodebook_error", ve, s.type, "[G, N]", {s.G, s.N});
  if (gradient < 0 || gradient > 2) door::fail(op, "gradient must be 0, 1 or 2, got ", gradient);
  const bool to_codes = gradient == 2;
  Tensor dx = empty(x, need_x ? std::vector<int64_t>{s.G, s.N, s.D} : std::vector<int64_t>{0});
  Tensor dcodebook = empty(x, need_codebook ? std::vector<int64_t>{s.G, K, s.D} : std::vector<int64_t>{0});
  door::by_type(s.type, [&]<class R>(R) {
    if (need_x) {
      core::vq_rows(core::VqRows<R>{s.G * s.N, s.D, to_codes ? nullptr : vq.as<R>(), vd.as<R>(), vx.as<R>(), vc.as<R>(),
                                    vi.as<int64_t>(), gradient == 1, pointer<R>(dx)},
                    team());
    }
    if (need_codebook) {
      run<R>(core::VqSums<R>{s.G, s.N, K, s.D, ve.given() ? vc.as<R>() : nullptr, vx.as<R>(),
                             to_codes ? vq.as<R>() : nullptr, ve.as<R>(), R(2), vi.as<int64_t>(), nullptr,
                             pointer<R>(dcodebook)});
    }
  });
  return {dx, dcodebook};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTSEQ_OPERATORS, CPU, m) {
  m.impl("vq_nearest", TORCH_BOX(&vq_nearest));
  m.impl("vq_quantize", TORCH_BOX(&vq_quantize));
  m.impl("vq_sums", TORCH_BOX(&vq_sums));
  m.impl("vq_backward", TORCH_BOX(&vq_backward));
}

}  // namespace fastseq::torch_door
