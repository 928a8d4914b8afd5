// What AMX does better than the rest of AVX-512 with VNNI: products of many rows of bytes.
#if !defined(__AMX_TILE__) || !defined(__AMX_INT8__) || !defined(__AVX512VNNI__) || !defined(__AVX512BW__)
#error "isa_avx512_amx.cpp needs -mamx-tile -mamx-int8 and the flags of isa_avx512_vnni.cpp"
#endif
#define FASTSEQ_ISA avx512_amx
#include <math.h>
#include <stdint.h>

#include "core/isa.h"
#include "core/simd_avx512.h"
#include "core/simd.inl.h"
#include "core/matrix.inl.h"

namespace fastseq::core::avx512_amx {
extern const ByteKernels table;
constinit const ByteKernels table = {nullptr, &matrix_table};
}  // namespace fastseq::core::avx512_amx
