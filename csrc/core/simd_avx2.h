// Vec for AVX2 with FMA: 16 registers of 8 floats or 4 doubles.
#include <immintrin.h>
#include <stdint.h>

namespace fastseq::core::FASTSEQ_ISA {
namespace {

constexpr int kVectorBytes = 32;
constexpr int kTileRows = 6;  // 6 x 2 accumulators, 2 vectors of the panel, 1 broadcast
constexpr int tile_panels(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));
typedef uint64_t VecU64 __attribute__((vector_size(kVectorBytes)));

inline VecF broadcast(float x) { return (VecF)_mm256_set1_ps(x); }
inline VecD broadcast(double x) { return (VecD)_mm256_set1_pd(x); }
inline VecF fma(VecF a, VecF b, VecF c) { return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline VecD fma(VecD a, VecD b, VecD c) { return (VecD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
// The second operand where either is NaN.
inline VecF largest(VecF a, VecF b) { return (VecF)_mm256_max_ps((__m256)a, (__m256)b); }
inline VecD largest(VecD a, VecD b) { return (VecD)_mm256_max_pd((__m256d)a, (__m256d)b); }
inline VecF smallest(VecF a, VecF b) { return (VecF)_mm256_min_ps((__m256)a, (__m256)b); }
inline VecD smallest(VecD a, VecD b) { return (VecD)_mm256_min_pd((__m256d)a, (__m256d)b); }
inline VecF root(VecF x) { return (VecF)_mm256_sqrt_ps((__m256)x); }
inline VecD root(VecD x) { return (VecD)_mm256_sqrt_pd((__m256d)x); }
inline VecU64 lane_numbers() { return VecU64{0, 1, 2, 3}; }
// The low halves of the 64-bit lanes of a, then of b.
inline VecU32 low_words(VecU64 a, VecU64 b) {
  return __builtin_shufflevector((VecU32)a, (VecU32)b, 0, 2, 4, 6, 8, 10, 12, 14);
}
// 64-bit products of the even 32-bit lanes
inline VecU64 multiply_even(VecU64 a, VecU64 b) { return (VecU64)_mm256_mul_epu32((__m256i)a, (__m256i)b); }

// The first `count` lanes, the others are those of `other`; and their store.
#define FASTSEQ_HAS_MASKS
inline __m256i first_words(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i first_pairs(int64_t count) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}
inline VecF load_part(const float* p, int64_t count, VecF other) {
  const __m256i mask = first_words(count);
  return (VecF)_mm256_blendv_ps((__m256)other, _mm256_maskload_ps(p, mask), (__m256)mask);
}
inline VecD load_part(const double* p, int64_t count, VecD other) {
  const __m256i mask = first_pairs(count);
  return (VecD)_mm256_blendv_pd((__m256d)other, _mm256_maskload_pd(p, mask), (__m256d)mask);
}
inline void store_part(float* p, VecF v, int64_t count) { _mm256_maskstore_ps(p, first_words(count), (__m256)v); }
inline void store_part(double* p, VecD v, int64_t count) { _mm256_maskstore_pd(p, first_pairs(count), (__m256d)v); }

// Rounded once on every instruction set, as fma is here.
template <class V>
inline V fused(V a, V b, V c) {
  return fma(a, b, c);
}

#define FASTSEQ_HAS_BYTES
typedef uint8_t VecU8 __attribute__((vector_size(kVectorBytes)));
typedef int16_t VecI16 __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecWord __attribute__((vector_size(kVectorBytes)));
// The same four bytes in every lane of 32 bits.
inline VecU8 broadcast_word(const int8_t* p) {
  int32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return (VecU8)_mm256_set1_epi32(word);
}
// Sums of two neighbouring products of unsigned and signed bytes; they must fit 16 bits.
inline VecI16 multiply_bytes(VecU8 a, VecU8 b) { return (VecI16)_mm256_maddubs_epi16((__m256i)a, (__m256i)b); }
inline VecWord add_pairs(VecI16 a) { return (VecWord)_mm256_madd_epi16((__m256i)a, _mm256_set1_epi16(1)); }
// A bit per lane of a comparison.
inline uint32_t bits_of(VecWord v) { return (uint32_t)_mm256_movemask_ps((__m256)v); }
// Has this value in a register here.
inline void keep(VecI16& v) { asm volatile("" : "+x"(v)); }

// sum + four products of neighbouring bytes in every lane: of w, which is shifted by 128, and of a, -127 ..
// 127. kByteShift times the sum of a remains to be subtracted. dot_nibbles: w is 0 .. 15, as it is.
#if defined(__AVXVNNI__)
constexpr int kByteShift = 128;
inline VecWord dot_bytes(VecWord sum, VecWord w, VecWord a) {
  return (VecWord)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)a);
}
inline VecWord dot_nibbles(VecWord sum, VecWord w, VecWord a) { return dot_bytes(sum, w, a); }
#else
constexpr int kByteShift = 0;
// |w| times a with the sign of w: two products fit 16 bits, 2 * 128 * 127.
inline VecWord dot_bytes(VecWord sum, VecWord w, VecWord a) {
  const __m256i value = _mm256_xor_si256((__m256i)w, _mm256_set1_epi8(-128));
  const VecU8 signed_a = (VecU8)_mm256_sign_epi8((__m256i)a, value);
  return sum + add_pairs(multiply_bytes((VecU8)_mm256_abs_epi8(value), signed_a));
}
inline VecWord dot_nibbles(VecWord sum, VecWord w, VecWord a) {
  return sum + add_pairs(multiply_bytes((VecU8)w, (VecU8)a));
}
#endif

constexpr int64_t kScreenLeastCodes = 512;  // from how many on the screen was the faster way, on Zen 3

}  // namespace
}  // namespace fastseq::core::FASTSEQ_ISA
