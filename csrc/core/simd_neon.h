// Vec for 64-bit ARM: 32 registers of 4 floats or 2 doubles.
#include <arm_neon.h>
#include <stdint.h>

namespace fastseq::core::FASTSEQ_ISA {
namespace {

constexpr int kVectorBytes = 16;
constexpr int kTileRows = 12;  // 12 x 2 accumulators, 2 vectors of the panel, and broadcasts
constexpr int tile_panels(int rows) { return rows <= 3 ? 4 : rows <= 6 ? 2 : 1; }

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));
typedef uint64_t VecU64 __attribute__((vector_size(kVectorBytes)));

inline VecF broadcast(float x) { return (VecF)vdupq_n_f32(x); }
inline VecD broadcast(double x) { return (VecD)vdupq_n_f64(x); }
inline VecF fma(VecF a, VecF b, VecF c) { return (VecF)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
inline VecD fma(VecD a, VecD b, VecD c) { return (VecD)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b); }
// The second operand where either is NaN, which the instructions for it would give.
inline VecF largest(VecF a, VecF b) { return a > b ? a : b; }
inline VecD largest(VecD a, VecD b) { return a > b ? a : b; }
inline VecF smallest(VecF a, VecF b) { return a < b ? a : b; }
inline VecD smallest(VecD a, VecD b) { return a < b ? a : b; }
inline VecF root(VecF x) { return (VecF)vsqrtq_f32((float32x4_t)x); }
inline VecD root(VecD x) { return (VecD)vsqrtq_f64((float64x2_t)x); }
inline VecU64 lane_numbers() { return VecU64{0, 1}; }
// The low halves of the 64-bit lanes of a, then of b.
inline VecU32 low_words(VecU64 a, VecU64 b) { return (VecU32)vuzp1q_u32((uint32x4_t)a, (uint32x4_t)b); }
// 64-bit products of the even 32-bit lanes
inline VecU64 multiply_even(VecU64 a, VecU64 b) {
  return (VecU64)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
}

// Rounded once on every instruction set, as fma is here.
template <class V>
inline V fused(V a, V b, V c) {
  return fma(a, b, c);
}

typedef int32_t VecWord __attribute__((vector_size(kVectorBytes)));
// sum + four products of neighbouring bytes in every lane, two of which fit 16 bits.
inline VecWord add_products(VecWord sum, int8x16_t w, int8x16_t a) {
  const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(a)), high = vmull_high_s8(w, a);
  return (VecWord)vpadalq_s16((int32x4_t)sum, vpaddq_s16(low, high));
}
// The same of w, which is shifted by 128, and of a, -127 .. 127. kByteShift times the sum of a remains to be
// subtracted. dot_nibbles: w is 0 .. 15, as it is.
constexpr int kByteShift = 0;
inline VecWord dot_bytes(VecWord sum, VecWord w, VecWord a) {
  return add_products(sum, veorq_s8((int8x16_t)w, vdupq_n_s8(-128)), (int8x16_t)a);
}
inline VecWord dot_nibbles(VecWord sum, VecWord w, VecWord a) { return add_products(sum, (int8x16_t)w, (int8x16_t)a); }

}  // namespace
}  // namespace fastseq::core::FASTSEQ_ISA
