// Everything that is compiled once per instruction set, and the one table that leaves the file.
// FASTSEQ_ISA is the namespace, FASTSEQ_ISA_NAME its text; simd_<set>.h came before.
#include <math.h>
#include <stdint.h>

#include "core/isa.h"
#include "core/simd.inl.h"
// (order matters: each uses the ones above)
#include "core/activation.inl.h"
#include "core/gemm.inl.h"
#include "core/noise.inl.h"
#include "core/lstm.inl.h"
#include "core/vq.inl.h"
#include "core/vq_screen.inl.h"
#include "core/matrix.inl.h"
#include "core/mimo.inl.h"
#include "core/softmax.inl.h"
#include "core/mimo_nll.inl.h"
#include "core/ensemble_stats.inl.h"
#include "core/adt.inl.h"

namespace fastseq::core::FASTSEQ_ISA {
static_assert(kTileRows <= kMostTileRows && kPanel<float> <= kMostPanelWidth);

extern const Kernels table;
constinit const Kernels table = {
    FASTSEQ_ISA_NAME,
    {kTileRows,
     kPanel<float>,
     tile<float>,
     pack_rows<float>,
     pack_columns<float>,
     lstm_cell_forward<float>,
     lstm_cell_backward<float>,
     lstm_noise<float>,
     vq_tile<float>,
     vq_scores<float>,
     vq_negate<float>,
     vq_start<float>,
     vq_distance<float>,
     vq_sum<float>,
     vq_rows<float>,
     add_rows<float>,
     mimo_nll_rows<float>,
     mimo_nll_gradient<float>,
     ensemble_stats_rows<float>,
     adt_noise<float>,
     adt_sample<float>,
     adt_step<float>},
    {kTileRows,
     kPanel<double>,
     tile<double>,
     pack_rows<double>,
     pack_columns<double>,
     lstm_cell_forward<double>,
     lstm_cell_backward<double>,
     lstm_noise<double>,
     vq_tile<double>,
     vq_scores<double>,
     vq_negate<double>,
     vq_start<double>,
     vq_distance<double>,
     vq_sum<double>,
     vq_rows<double>,
     add_rows<double>,
     mimo_nll_rows<double>,
     mimo_nll_gradient<double>,
     ensemble_stats_rows<double>,
     adt_noise<double>,
     adt_sample<double>,
     adt_step<double>},
    philox,
#if defined(FASTSEQ_HAS_BYTES)
    &vq_screen_table,
#else
    nullptr,
#endif
    &matrix_table,
};

}  // namespace fastseq::core::FASTSEQ_ISA
