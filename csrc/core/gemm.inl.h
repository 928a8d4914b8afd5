// The register tile and the packing of its operands. A tile is M rows by P panels of two vectors; the rows of A are
// reached through pointers, so that it is for the caller to decide whether they are copied.
namespace fastseq::core::FASTSEQ_ISA {
namespace {

template <class R, int M, int P>
void tile_body(const TileArgs<R>& t, int64_t first_panel) {
  constexpr int L = kLanes<R>;
  const R* a[M];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) a[i] = t.a[i];
  const R* b = t.b + first_panel * t.b_panel;
  R* c = t.c + first_panel * t.c_panel;
  const int64_t step = t.a_step, b_panel = t.b_panel, c_row = t.c_row, c_panel = t.c_panel;
  Vec<R> acc[M][P][2];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    __builtin_prefetch(c + i * c_row, 1);  // written last, from far away
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) acc[i][p][0] = acc[i][p][1] = broadcast(R(0));
  }
  for (int64_t k = 0, at = 0; k < t.K; ++k, at += step) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const Vec<R> b0 = load(b + p * b_panel), b1 = load(b + p * b_panel + L);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        const Vec<R> x = broadcast(a[i][at]);
        acc[i][p][0] = fma(x, b0, acc[i][p][0]);
        acc[i][p][1] = fma(x, b1, acc[i][p][1]);
      }
    }
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

// Columns i .. i + lines of one panel.
template <class R>
void pack_group(const PackArgs<R>& p, int64_t i, int64_t lines) {
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
    if (lines == N) {
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
void pad(R* out, int64_t from, int64_t width, int64_t length) {
  for (int64_t j = 0; j < length && from < width; ++j, out += width) {
    for (int64_t i = from; i < width; ++i) out[i] = R(0);
  }
}

template <class R>
void pack_rows(const PackArgs<R>& p) {
  constexpr int N = Block<R>::N;
  PackArgs<R> panel = p;
  for (int64_t left = p.count; left > 0; left -= p.width, panel.first += p.width, panel.out += p.width * p.length) {
    panel.count = left < p.width ? left : p.width;
    int64_t i = 0;
    for (; i + N <= panel.count; i += N) pack_group(panel, i, N);
    if (i < panel.count && i > 0) {
      pack_group(panel, panel.count - N, N);  // again a few columns of the group before, rather than a short group
    } else if (i < panel.count) {
      pack_group(panel, 0, panel.count);
    }
    pad(panel.out, panel.count, p.width, p.length);
  }
}

constexpr int64_t kTogether = 8;  // panels written side by side, so that a line's pages are visited once for all

// `panels` whole panels whose rows have between one and two times the given number of bytes.
template <class R, int Bytes>
void copy_panels(const PackArgs<R>& p, int64_t offset, int64_t panels, R* out) {
  typedef char Chunk __attribute__((vector_size(Bytes)));
  const int64_t second = p.width - Bytes / (int64_t)sizeof(R), size = p.width * p.length;
  for (int64_t j = 0; j < p.length; ++j, out += p.width) {
    const R* in = line(p.lines, p.first + j) + offset;
    R* to = out;
    for (int64_t n = 0; n < panels; ++n, in += p.width, to += size) {
      Chunk a, b;
      __builtin_memcpy(&a, in, Bytes);
      __builtin_memcpy(&b, in + second, Bytes);
      __builtin_memcpy(to, &a, Bytes);
      __builtin_memcpy(to + second, &b, Bytes);
    }
  }
}

template <class R>
void pack_columns(const PackArgs<R>& p) {
  const int64_t bytes = p.width * (int64_t)sizeof(R), whole = bytes >= 16 && bytes <= 128 ? p.count / p.width : 0;
  const int64_t size = p.width * p.length;
  for (int64_t n = 0; n < whole; n += kTogether) {
    const int64_t panels = whole - n < kTogether ? whole - n : kTogether, offset = p.offset + n * p.width;
    if (bytes >= 64) {
      copy_panels<R, 64>(p, offset, panels, p.out + n * size);
    } else if (bytes >= 32) {
      copy_panels<R, 32>(p, offset, panels, p.out + n * size);
    } else {
      copy_panels<R, 16>(p, offset, panels, p.out + n * size);
    }
  }
  for (int64_t at = whole * p.width; at < p.count; at += p.width) {
    R* const out = p.out + at * p.length;
    const int64_t columns = p.count - at < p.width ? p.count - at : p.width;
    for (int64_t j = 0; j < p.length; ++j) {
      const R* const in = line(p.lines, p.first + j) + p.offset + at;
      for (int64_t i = 0; i < columns; ++i) out[j * p.width + i] = in[i];
    }
    pad(out, columns, p.width, p.length);
  }
}

}  // namespace
}  // namespace fastseq::core::FASTSEQ_ISA
