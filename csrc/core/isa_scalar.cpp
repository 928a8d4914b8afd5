#define FASTSEQ_ISA scalar
#define FASTSEQ_ISA_NAME "scalar"
#include "core/simd_scalar.h"
#include "core/kernels.inl.h"
