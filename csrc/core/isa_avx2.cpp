#if !defined(__AVX2__) || !defined(__FMA__)
#error "isa_avx2.cpp needs -mavx2 -mfma"
#endif
#define FASTSEQ_ISA avx2
#define FASTSEQ_ISA_NAME "avx2"
#include "core/simd_avx2.h"
#include "core/kernels.inl.h"
