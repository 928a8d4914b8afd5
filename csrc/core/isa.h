// The table of everything that exists once per instruction set, and the choice among the sets.
#pragma once

#include <cstdint>

#include "core/adt.h"
#include "core/ensemble_stats.h"
#include "core/gemm.h"
#include "core/lstm_step.h"
#include "core/matrix.h"
#include "core/mimo.h"
#include "core/mimo_nll.h"
#include "core/vq.h"
#include "core/vq_screen.h"

namespace fastseq::core {

// One row per vectorised function, for one element type R (float or double).
template <class R>
struct Table {
  int tile_rows;    // most rows of a register tile
  int panel_width;  // columns of a packed panel: two vectors
  // c[i][p][:] for i < rows, p < panels: init + sum over k of a[i][k * a_step] * b[p * b_panel + k * panel_width + :]
  void (*tile)(const TileArgs<R>& args);
  // see PackArgs
  void (*pack_rows)(const PackArgs<R>& args);
  void (*pack_columns)(const PackArgs<R>& args);
  void (*lstm_cell_forward)(const CellForward<R>& args);
  void (*lstm_cell_backward)(const CellBackward<R>& args);
  // noise of a panel of units from `unit` on, for each of `count` rows: [count][2][panel_width], i then f
  void (*lstm_noise)(const LstmNoise& noise, int64_t unit, int64_t step, const int64_t* rows, int64_t count, R* out);
  void (*vq_tile)(const VqTile<R>& tile);
  void (*vq_scores)(const VqScores<R>& tile);
  // a panel of rows, negated in place; a bit per lane that was not finite and became zeros
  uint32_t (*vq_negate)(R* panel, int64_t D);
  // of the codes of a panel
  void (*vq_start)(const R* panel, int64_t D, bool dot, R* start);
  // squared distance of row and code, which is copied where `copy` is given
  R (*vq_distance)(const R* x, const R* code, int64_t D, R* copy);
  // sum over the rows first + rows[i] of one code
  void (*vq_sum)(const VqSums<R>& args, int64_t first, const int64_t* rows, int64_t count, R* out);
  void (*vq_rows)(const VqRows<R>& args, int64_t begin, int64_t end);
  void (*add_rows)(const RowSum<R>& args);
  // rows begin .. end - 1 of N * M, without the loss
  void (*mimo_nll)(const MimoNll<R>& args, int64_t begin, int64_t end);
  void (*mimo_nll_backward)(const MimoNllBackward<R>& args, int64_t begin, int64_t end);
  // rows begin .. end - 1, without histogram and totals
  void (*ensemble_stats)(const EnsembleStats<R>& args, int64_t begin, int64_t end, const StatsScratch<R>& scratch);
  // blocks begin .. end - 1 of all rows
  void (*adt_noise)(const AdtNoise<R>& args, int64_t begin, int64_t end);
  void (*adt_sample)(const AdtSample<R>& args, int64_t begin, int64_t end);
  void (*adt_step)(const AdtStep<R>& args, int64_t begin, int64_t end);
};

struct Kernels {
  const char* name;
  Table<float> f32;
  Table<double> f64;
  void (*philox)(int64_t count, const uint32_t* counter, uint64_t key, uint32_t* words);
  const VqScreenTable* vq_screen;  // null where there are no products of bytes
  const MatrixTable* matrix;
};

// What a set with instructions for products of bytes does better than the set below it.
struct ByteKernels {
  const VqScreenTable* vq_screen;  // null: that of the set below
  const MatrixTable* matrix;
};

template <class R>
const Table<R>& table_of(const Kernels& kernels);
template <>
inline const Table<float>& table_of<float>(const Kernels& kernels) {
  return kernels.f32;
}
template <>
inline const Table<double>& table_of<double>(const Kernels& kernels) {
  return kernels.f64;
}

// What runs, or why nothing can: FASTSEQ_ISA names a set that is unknown, not built or not supported here.
struct Choice {
  const Kernels* kernels;  // never null
  const char* error;       // null when all is well
};
const Choice& choice();
inline const Kernels& kernels() { return *choice().kernels; }
constexpr int kMostSets = 7;
// The sets that are built and that this processor and operating system support, best last. Returns their number.
int supported(const Kernels** out);

}  // namespace fastseq::core
