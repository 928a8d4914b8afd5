// What AVX512_VNNI does better than the rest of AVX-512: the screen of vq_screen.h.
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

namespace fastseq::core::avx512_vnni {
extern const VqScreenTable table;
constinit const VqScreenTable table = vq_screen_table;
}  // namespace fastseq::core::avx512_vnni
