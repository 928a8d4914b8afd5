// Vec for any processor: plain compiler vectors of eight floats, so that loops have the same shape as on wide machines.
// fma rounds twice here: baseline processors have no fused instruction.
#include <stdint.h>

namespace fastseq::core::FASTSEQ_ISA {
namespace {

constexpr int kVectorBytes = 32;
constexpr int kTileRows = 3;                                       // rows of the register tile; 2 vectors wide
constexpr int tile_panels(int rows) { return rows == 1 ? 2 : 1; }  // panels that one register tile covers

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));
typedef uint64_t VecU64 __attribute__((vector_size(kVectorBytes)));

inline VecF broadcast(float x) { return VecF{x, x, x, x, x, x, x, x}; }
inline VecD broadcast(double x) { return VecD{x, x, x, x}; }
inline VecF fma(VecF a, VecF b, VecF c) { return a * b + c; }
inline VecD fma(VecD a, VecD b, VecD c) { return a * b + c; }
// The second operand where either is NaN.
inline VecF largest(VecF a, VecF b) { return a > b ? a : b; }
inline VecD largest(VecD a, VecD b) { return a > b ? a : b; }
inline VecF smallest(VecF a, VecF b) { return a < b ? a : b; }
inline VecD smallest(VecD a, VecD b) { return a < b ? a : b; }
inline VecU64 lane_numbers() { return VecU64{0, 1, 2, 3}; }
// The low halves of the 64-bit lanes of a, then of b.
inline VecU32 low_words(VecU64 a, VecU64 b) {
  return __builtin_shufflevector((VecU32)a, (VecU32)b, 0, 2, 4, 6, 8, 10, 12, 14);
}
// 64-bit products of the even 32-bit lanes
inline VecU64 multiply_even(VecU64 a, VecU64 b) {
  VecU64 out;
  for (int i = 0; i < kVectorBytes / 8; ++i) out[i] = (uint64_t)(uint32_t)a[i] * (uint32_t)b[i];
  return out;
}

// Rounded once: in the C library where the processor has no such instruction, and then slowly.
inline VecF fused(VecF a, VecF b, VecF c) {
  for (int i = 0; i < kVectorBytes / 4; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}
inline VecD fused(VecD a, VecD b, VecD c) {
  for (int i = 0; i < kVectorBytes / 8; ++i) c[i] = __builtin_fma(a[i], b[i], c[i]);
  return c;
}

}  // namespace
}  // namespace fastseq::core::FASTSEQ_ISA
