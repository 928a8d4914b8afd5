#include "core/adt.h"

#include "core/flush.h"
#include "core/gemm.h"
#include "core/isa.h"

namespace fastseq::core {
namespace {

constexpr double kWork = 60;  // of a number of a sample, counted in multiply-adds of a product

// Blocks of all rows are shared out, each with all its samples.
template <class Args, class R, void (*Table<R>::*Kernel)(const Args&, int64_t, int64_t)>
void body(const void* context, int rank, int size, Barrier&) {
  const auto& a = *static_cast<const Args*>(context);
  const FlushDenormals flush;
  const Range mine = share(a.B * ((a.N + kAdtBlock - 1) / kAdtBlock), rank, size);
  (table_of<R>(kernels()).*Kernel)(a, mine.begin, mine.end);
}

template <class Args>
int threads(const Args& a, const Team& team) {
  return team_size(kWork * a.S * a.B * a.N, team.most);
}

}  // namespace

template <class R>
void adt_noise(const AdtNoise<R>& a, const Team& team) noexcept {
  team.run(threads(a, team), body<AdtNoise<R>, R, &Table<R>::adt_noise>, &a);
}

template <class R>
void adt_sample(const AdtSample<R>& a, const Team& team) noexcept {
  team.run(threads(a, team), body<AdtSample<R>, R, &Table<R>::adt_sample>, &a);
}

template <class R>
void adt_step(const AdtStep<R>& a, const Team& team) noexcept {
  team.run(threads(a, team), body<AdtStep<R>, R, &Table<R>::adt_step>, &a);
}

template void adt_noise(const AdtNoise<float>&, const Team&) noexcept;
template void adt_noise(const AdtNoise<double>&, const Team&) noexcept;
template void adt_sample(const AdtSample<float>&, const Team&) noexcept;
template void adt_sample(const AdtSample<double>&, const Team&) noexcept;
template void adt_step(const AdtStep<float>&, const Team&) noexcept;
template void adt_step(const AdtStep<double>&, const Team&) noexcept;

}  // namespace fastseq::core
