/* The limits of this machine: a register-only loop of fused multiply-adds, and a streaming read.
 *
 * Compiled on the spot by peak.py with -O3 -march=native, so these functions belong to one machine only.
 * Twelve accumulators cover the latency of every current core (4 to 5 cycles, two units) and, with the two operands, fit
 * in sixteen registers. The empty asm hides the values from the compiler: it can neither fold the loop nor
 * split an accumulator over memory.
 */
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#define REGISTER "+v"
#elif defined(__aarch64__)
#define REGISTER "+w"
#else
#error "peak.c: name the vector register constraint of this machine"
#endif

#define ACCUMULATORS(OP) OP(0) OP(1) OP(2) OP(3) OP(4) OP(5) OP(6) OP(7) OP(8) OP(9) OP(10) OP(11)

#define DECLARE(n) V a##n = {0};
#define MULTIPLY_ADD(n) a##n = a##n * x + y;
#define HIDE(n) __asm__ volatile("" : REGISTER(a##n));
#define FOLD(n) sum += a##n;

/* FLOP done by `loops` rounds: each round is 12 accumulators x lanes x 2. */
#define FMA_LOOP(NAME, BYTES)                                                   \
  typedef float NAME##_vector __attribute__((vector_size(BYTES)));              \
  double NAME(int64_t loops, float* out) {                                      \
    typedef NAME##_vector V;                                                    \
    const int lanes = BYTES / 4;                                                \
    V x, y;                                                                     \
    for (int n = 0; n < lanes; ++n) { x[n] = 0.5f; y[n] = 1.0f; }               \
    __asm__ volatile("" : REGISTER(x), REGISTER(y));                            \
    ACCUMULATORS(DECLARE)                                                       \
    for (int64_t loop = 0; loop < loops; ++loop) {                              \
      ACCUMULATORS(MULTIPLY_ADD)                                                \
      ACCUMULATORS(HIDE)                                                        \
    }                                                                           \
    V sum = {0};                                                                \
    ACCUMULATORS(FOLD)                                                          \
    memcpy(out, &sum, sizeof sum);                                              \
    return 2.0 * 12 * lanes * (double)loops;                                    \
  }

#if defined(__AVX512F__)
FMA_LOOP(fma_64, 64)
#endif
#if defined(__AVX2__) && defined(__FMA__)
FMA_LOOP(fma_32, 32)
#endif
FMA_LOOP(fma_16, 16)

/* Sum `n` floats (a multiple of 128) `loops` times: eight independent chains of the widest vector. */
#if defined(__AVX512F__)
typedef float Wide __attribute__((vector_size(64)));
#elif defined(__AVX2__)
typedef float Wide __attribute__((vector_size(32)));
#else
typedef float Wide __attribute__((vector_size(16)));
#endif

double stream_read(const float* data, int64_t n, int64_t loops, float* out) {
  const Wide* p = (const Wide*)data;
  const int64_t vectors = n / (int64_t)(sizeof(Wide) / sizeof(float));
  Wide s[8] = {{0}};
  for (int64_t loop = 0; loop < loops; ++loop) {
    for (int64_t v = 0; v + 8 <= vectors; v += 8)
      for (int k = 0; k < 8; ++k) s[k] += p[v + k];
    __asm__ volatile("" ::: "memory");
  }
  Wide sum = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
  memcpy(out, &sum, sizeof sum);
  return 4.0 * (double)(vectors / 8 * 8) * (sizeof(Wide) / 4) * (double)loops;
}
