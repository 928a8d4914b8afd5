#if defined(FASTSEQ_AVX512_ON_AVX2)
#define FASTSEQ_ISA avx512_on_avx2
#define FASTSEQ_ISA_NAME "avx512_on_avx2"
#elif defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define FASTSEQ_ISA avx512
#define FASTSEQ_ISA_NAME "avx512"
#else
#error "isa_avx512.cpp needs -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma"
#endif
#include "core/simd_avx512.h"
#include "core/kernels.inl.h"
