// What AVX-VNNI does better than the rest of AVX2: products of bytes.
#if !defined(__AVXVNNI__) || !defined(__AVX2__) || !defined(__FMA__)
#error "isa_avx2_vnni.cpp needs -mavxvnni and the flags of isa_avx2.cpp"
#endif
#define FASTSEQ_ISA avx2_vnni
#include <math.h>
#include <stdint.h>

#include "core/isa.h"
#include "core/simd_avx2.h"
#include "core/simd.inl.h"
#include "core/matrix.inl.h"

namespace fastseq::core::avx2_vnni {
extern const ByteKernels table;
constinit const ByteKernels table = {nullptr, &matrix_table};
}  // namespace fastseq::core::avx2_vnni
