// The product of a few rows with panels of a packed matrix; see matrix.h. Every element is a sum of its own, so it does
// not matter which rows and panels share a call.
namespace fastseq::core::FASTSEQ_ISA {
namespace {

constexpr int kPanelVectors = (int)kMatrixPanel / kLanes<float>;
constexpr bool kManyRegisters = kVectorBytes == 64;
constexpr int kMatrixRows = kManyRegisters ? 6 : 4;  // of a register tile

// Panels of a register tile, and the pieces of K that integers, whose sums are exact, are summed in side by side: few
// rows alone would wait for each product.
constexpr int matrix_panels(bool integer, int rows) {
  if (kManyRegisters) return rows == 1 && !integer ? 8 : 4;
  return rows == 1 ? integer ? 2 : 4 : rows == 2 ? 2 : 1;
}
constexpr int matrix_splits(int rows) {
  return rows == 1 ? kManyRegisters ? 4 : 2 : rows == 2 && kManyRegisters ? 2 : 1;
}

inline VecI32 load_words(const uint8_t* p) {
  VecI32 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// The same four in every lane.
inline VecI32 same_bytes(const int8_t* p) {
  int32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return VecI32{} + word;
}

inline VecF with_bias(const MatrixTile& t, int64_t panel, int v, VecF value) {
  return t.bias ? value + load(t.bias + panel * kMatrixPanel + v * kLanes<float>) : value;
}

// One step of columns of a vector of rows: 4 of int8, or 8 of int4.
template <Storage S>
inline VecI32 add_step(VecI32 sum, VecI32 w, const VecI32* a) {
  if constexpr (S == Storage::int8) return dot_bytes(sum, w, a[0]);
  const VecI32 low = VecI32{} + 0x0f0f0f0f;
  return dot_nibbles(dot_nibbles(sum, w & low, a[0]), (w >> 4) & low, a[1]);
}

template <Storage S, int M, int P>
void integer_tile(const MatrixTile& t, int64_t first) {
  constexpr int V = kPanelVectors, U = matrix_splits(M), A = S == Storage::int8 ? 1 : 2, kStep = 4 * A;
  constexpr int kShift = S == Storage::int8 ? kByteShift : 8;
  const uint8_t* const b = t.b + first * t.b_panel;
  const float* const scale = t.scale + first * t.scale_panel;
  VecF out[M][P][V] = {};
  int64_t group = 0;
  for (int64_t begin = 0; begin < t.K; begin += t.group, ++group) {
    const int64_t end = begin + t.group < t.K ? begin + t.group : t.K;
    const int64_t from = begin / kStep, to = (end + kStep - 1) / kStep;
    VecI32 sum[U][M][P][V] = {};
    const auto add = [&](int64_t at, int u) __attribute__((always_inline)) {
      VecI32 a[M][A];
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
        for (int n = 0; n < A; ++n) a[i][n] = same_bytes((const int8_t*)t.a[i] + at * kStep + 4 * n);
      }
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const VecI32 w = load_words(b + p * t.b_panel + at * 64 + v * kVectorBytes);
#pragma GCC unroll 8
          for (int i = 0; i < M; ++i) sum[u][i][p][v] = add_step<S>(sum[u][i][p][v], w, a[i]);
        }
      }
    };
    int64_t at = from;
    for (; at + U <= to; at += U) {
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) add(at + u, u);
    }
    for (; at < to; ++at) add(at, 0);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const VecI32 shift = VecI32{} + (kShift ? kShift * t.sums[i][group] : 0);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          VecI32 total = sum[0][i][p][v] - shift;
#pragma GCC unroll 4
          for (int u = 1; u < U; ++u) total += sum[u][i][p][v];
          const float* const s = scale + p * t.scale_panel + group * kMatrixPanel + v * kLanes<float>;
          out[i][p][v] += __builtin_convertvector(total, VecF) * load(s);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    const VecF times = broadcast(t.a_scale[0] ? *t.a_scale[i] : 1.0f);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const VecF value = with_bias(t, first + p, v, out[i][p][v] * times);
        store(t.c + i * t.c_row + (first + p) * t.c_panel + v * kLanes<float>, value);
      }
    }
  }
}

// Column 2 j and the one after it, of bfloat16.
inline VecF even_halves(VecI32 w) { return (VecF)(w << 16); }
inline VecF odd_halves(VecI32 w) { return (VecF)(w & (int32_t)0xffff0000); }

template <Storage S, int M, int P>
void float_tile(const MatrixTile& t, int64_t first) {
  constexpr int V = kPanelVectors;
  const uint8_t* const b = t.b + first * t.b_panel;
  const int64_t block = t.block;
  VecF out[M][P][V] = {};
  for (int64_t begin = 0; begin < t.K; begin += block) {
    const int64_t end = begin + block < t.K ? begin + block : t.K;
    VecF sum[M][P][V] = {};
    const auto add = [&](int64_t k, const auto& weights) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const VecF w = weights(p, v);
#pragma GCC unroll 8
          for (int i = 0; i < M; ++i) sum[i][p][v] = fma(broadcast(((const float*)t.a[i])[k]), w, sum[i][p][v]);
        }
      }
    };
    const auto words = [&](int64_t row, int p, int v) __attribute__((always_inline)) {
      return load_words(b + p * t.b_panel + row * 64 + v * kVectorBytes);
    };
    int64_t k = begin;
    if constexpr (S == Storage::f32) {
      for (; k < end; ++k) add(k, [&](int p, int v) __attribute__((always_inline)) { return (VecF)words(k, p, v); });
    } else {
      for (; k < end; k += 2) {  // blocks are of even length, but for the last
        add(k, [&](int p, int v) __attribute__((always_inline)) { return even_halves(words(k / 2, p, v)); });
        if (k + 1 == end) break;
        add(k + 1, [&](int p, int v) __attribute__((always_inline)) { return odd_halves(words(k / 2, p, v)); });
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) out[i][p][v] += sum[i][p][v];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const VecF value = with_bias(t, first + p, v, out[i][p][v]);
        store(t.c + i * t.c_row + (first + p) * t.c_panel + v * kLanes<float>, value);
      }
    }
  }
}

template <Storage S, int M, int P>
int64_t matrix_run(const MatrixTile& t, int64_t p) {
  for (; p + P <= t.panels; p += P) {
    if constexpr (is_integer(S)) {
      integer_tile<S, M, P>(t, p);
    } else {
      float_tile<S, M, P>(t, p);
    }
  }
  if constexpr (P > 1) p = matrix_run<S, M, P / 2>(t, p);
  return p;
}

template <Storage S, int M>
void matrix_rows(const MatrixTile& t) {
  matrix_run<S, M, matrix_panels(is_integer(S), M)>(t, 0);
}

#if defined(FASTSEQ_HAS_AMX)
}  // namespace
}  // namespace fastseq::core::FASTSEQ_ISA
#include "core/matrix_amx.inl.h"
namespace fastseq::core::FASTSEQ_ISA {
namespace {
#endif

using MatrixRun = void (*)(const MatrixTile&);

// The rows in register tiles as even as can be.
template <int N>
void matrix_tiles(const MatrixTile& t, const MatrixRun (&run)[N]) {
  MatrixTile part = t;
  const int64_t tiles = (t.rows + N - 1) / N;
  for (int64_t n = 0, first = 0; n < tiles; ++n, first += part.rows) {
    part.rows = t.rows * (n + 1) / tiles - first;
    for (int64_t i = 0; i < part.rows; ++i) {
      part.a[i] = t.a[first + i];
      part.sums[i] = t.sums[first + i];
      part.a_scale[i] = t.a_scale[t.a_scale[0] ? first + i : 0];
    }
    part.c = t.c + first * t.c_row;
    run[part.rows - 1](part);
  }
}

template <Storage S>
void matrix_storage(const MatrixTile& t) {
  if constexpr (kMatrixRows == 6) {
    constexpr MatrixRun run[] = {matrix_rows<S, 1>, matrix_rows<S, 2>, matrix_rows<S, 3>,
                                 matrix_rows<S, 4>, matrix_rows<S, 5>, matrix_rows<S, 6>};
    matrix_tiles(t, run);
  } else {
    constexpr MatrixRun run[] = {matrix_rows<S, 1>, matrix_rows<S, 2>, matrix_rows<S, 3>, matrix_rows<S, 4>};
    matrix_tiles(t, run);
  }
}

void matrix_tile(const MatrixTile& t) {
  constexpr MatrixRun run[] = {matrix_storage<Storage::f32>, matrix_storage<Storage::bf16>,
                               matrix_storage<Storage::int8>, matrix_storage<Storage::int4>};
#if defined(FASTSEQ_HAS_AMX)
  if (amx_takes(t)) return amx_tile(t);
#endif
  run[(int)t.storage](t);
}

// Adding 1.5 * 2^23 rounds to an integer, ties to even, held in the low bits.
inline VecI32 to_nearest(VecF x) {
  const VecF magic = broadcast(12582912.0f);
  return (VecI32)(x + magic) - (VecI32)magic;
}

void to_integers(const float* x, int64_t count, float times, int8_t* q) {
  constexpr int L = kLanes<float>;
  for (int64_t k = 0; k < count; k += L) {
    const int64_t n = count - k < L ? count - k : L;
    VecF v = (n == L ? load(x + k) : load_part(x + k, n)) * broadcast(times);
    v = v == v ? v : broadcast(0.0f);
    v = smallest(broadcast(127.0f), largest(broadcast(-127.0f), v));
    typedef int8_t Bytes __attribute__((vector_size(L)));
    const Bytes bytes = __builtin_convertvector(to_nearest(v), Bytes);
    __builtin_memcpy(q + k, &bytes, (size_t)n);
  }
}

float magnitude(const float* x, int64_t count) {
  constexpr int L = kLanes<float>;
  const VecI32 sign = (VecI32)broadcast(-0.0f);
  VecI32 most = {};  // bits of magnitudes compare as numbers do, and those of NaN lie above infinity
  for (int64_t k = 0; k < count; k += L) {
    const VecI32 bits = (VecI32)(count - k < L ? load_part(x + k, count - k) : load(x + k)) & ~sign;
    most = bits > most ? bits : most;
  }
  int32_t found = 0;
  for (int i = 0; i < L; ++i) found = most[i] > found ? most[i] : found;
  if (found > 0x7f800000) found = 0x7f800000;
  float out;
  __builtin_memcpy(&out, &found, sizeof out);
  return out;
}

void sum_integers(const int8_t* q, int64_t K, int64_t group, int32_t* out) {
  const VecI32 ones = VecI32{} + 0x01010101;
  for (int64_t begin = 0; begin < K; begin += group) {
    const bool last = begin + group >= K;
    const int64_t end = last ? (K + kIntegerPad - 1) / kIntegerPad * kIntegerPad : begin + group;  // zeros lie beyond K
    int64_t k = begin;
    VecI32 sums = {};
    for (; k + kVectorBytes <= end; k += kVectorBytes)
      sums = dot_nibbles(sums, ones, load_words((const uint8_t*)q + k));
    int32_t sum = 0;
    for (int i = 0; i < kLanes<float>; ++i) sum += sums[i];
    for (; k < end; ++k) sum += q[k];
    *out++ = sum;
  }
}

#if defined(FASTSEQ_HAS_AMX)
constexpr int kMatrixTile = 2 * (int)kAmxRows;
#else
constexpr int kMatrixTile = 2 * kMatrixRows;
#endif

constinit const MatrixTable matrix_table = {kMatrixTile, matrix_tile, to_integers, magnitude, sum_integers};

}  // namespace
}  // namespace fastseq::core::FASTSEQ_ISA
