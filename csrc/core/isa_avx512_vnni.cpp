// What AVX512_VNNI does better than the rest of AVX-512: products of bytes.
#if !defined(__AVX512VNNI__) || !defined(__AVX512BW__) || !defined(__AVX512DQ__) || !defined(__AVX512VL__)
#error "isa_avx512_vnni.cpp needs -mavx512vnni and the flags of isa_avx512.cpp"
#endif
#define FASTSEQ_ISA avx512_vnni
#include <math.h>
#include <stdint.h>

#include "core/isa.h"
#include "core/simd_avx512.h"
#include "core/simd.inl.h"
#include "core/gemm.inl.h"
#include "core/vq.inl.h"
#include "core/vq_screen.inl.h"
#include "core/matrix.inl.h"

namespace fastseq::core::avx512_vnni {
extern const ByteKernels table;
constinit const ByteKernels table = {&vq_screen_table, &matrix_table};
}  // namespace fastseq::core::avx512_vnni
