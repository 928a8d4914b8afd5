#include "door/mimo.h"

#include <tuple>
#include <vector>

#include "torch/view.h"

namespace fastseq::torch_door {
namespace {

using Pair = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

// A plain copy: of any type.
Pair mimo_gather(Tensor x, Tensor index, Optional labels) {
  const char* const op = "mimo_gather";
  const door::Array vx = view(op, "x", x), vi = view(op, "index", index), vl = view(op, "labels", labels);
  const core::MimoShape s = door::check_gather(vx, vi, vl);
  const int64_t C = vx.size[3], L = vl.given() ? vl.size[1] : 0;
  Tensor out = empty(x, {s.A, s.N, s.S, s.M * C});
  core::mimo_gather({s, C * vx.bytes, vx.data, out.mutable_data_ptr()}, team());
  if (!labels) return {out, torch::stable::new_empty(x, std::vector<int64_t>{0}, ScalarType::Long)};
  Tensor taken = empty(*labels, {s.N, s.M, L});
  core::mimo_gather({{1, s.B, s.N, 1, s.M, s.index}, L * vl.bytes, vl.data, taken.mutable_data_ptr()}, team());
  return {out, taken};
}

template <class R>
using Sums = void (*)(const core::MimoSums<R>& call, void* scratch, const core::Team& team);

template <class R>
void run(Sums<R> sums, const door::MimoSizes& z, const door::Array& in, const door::Array& bias, const Tensor& out) {
  const door::Scratch<char> scratch(core::mimo_sums_scratch(z.shape));
  sums({z.shape, z.width, in.as<R>(), bias.as<R>(), pointer<R>(out)}, scratch.data(), team());
}

Tensor mimo_gather_backward(Tensor d, Tensor index, int64_t B) {
  const char* const op = "mimo_gather_backward";
  check_isa(op);
  const door::Array vd = view(op, "d", d);
  const door::MimoSizes z = door::check_adjoint(op, vd, view(op, "index", index), B, true);
  Tensor out = empty(d, {z.shape.A, B, z.shape.S, z.width});
  door::by_type(z.type, [&]<class R>(R) { run<R>(core::mimo_gather_backward<R>, z, vd, door::Array{}, out); });
  return out;
}

Tensor mimo_combine(Tensor parts, Tensor index, Optional bias) {
  const char* const op = "mimo_combine";
  check_isa(op);
  const door::Array vp = view(op, "parts", parts), vb = view(op, "bias", bias);
  const door::MimoSizes z = door::check_combine(vp, view(op, "index", index), vb);
  Tensor out = empty(parts, {z.shape.A, z.shape.N, z.shape.S, z.width});
  door::by_type(z.type, [&]<class R>(R) { run<R>(core::mimo_combine<R>, z, vp, vb, out); });
  return out;
}

Tensor mimo_combine_backward(Tensor d, Tensor index, int64_t B) {
  const char* const op = "mimo_combine_backward";
  check_isa(op);
  const door::Array vd = view(op, "d", d);
  const door::MimoSizes z = door::check_adjoint(op, vd, view(op, "index", index), B, false);
  Tensor out = empty(d, {z.shape.A, B, z.shape.S, z.shape.M * z.width});
  door::by_type(z.type, [&]<class R>(R) { run<R>(core::mimo_combine_backward<R>, z, vd, door::Array{}, out); });
  return out;
}

Tensor mimo_project(Tensor x, Tensor weight, Optional bias, Tensor index) {
  const char* const op = "mimo_project";
  check_isa(op);
  const door::Array vx = view(op, "x", x), vw = view(op, "weight", weight), vb = view(op, "bias", bias);
  const door::MimoProjectSizes z = door::check_project(op, vx, vw, view(op, "index", index));
  if (vb.given()) door::expect(op, "bias", vb, z.type, "[G]", {z.G});
  Tensor out = empty(x, {z.shape.A, z.shape.N, z.shape.S, z.G});
  door::by_type(z.type, [&]<class R>(R) {
    const core::MimoProject<R> call{z.shape, z.C, z.G, vx.as<R>(), vw.as<R>(), vb.as<R>(), pointer<R>(out)};
    const core::Team t = team();
    const door::Scratch<char> scratch(core::mimo_project_scratch(call, t.most));
    core::mimo_project(call, scratch.data(), t);
  });
  return out;
}

Three mimo_project_backward(Tensor d, Tensor x, Tensor weight, Tensor index, bool needs_x, bool needs_weight,
                            bool needs_bias) {
  const char* const op = "mimo_project_backward";
  check_isa(op);
  const door::Array vd = view(op, "d", d), vx = view(op, "x", x), vw = view(op, "weight", weight);
  const door::MimoProjectSizes z = door::check_project(op, vx, vw, view(op, "index", index));
  const core::MimoShape& s = z.shape;
  door::expect(op, "d", vd, z.type, "[A, N, S, G]", {s.A, s.N, s.S, z.G});
  const auto sized = [&](bool wanted, std::vector<int64_t> size) {
    return empty(x, wanted ? size : std::vector<int64_t>{0});
  };
  Tensor dx = sized(needs_x, {s.A, s.B, s.S, z.C}), dweight = sized(needs_weight, {z.G, s.M * z.C});
  Tensor dbias = sized(needs_bias, {z.G});
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
    const core::Team t = team();
    const door::Scratch<char> scratch(core::mimo_project_scratch(call, t.most));
    core::mimo_project_backward(call, scratch.data(), t);
  });
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTSEQ_OPERATORS, CPU, m) {
  m.impl("mimo_gather", TORCH_BOX(&mimo_gather));
  m.impl("mimo_gather_backward", TORCH_BOX(&mimo_gather_backward));
  m.impl("mimo_combine", TORCH_BOX(&mimo_combine));
  m.impl("mimo_combine_backward", TORCH_BOX(&mimo_combine_backward));
  m.impl("mimo_project", TORCH_BOX(&mimo_project));
  m.impl("mimo_project_backward", TORCH_BOX(&mimo_project_backward));
}

}  // namespace fastseq::torch_door
