// Vec for AVX-512: 32 registers of 16 floats or 8 doubles. With FASTSEQ_AVX512_ON_AVX2 the same body runs as two AVX2
// halves per vector, for tests on machines without AVX-512.
#include <immintrin.h>
#include <stdint.h>

namespace fastseq::core::FASTSEQ_ISA {
namespace {

constexpr int kVectorBytes = 64;
constexpr int kTileRows = 12;  // 12 x 2 accumulators, 2 vectors of the panel; broadcasts are memory operands
constexpr int tile_panels(int rows) { return rows <= 3 ? 4 : rows <= 6 ? 2 : 1; }

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));
typedef uint64_t VecU64 __attribute__((vector_size(kVectorBytes)));

inline VecU64 lane_numbers() { return VecU64{0, 1, 2, 3, 4, 5, 6, 7}; }
// The low halves of the 64-bit lanes of a, then of b.
inline VecU32 low_words(VecU64 a, VecU64 b) {
  return __builtin_shufflevector((VecU32)a, (VecU32)b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}

#if defined(FASTSEQ_AVX512_ON_AVX2)

template <class To, class Half>
inline To joined(Half low, Half high) {
  To out;
  __builtin_memcpy(&out, &low, sizeof low);
  __builtin_memcpy((char*)&out + sizeof low, &high, sizeof high);
  return out;
}
template <class Half, class From>
inline Half half(const From& v, int which) {
  Half out;
  __builtin_memcpy(&out, (const char*)&v + which * sizeof out, sizeof out);
  return out;
}
inline VecF broadcast(float x) { return joined<VecF>(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
inline VecD broadcast(double x) { return joined<VecD>(_mm256_set1_pd(x), _mm256_set1_pd(x)); }
inline VecF fma(VecF a, VecF b, VecF c) {
  return joined<VecF>(_mm256_fmadd_ps(half<__m256>(a, 0), half<__m256>(b, 0), half<__m256>(c, 0)),
                      _mm256_fmadd_ps(half<__m256>(a, 1), half<__m256>(b, 1), half<__m256>(c, 1)));
}
inline VecD fma(VecD a, VecD b, VecD c) {
  return joined<VecD>(_mm256_fmadd_pd(half<__m256d>(a, 0), half<__m256d>(b, 0), half<__m256d>(c, 0)),
                      _mm256_fmadd_pd(half<__m256d>(a, 1), half<__m256d>(b, 1), half<__m256d>(c, 1)));
}
inline VecF largest(VecF a, VecF b) { return a > b ? a : b; }
inline VecD largest(VecD a, VecD b) { return a > b ? a : b; }
inline VecF smallest(VecF a, VecF b) { return a < b ? a : b; }
inline VecD smallest(VecD a, VecD b) { return a < b ? a : b; }
inline VecF root(VecF x) {
  return joined<VecF>(_mm256_sqrt_ps(half<__m256>(x, 0)), _mm256_sqrt_ps(half<__m256>(x, 1)));
}
inline VecD root(VecD x) {
  return joined<VecD>(_mm256_sqrt_pd(half<__m256d>(x, 0)), _mm256_sqrt_pd(half<__m256d>(x, 1)));
}
inline VecU64 multiply_even(VecU64 a, VecU64 b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }

#else

inline VecF broadcast(float x) { return (VecF)_mm512_set1_ps(x); }
inline VecD broadcast(double x) { return (VecD)_mm512_set1_pd(x); }
inline VecF fma(VecF a, VecF b, VecF c) { return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline VecD fma(VecD a, VecD b, VecD c) { return (VecD)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
// The second operand where either is NaN.
inline VecF largest(VecF a, VecF b) { return (VecF)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b); }
inline VecD largest(VecD a, VecD b) { return (VecD)_mm512_maskz_max_pd(0xff, (__m512d)a, (__m512d)b); }
inline VecF smallest(VecF a, VecF b) { return (VecF)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b); }
inline VecD smallest(VecD a, VecD b) { return (VecD)_mm512_maskz_min_pd(0xff, (__m512d)a, (__m512d)b); }
inline VecF root(VecF x) { return (VecF)_mm512_maskz_sqrt_ps(0xffff, (__m512)x); }
inline VecD root(VecD x) { return (VecD)_mm512_maskz_sqrt_pd(0xff, (__m512d)x); }
// 64-bit products of the even 32-bit lanes
inline VecU64 multiply_even(VecU64 a, VecU64 b) { return (VecU64)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b); }
// The first `count` lanes, the others are those of `other`; and their store.
#define FASTSEQ_HAS_MASKS
inline uint32_t first_lanes(int64_t count) { return (1u << count) - 1; }
inline VecF load_part(const float* p, int64_t count, VecF other) {
  return (VecF)_mm512_mask_loadu_ps((__m512)other, (__mmask16)first_lanes(count), p);
}
inline VecD load_part(const double* p, int64_t count, VecD other) {
  return (VecD)_mm512_mask_loadu_pd((__m512d)other, (__mmask8)first_lanes(count), p);
}
inline void store_part(float* p, VecF v, int64_t count) {
  _mm512_mask_storeu_ps(p, (__mmask16)first_lanes(count), (__m512)v);
}
inline void store_part(double* p, VecD v, int64_t count) {
  _mm512_mask_storeu_pd(p, (__mmask8)first_lanes(count), (__m512d)v);
}
// v times 2^n; a result below the normal numbers is 0 where denormal ones are flushed.
#define FASTSEQ_HAS_SCALE
inline VecF scale(VecF v, VecF n) { return (VecF)_mm512_maskz_scalef_ps(0xffff, (__m512)v, (__m512)n); }
inline VecD scale(VecD v, VecD n) { return (VecD)_mm512_maskz_scalef_pd(0xff, (__m512d)v, (__m512d)n); }

#endif

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
  return (VecU8)(VecWord{} + word);
}
#if defined(FASTSEQ_AVX512_ON_AVX2)
inline VecI16 multiply_bytes(VecU8 a, VecU8 b) {
  return joined<VecI16>(_mm256_maddubs_epi16(half<__m256i>(a, 0), half<__m256i>(b, 0)),
                        _mm256_maddubs_epi16(half<__m256i>(a, 1), half<__m256i>(b, 1)));
}
inline VecWord add_pairs(VecI16 a) {
  const __m256i one = _mm256_set1_epi16(1);
  return joined<VecWord>(_mm256_madd_epi16(half<__m256i>(a, 0), one), _mm256_madd_epi16(half<__m256i>(a, 1), one));
}
inline uint32_t bits_of(VecWord v) {
  return (uint32_t)_mm256_movemask_ps(half<__m256>(v, 0)) | (uint32_t)_mm256_movemask_ps(half<__m256>(v, 1)) << 8;
}
inline void keep(VecI16&) {}
// AVX512_VNNI's, so that tests run its screen too: a + four products of neighbouring bytes, in 32 bits.
#define FASTSEQ_HAS_DOT
inline __m256i add_products(__m256i a, __m256i x, __m256i c) {
  const __m256i even =
      _mm256_madd_epi16(_mm256_and_si256(x, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(c, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(c, 8));
  return _mm256_add_epi32(a, _mm256_add_epi32(even, odd));
}
inline VecWord add_products(VecWord a, VecU8 x, VecU8 c) {
  return joined<VecWord>(add_products(half<__m256i>(a, 0), half<__m256i>(x, 0), half<__m256i>(c, 0)),
                         add_products(half<__m256i>(a, 1), half<__m256i>(x, 1), half<__m256i>(c, 1)));
}
#else
// Sums of two neighbouring products of unsigned and signed bytes; they must fit 16 bits.
inline VecI16 multiply_bytes(VecU8 a, VecU8 b) { return (VecI16)_mm512_maddubs_epi16((__m512i)a, (__m512i)b); }
inline VecWord add_pairs(VecI16 a) { return (VecWord)_mm512_madd_epi16((__m512i)a, _mm512_set1_epi16(1)); }
// A bit per lane of a comparison.
inline uint32_t bits_of(VecWord v) { return _mm512_movepi32_mask((__m512i)v); }
// Has this value in a register here.
inline void keep(VecI16& v) { asm volatile("" : "+v"(v)); }
#if defined(__AVX512VNNI__)
#define FASTSEQ_HAS_DOT
// a + four products of neighbouring bytes, unsigned of x and signed of c, in 32 bits
inline VecWord add_products(VecWord a, VecU8 x, VecU8 c) {
  return (VecWord)_mm512_dpbusd_epi32((__m512i)a, (__m512i)x, (__m512i)c);
}
#endif
#endif

// sum + four products of neighbouring bytes in every lane: of w, which is shifted by 128, and of a, -127 ..
// 127. kByteShift times the sum of a remains to be subtracted. dot_nibbles: w is 0 .. 15, as it is.
#if defined(__AMX_INT8__) || defined(FASTSEQ_AVX512_ON_AVX2)
#define FASTSEQ_HAS_AMX
#endif
#if defined(FASTSEQ_HAS_DOT)
constexpr int kByteShift = 128;
inline VecWord dot_bytes(VecWord sum, VecWord w, VecWord a) { return add_products(sum, (VecU8)w, (VecU8)a); }
inline VecWord dot_nibbles(VecWord sum, VecWord w, VecWord a) { return dot_bytes(sum, w, a); }
#else
constexpr int kByteShift = 0;
// |w| times a with the sign of w: two products fit 16 bits, 2 * 128 * 127.
inline VecWord dot_bytes(VecWord sum, VecWord w, VecWord a) {
  const __m512i value = _mm512_xor_si512((__m512i)w, _mm512_set1_epi8(-128));
  const __m512i zero = _mm512_setzero_si512();
  const __m512i signed_a = _mm512_mask_sub_epi8((__m512i)a, _mm512_movepi8_mask(value), zero, (__m512i)a);
  return sum + add_pairs(multiply_bytes((VecU8)_mm512_abs_epi8(value), (VecU8)signed_a));
}
inline VecWord dot_nibbles(VecWord sum, VecWord w, VecWord a) {
  return sum + add_pairs(multiply_bytes((VecU8)w, (VecU8)a));
}
#endif

// From how many codes on the screen is taken, on Emerald Rapids: without VNNI it lost at 512, was even at 1024, and won
// at 8192.
#if defined(FASTSEQ_HAS_DOT)
constexpr int64_t kScreenLeastCodes = 512;
#else
constexpr int64_t kScreenLeastCodes = 2048;
#endif

}  // namespace
}  // namespace fastseq::core::FASTSEQ_ISA
