// Vec for any processor: plain compiler vectors of eight floats, so that loops have the same shape as on wide machines.
// fma rounds twice here: baseline processors have no fused instruction, and a product can do without.
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
inline VecF root(VecF x) {
  for (int i = 0; i < kVectorBytes / 4; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
inline VecD root(VecD x) {
  for (int i = 0; i < kVectorBytes / 8; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}
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

typedef int16_t VecI16 __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecWord __attribute__((vector_size(kVectorBytes)));
// Neighbouring products of 16 bits, two of which fit 16 bits.
inline VecWord dot_words(VecWord sum, VecI16 even_w, VecI16 odd_w, VecWord a) {
  const VecWord pairs = (VecWord)(even_w * (((VecI16)a << 8) >> 8) + odd_w * ((VecI16)a >> 8));
  return sum + ((pairs << 16) >> 16) + (pairs >> 16);
}
// sum + four products of neighbouring bytes in every lane: of w, which is shifted by 128, and of a, -127 ..
// 127. kByteShift times the sum of a remains to be subtracted. dot_nibbles: w is 0 .. 15, as it is.
constexpr int kByteShift = 0;
inline VecWord dot_bytes(VecWord sum, VecWord w, VecWord a) {
  return dot_words(sum, ((VecI16)w & 255) - 128, (((VecI16)w >> 8) & 255) - 128, a);
}
inline VecWord dot_nibbles(VecWord sum, VecWord w, VecWord a) {
  return dot_words(sum, (VecI16)w & 255, ((VecI16)w >> 8) & 255, a);
}

// a + b rounded to odd: towards zero, and where that is not exact, to an odd last bit.
inline VecD odd_sum(VecD a, VecD b) {
  const VecD sum = a + b, from_b = sum - a, lost = (a - (sum - from_b)) + (b - from_b);
  const VecD side = lost * sum;  // NaN where the sum is not finite
  auto beyond = side < 0.0;
  const auto inexact = beyond | (side > 0.0);
  return (VecD)(((decltype(beyond))sum + beyond) | (inexact & 1));
}

// Rounded once. Of floats in double, where the product is exact, and a sum rounded to odd keeps what rounding it to
// float needs (Boldo and Melquiond, IEEE Transactions on Computers 57, 2008).
inline VecF fused(VecF a, VecF b, VecF c) {
  typedef float HalfF __attribute__((vector_size(kVectorBytes / 2)));
  for (int n = 0; n < 2; ++n) {
    const auto wide = [n](const VecF& v) __attribute__((always_inline)) {
      HalfF half;
      __builtin_memcpy(&half, (const char*)&v + n * sizeof half, sizeof half);
      return __builtin_convertvector(half, VecD);
    };
    const HalfF half = __builtin_convertvector(odd_sum(wide(a) * wide(b), wide(c)), HalfF);
    __builtin_memcpy((char*)&c + n * sizeof half, &half, sizeof half);
  }
  return c;
}
// In the C library where the processor has no such instruction, and then slowly.
inline VecD fused(VecD a, VecD b, VecD c) {
  for (int i = 0; i < kVectorBytes / 8; ++i) c[i] = __builtin_fma(a[i], b[i], c[i]);
  return c;
}

}  // namespace
}  // namespace fastseq::core::FASTSEQ_ISA
