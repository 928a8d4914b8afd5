#include "door/adt.h"

#include "torch/view.h"

namespace fastseq::torch_door {
namespace {

core::AdtSource view_source(const char* op, const Tensor& seed, int64_t step) {
  check_isa(op);
  const door::Array s = view(op, "seed", seed);
  if (s.type != door::Type::i64 || seed.numel() != 1) door::fail(op, "seed must be one int64");
  return {static_cast<uint64_t>(*s.as<int64_t>()), step};
}

door::AdtArrays view_adt(const char* op, const Tensor& x, const Tensor& mu, const Tensor& rho, const Tensor& eps) {
  return {view(op, "x", x), view(op, "mu", mu), view(op, "rho", rho), view(op, "eps", eps)};
}

Tensor adt_noise(Tensor like, Tensor seed, int64_t samples, int64_t step) {
  const core::AdtSource source = view_source("adt_noise", seed, step);
  const door::AdtSizes z = door::check_adt_noise(view("adt_noise", "like", like), samples, step);
  Tensor out = empty(like, {z.S, z.B, z.N});
  const auto run = [&]<class R>(R) {
    core::adt_noise(core::AdtNoise<R>{z.S, z.B, z.N, source, pointer<R>(out)}, team());
  };
  door::by_type(z.type, run);
  return out;
}

Tensor adt_sample(Tensor x, Tensor mu, Tensor rho, Tensor seed, Tensor eps, int64_t samples, int64_t step, double low,
                  double high) {
  const char* const op = "adt_sample";
  const core::AdtSource source = view_source(op, seed, step);
  const door::AdtArrays a = view_adt(op, x, mu, rho, eps);
  const door::AdtSizes z = door::check_adt(op, a, samples, step, low, high);
  Tensor out = empty(x, {z.S, z.B, z.N});
  const auto run = [&]<class R>(R) {
    core::adt_sample(door::adt_sample_of<R>(z, a, source, low, high, pointer<R>(out)), team());
  };
  door::by_type(z.type, run);
  return out;
}

Tensor adt_backward(Tensor g, Tensor x, Tensor mu, Tensor rho, Tensor seed, Tensor eps, Tensor weight, int64_t step,
                    double low, double high) {
  const char* const op = "adt_backward";
  const core::AdtSource source = view_source(op, seed, step);
  const door::AdtArrays a = view_adt(op, x, mu, rho, eps);
  const door::Array up = view(op, "g", g), w = view(op, "weight", weight);
  const door::AdtSizes z = door::check_adt_step(op, up, a, w, step, low, high);
  Tensor d = empty(x, {2, z.B, z.N});
  const auto run = [&]<class R>(R) {
    core::AdtStep<R> call = door::adt_step_of<R>(z, up, a, w, source, low, high);
    call.d = pointer<R>(d);
    core::adt_step(call, team());
  };
  door::by_type(z.type, run);
  return d;
}

std::tuple<Tensor, Tensor, Tensor> adt_ascend(Tensor g, Tensor x, Tensor mu, Tensor rho, Tensor seed, Tensor eps,
                                              Tensor weight, Optional totals, int64_t step, double rate, double low,
                                              double high) {
  const char* const op = "adt_ascend";
  const core::AdtSource source = view_source(op, seed, step);
  const door::AdtArrays a = view_adt(op, x, mu, rho, eps);
  const door::Array up = view(op, "g", g), w = view(op, "weight", weight), t = view(op, "totals", totals);
  const door::AdtSizes z = door::check_adt_step(op, up, a, w, step, low, high);
  door::check_totals(op, t, z);
  Tensor mu_up = empty(x, {z.B, z.N}), rho_up = empty(x, {z.B, z.N});
  Tensor d = totals ? empty(x, {2, z.B, z.N}) : empty(x, {0});
  const auto run = [&]<class R>(R) {
    core::AdtStep<R> call = door::adt_step_of<R>(z, up, a, w, source, low, high);
    call.rate = R(rate);
    call.totals = t.as<R>();
    call.d = t.given() ? pointer<R>(d) : nullptr;
    call.mu_up = pointer<R>(mu_up);
    call.rho_up = pointer<R>(rho_up);
    core::adt_step(call, team());
  };
  door::by_type(z.type, run);
  return {mu_up, rho_up, d};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) {
  m.impl("adt_noise", TORCH_BOX(&adt_noise));
  m.impl("adt_sample", TORCH_BOX(&adt_sample));
  m.impl("adt_backward", TORCH_BOX(&adt_backward));
  m.impl("adt_ascend", TORCH_BOX(&adt_ascend));
}

}  // namespace fastseq::torch_door
