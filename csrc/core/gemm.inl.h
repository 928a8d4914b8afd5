// The register tile and the packing of its operands. A tile is M rows by P panels of two vectors; the rows of A come
// packed as [K][cap], so that one pointer and M immediate offsets reach them.
namespace fastseq::core::FASTSEQ_ISA {
namespace {

template <class R, int M, int P>
void tile_body(const TileArgs<R>& t, int64_t first_panel) {
  constexpr int L = kLanes<R>;
  const R* a = t.a;
  const R* b = t.b + first_panel * t.b_panel;
  R* c = t.c + first_panel * t.c_panel;
  const int64_t cap = t.cap, b_panel = t.b_panel, c_row = t.c_row, c_panel = t.c_panel;
  Vec<R> acc[M][P][2];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) acc[i][p][0] = acc[i][p][1] = broadcast(R(0));
  }
  for (int64_t k = 0; k < t.K; ++k) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const Vec<R> b0 = load(b + p * b_panel), b1 = load(b + p * b_panel + L);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        const Vec<R> x = broadcast(a[i]);
        acc[i][p][0] = fma(x, b0, acc[i][p][0]);
        acc[i][p][1] = fma(x, b1, acc[i][p][1]);
      }
    }
    a += cap;
    b += 2 * L;
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      R* const out = c + i * c_row + p * c_panel;
      const R* const start = t.init == Init::bias ? t.bias + (first_panel + p) * 2 * L : out;
      if (t.init != Init::zero) {
        acc[i][p][0] += load(start);
        acc[i][p][1] += load(start + L);
      }
      store(out, acc[i][p][0]);
      store(out + L, acc[i][p][1]);
    }
  }
}

template <class R, int M>
void tile_rows(const TileArgs<R>& t) {
  constexpr int P = tile_panels(M);
  int64_t p = 0;
  for (; p + P <= t.panels; p += P) tile_body<R, M, P>(t, p);
  if constexpr (P == 4) {
    for (; p + 2 <= t.panels; p += 2) tile_body<R, M, 2>(t, p);
  }
  if constexpr (P > 1) {
    for (; p < t.panels; ++p) tile_body<R, M, 1>(t, p);
  }
}

template <class R, int... M>
struct TileTable {
  static constexpr void (*rows[])(const TileArgs<R>&) = {nullptr, tile_rows<R, M>...};
};

template <class R>
void tile(const TileArgs<R>& t) {
  if constexpr (kTileRows == 3) {
    TileTable<R, 1, 2, 3>::rows[t.rows](t);
  } else if constexpr (kTileRows == 6) {
    TileTable<R, 1, 2, 3, 4, 5, 6>::rows[t.rows](t);
  } else {
    TileTable<R, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12>::rows[t.rows](t);
  }
}

// 32-byte vectors serve the transpositions at every width: 8 x 8 floats or 4 x 4 doubles at a time.
template <class R>
struct Block;
template <>
struct Block<float> {
  typedef float Line __attribute__((vector_size(32)));
  static constexpr int N = 8;
  static inline __attribute__((always_inline)) void transpose(Line* r) {
    Line t[8], u[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = __builtin_shufflevector(r[2 * i], r[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
      t[2 * i + 1] = __builtin_shufflevector(r[2 * i], r[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      u[4 * i] = __builtin_shufflevector(t[4 * i], t[4 * i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      u[4 * i + 1] = __builtin_shufflevector(t[4 * i], t[4 * i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
      u[4 * i + 2] = __builtin_shufflevector(t[4 * i + 1], t[4 * i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
      u[4 * i + 3] = __builtin_shufflevector(t[4 * i + 1], t[4 * i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[i] = __builtin_shufflevector(u[i], u[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
      r[i + 4] = __builtin_shufflevector(u[i], u[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
  }
};
template <>
struct Block<double> {
  typedef double Line __attribute__((vector_size(32)));
  static constexpr int N = 4;
  static inline __attribute__((always_inline)) void transpose(Line* r) {
    const Line a = __builtin_shufflevector(r[0], r[1], 0, 4, 2, 6), b = __builtin_shufflevector(r[0], r[1], 1, 5, 3, 7);
    const Line c = __builtin_shufflevector(r[2], r[3], 0, 4, 2, 6), d = __builtin_shufflevector(r[2], r[3], 1, 5, 3, 7);
    r[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
    r[1] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
    r[2] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
    r[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
  }
};

// Row i. Not a member of Matrix, whose weak copy, compiled for this set, could come to serve the other sets.
template <class R>
const R* line(const Matrix<R>& matrix, int64_t i) {
  return matrix.rows ? matrix.rows[i] : matrix.data + i * matrix.stride;
}

// Lines i .. i + lines of the output, all lengths. `spill`: a row of the output may be written past its end, because
// what it runs into is written later; only the last block of rows then keeps to its own.
template <class R>
void pack_group(const PackArgs<R>& p, int64_t i, int64_t lines, bool spill) {
  using Line = typename Block<R>::Line;
  constexpr int N = Block<R>::N;
  const R* in[N];
  for (int64_t n = 0; n < N; ++n) in[n] = line(p.lines, p.first + i + (n < lines ? n : 0)) + p.offset;
  R* out = p.out + i;
  int64_t j = 0;
  for (; j + N <= p.length; j += N, out += N * p.width) {
    Line r[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) __builtin_memcpy(&r[n], in[n] + j, sizeof(Line));
    Block<R>::transpose(r);
    if (lines == N || (spill && j + 2 * N <= p.length)) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) __builtin_memcpy(out + n * p.width, &r[n], sizeof(Line));
    } else {
      for (int n = 0; n < N; ++n) {
        for (int64_t m = 0; m < lines; ++m) out[n * p.width + m] = r[n][m];
      }
    }
  }
  for (; j < p.length; ++j, out += p.width) {
    for (int64_t m = 0; m < lines; ++m) out[m] = in[m][j];
  }
}

template <class R>
void pack_rows(const PackArgs<R>& p) {
  constexpr int N = Block<R>::N;
  if (p.width == 1) {
    if (p.count) __builtin_memcpy(p.out, line(p.lines, p.first) + p.offset, (size_t)p.length * sizeof(R));
    return;
  }
  int64_t i = 0;
  for (; i + N <= p.count; i += N) pack_group(p, i, N, false);
  if (i < p.count && i > 0) {
    pack_group(p, p.count - N, N, false);  // again a few lines of the group before, rather than a short group
  } else if (i < p.count) {
    pack_group(p, 0, p.count, p.count == p.width);
  }
  if (p.pad && p.count < p.width) {
    for (int64_t j = 0; j < p.length; ++j) {
      for (int64_t m = p.count; m < p.width; ++m) p.out[j * p.width + m] = R(0);
    }
  }
}

// Bytes count times sizeof(R), between one and two of the given chunk.
template <class R, int Bytes>
void copy_lines(const PackArgs<R>& p) {
  typedef char Chunk __attribute__((vector_size(Bytes)));
  const int64_t second = p.count - Bytes / (int64_t)sizeof(R);
  for (int64_t j = 0; j < p.length; ++j) {
    const R* const in = line(p.lines, p.first + j) + p.offset;
    R* const out = p.out + j * p.width;
    Chunk a, b;
    __builtin_memcpy(&a, in, Bytes);
    __builtin_memcpy(&b, in + second, Bytes);
    __builtin_memcpy(out, &a, Bytes);
    __builtin_memcpy(out + second, &b, Bytes);
  }
}

template <class R>
void pack_columns(const PackArgs<R>& p) {
  const int64_t bytes = p.count * (int64_t)sizeof(R);
  if (bytes >= 64 && bytes <= 128) {
    copy_lines<R, 64>(p);
  } else if (bytes >= 32 && bytes < 64) {
    copy_lines<R, 32>(p);
  } else if (bytes >= 16 && bytes < 32) {
    copy_lines<R, 16>(p);
  } else {
    for (int64_t j = 0; j < p.length; ++j) {
      const R* const in = line(p.lines, p.first + j) + p.offset;
      for (int64_t i = 0; i < p.count; ++i) p.out[j * p.width + i] = in[i];
    }
  }
  if (p.pad && p.count < p.width) {
    for (int64_t j = 0; j < p.length; ++j) {
      for (int64_t i = p.count; i < p.width; ++i) p.out[j * p.width + i] = R(0);
    }
  }
}

}  // namespace
}  // namespace fastseq::core::FASTSEQ_ISA
