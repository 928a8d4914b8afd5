#if !defined(__aarch64__) || !defined(__ARM_NEON)
#error "isa_neon.cpp needs a 64-bit ARM processor"
#endif
#define FASTSEQ_ISA neon
#define FASTSEQ_ISA_NAME "neon"
#include "core/simd_neon.h"
#include "core/kernels.inl.h"
