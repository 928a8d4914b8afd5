// What every Vec has in common, on compiler vectors. simd_<set>.h gives the widths, broadcast, fma and multiply_even.
namespace fastseq::core::FASTSEQ_ISA {
namespace {

typedef int32_t VecI32 __attribute__((vector_size(kVectorBytes)));
typedef int64_t VecI64 __attribute__((vector_size(kVectorBytes)));

template <class R>
struct Simd;
template <>
struct Simd<float> {
  using Vec = VecF;
  using Int = VecI32;
  using Scalar = int32_t;
};
template <>
struct Simd<double> {
  using Vec = VecD;
  using Int = VecI64;
  using Scalar = int64_t;
};

template <class R>
using Vec = typename Simd<R>::Vec;
template <class R>
using Int = typename Simd<R>::Int;

template <class R>
constexpr int kLanes = kVectorBytes / (int)sizeof(R);
template <class R>
constexpr int kPanel = 2 * kLanes<R>;

template <class R>
inline Vec<R> load(const R* p) {
  Vec<R> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class R>
inline void store(R* p, Vec<R> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
#if !defined(FASTSEQ_HAS_MASKS)
// The first `count` lanes, the others are those of `other`; and their store.
template <class R>
inline Vec<R> load_part(const R* p, int64_t count, Vec<R> other) {
  __builtin_memcpy(&other, p, (size_t)count * sizeof(R));
  return other;
}
template <class R>
inline void store_part(R* p, Vec<R> v, int64_t count) {
  __builtin_memcpy(p, &v, (size_t)count * sizeof(R));
}
#endif
#if !defined(FASTSEQ_HAS_SCALE)
// v times a power of two.
template <class V>
inline V scale(V v, V power) {
  return v * power;
}
#endif
// The others are zero.
template <class R>
inline Vec<R> load_part(const R* p, int64_t count) {
  return load_part(p, count, Vec<R>{});
}

#if defined(FASTSEQ_HAS_BYTES)
inline VecU8 load_bytes(const uint8_t* p) {
  VecU8 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
#endif
template <class R>
inline Int<R> load_int(const R* p) {
  Int<R> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class R>
inline void store_int(R* p, Int<R> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

}  // namespace
}  // namespace fastseq::core::FASTSEQ_ISA
