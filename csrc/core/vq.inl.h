// Vector quantization. The scores: one tile has lanes of rows, and so keeps the best score and its code per lane; the
// other has lanes of codes, for few rows.
namespace fastseq::core::FASTSEQ_ISA {
namespace {

// The best score so far of each lane of two vectors, and its code.
template <class R>
struct VqBest {
  Vec<R> score[2];
  Int<R> code[2];
};

// M codes from number `first` on against a panel of rows. D is the number of dimensions where that is known, else 0.
template <class R, int M, int D>
inline __attribute__((always_inline)) void vq_meet(const VqTile<R>& t, int64_t k, const R* x, VqBest<R>& best) {
  constexpr int L = kLanes<R>;
  const R* code[M];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) code[i] = t.code + (k + i) * t.stride;
  Vec<R> acc[M][2];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) acc[i][0] = acc[i][1] = broadcast(t.start[k + i]);
  if constexpr (D == 0) asm volatile("" : "+m"(best));  // in memory meanwhile: the registers are all taken
  for (int64_t d = 0, end = D ? D : t.D; d < end; ++d, x += 2 * L) {
    const Vec<R> x0 = load(x), x1 = load(x + L);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const Vec<R> c = broadcast(code[i][d]);
      acc[i][0] = fused(c, x0, acc[i][0]);
      acc[i][1] = fused(c, x1, acc[i][1]);
    }
  }
  Int<R> number = Int<R>{} + (typename Simd<R>::Scalar)(t.first + k);
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const Int<R> less = acc[i][j] < best.score[j];
      best.score[j] = less ? acc[i][j] : best.score[j];
      best.code[j] = less ? number : best.code[j];
    }
    number += 1;
  }
}

template <class R, int D>
void vq_tile_body(const VqTile<R>& t) {
  // where all D steps are written out, more codes would not stay in registers
  constexpr int L = kLanes<R>, M = D ? kTileRows * 2 / 3 : kTileRows;
  for (int64_t p = 0; p < t.panels; ++p) {
    R *const score = t.best + p * 2 * L, *const code = t.index + p * 2 * L;
    const R* const x = t.x + p * 2 * L * t.D;
    VqBest<R> best{{load(score), load(score + L)}, {load_int<R>(code), load_int<R>(code + L)}};
    int64_t k = 0;
    for (; k + M <= t.codes; k += M) vq_meet<R, M, D>(t, k, x, best);
    for (; k < t.codes; ++k) vq_meet<R, 1, D>(t, k, x, best);
    store(score, best.score[0]);
    store(score + L, best.score[1]);
    store_int<R>(code, best.code[0]);
    store_int<R>(code + L, best.code[1]);
  }
}

template <class R>
void vq_tile(const VqTile<R>& t) {
  t.D == 8 ? vq_tile_body<R, 8>(t) : t.D == 16 ? vq_tile_body<R, 16>(t) : vq_tile_body<R, 0>(t);
}

// Rows negated in place, one lane each; lanes with a number that is not finite become zeros. Returns a bit per lane.
template <class R>
uint32_t vq_negate(R* panel, int64_t D) {
  constexpr int L = kLanes<R>;
  uint32_t strange = 0;
  for (int j = 0; j < 2; ++j) {
    Vec<R> sum = {};
    for (int64_t d = 0; d < D; ++d) {
      R* const p = panel + d * 2 * L + j * L;
      const Vec<R> v = load(p);
      sum += v * R(0);
      store(p, -v);
    }
    for (int l = 0; l < L; ++l) {
      if (sum[l] == R(0)) continue;
      strange |= 1u << (j * L + l);
      for (int64_t d = 0; d < D; ++d) panel[d * 2 * L + j * L + l] = R(0);
    }
  }
  return strange;
}

// As many numbers of R as a vector has doubles, made doubles.
inline VecD widen(const float* p) {
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
  Half v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, VecD);
}
inline VecD widen(const double* p) { return load(p); }

// Start of the scores of the codes of a panel, [panel_width].
template <class R>
void vq_start(const R* panel, int64_t D, bool dot, R* start) {
  constexpr int W = 2 * kLanes<R>, L = kLanes<double>;
  VecD sum[W / L] = {};
  for (int64_t d = 0; d < D; ++d) {
#pragma GCC unroll 4
    for (int j = 0; j < W / L; ++j) {
      const VecD c = widen(panel + d * W + j * L);
      sum[j] += c * c;
    }
  }
  for (int i = 0; i < W; ++i) {
    const R half = (R)(0.5 * sum[i / L][i % L]);
    start[i] = !(half < (R)INFINITY) ? (R)INFINITY : dot ? R(0) : half;
  }
}

template <class R, int M, int P>
void vq_scores_body(const VqScores<R>& t, int64_t first) {
  constexpr int L = kLanes<R>;
  const R* x[M];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) x[i] = t.x[i];
  const R* code = t.code + first * t.D * 2 * L;
  const int64_t panel = t.D * 2 * L;
  Vec<R> acc[M][P][2];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      acc[i][p][0] = load(t.start + (first + p) * 2 * L);
      acc[i][p][1] = load(t.start + (first + p) * 2 * L + L);
    }
  }
  for (int64_t d = 0; d < t.D; ++d, code += 2 * L) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const Vec<R> c0 = load(code + p * panel), c1 = load(code + p * panel + L);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        const Vec<R> v = broadcast(-x[i][d]);
        acc[i][p][0] = fused(v, c0, acc[i][p][0]);
        acc[i][p][1] = fused(v, c1, acc[i][p][1]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      R* const out = t.scores + (i * t.panels + first + p) * 2 * L;
      store(out, acc[i][p][0]);
      store(out + L, acc[i][p][1]);
    }
  }
}

template <class R, int M>
void vq_scores_rows(const VqScores<R>& t) {
  constexpr int P = tile_panels(M);
  int64_t p = 0;
  for (; p + P <= t.panels; p += P) vq_scores_body<R, M, P>(t, p);
  if constexpr (P > 1) {
    for (; p < t.panels; ++p) vq_scores_body<R, M, 1>(t, p);
  }
}

template <class R, int... M>
struct VqTable {
  static constexpr void (*scores[])(const VqScores<R>&) = {nullptr, vq_scores_rows<R, M>...};
};
template <class R, int Rows>
struct VqTableOf;
template <class R>
struct VqTableOf<R, 3> : VqTable<R, 1, 2, 3> {};
template <class R>
struct VqTableOf<R, 6> : VqTable<R, 1, 2, 3, 4, 5, 6> {};
template <class R>
struct VqTableOf<R, 12> : VqTable<R, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12> {};

template <class R>
void vq_scores(const VqScores<R>& t) {
  VqTableOf<R, kTileRows>::scores[t.rows](t);
}

constexpr int kSums = 16;  // partial sums over D, whatever the width of a vector

template <class R>
R vq_total(R* sum) {
  for (int width = kSums / 2; width; width /= 2) {
    for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
  }
  return sum[0];
}

// Sum over d of f(d), in a fixed order.
template <class R, class F>
inline __attribute__((always_inline)) R vq_reduce(int64_t D, F f) {
  R sum[kSums] = {};
  int64_t d = 0;
  for (; d + kSums <= D; d += kSums) {
    for (int i = 0; i < kSums; ++i) sum[i] += f(d + i);
  }
  for (int i = 0; d < D; ++d, ++i) sum[i] += f(d);
  return vq_total(sum);
}

// The squared distance of row and code; copies the code where `copy` is given.
template <class R>
R vq_distance(const R* x, const R* c, int64_t D, R* copy) {
  if (copy) __builtin_memcpy(copy, c, (size_t)D * sizeof(R));
  return vq_reduce<R>(D, [=](int64_t d) { return (x[d] - c[d]) * (x[d] - c[d]); });
}

// out[0 .. width) += the share of one row, from dimension d on, in the sum of its code.
template <class R>
void vq_add(const VqSums<R>& a, int64_t row, int64_t first, int64_t width, R* __restrict out) {
  const int64_t at = row * a.D + first;
  const R weight = a.weight ? a.scale * a.weight[row] : a.scale;
  if (a.x && a.minus) {
    const R *x = a.x + at, *minus = a.minus + at;
    for (int64_t d = 0; d < width; ++d) out[d] += weight * (x[d] - minus[d]);
  } else if (a.x) {
    const R* const x = a.x + at;
    for (int64_t d = 0; d < width; ++d) out[d] += weight * x[d];
  }
  if (a.plus) {
    const R* const plus = a.plus + at;
    for (int64_t d = 0; d < width; ++d) out[d] += plus[d];
  }
}

// The sum of `count` rows, `first` + rows[i]. Blocks after the first are summed beside it, a slice of D at a time.
template <class R>
void vq_sum(const VqSums<R>& a, int64_t first, const int64_t* rows, int64_t count, R* out) {
  for (int64_t d = 0; d < a.D; ++d) out[d] = R(0);
  for (int64_t i = 0; i < count && i < kSumBlock; ++i) vq_add(a, first + rows[i], 0, a.D, out);
  constexpr int64_t kSlice = 256;
  for (int64_t i = kSumBlock; i < count; i += kSumBlock) {
    const int64_t end = i + kSumBlock < count ? i + kSumBlock : count;
    for (int64_t d = 0; d < a.D; d += kSlice) {
      R block[kSlice] = {};
      const int64_t width = a.D - d < kSlice ? a.D - d : kSlice;
      for (int64_t j = i; j < end; ++j) vq_add(a, first + rows[j], d, width, block);
      for (int64_t e = 0; e < width; ++e) out[d + e] += block[e];
    }
  }
}

template <class R>
void vq_turn(const VqRows<R>& a, int64_t row) {
  constexpr R kLeast = R(1e-6);  // least length that is divided by, as in the reference
  const int64_t D = a.D;
  const R *x = a.x + row * D, *c = a.codes + row * D, *g = a.dquantized + row * D;
  const auto longer = [](R v) { return v < kLeast ? kLeast : v; };
  const R x_norm = longer((R)__builtin_sqrt(vq_reduce<R>(D, [=](int64_t d) { return x[d] * x[d]; })));
  const R c_length = (R)__builtin_sqrt(vq_reduce<R>(D, [=](int64_t d) { return c[d] * c[d]; }));
  const R p = 1 / x_norm, q = 1 / longer(c_length);
  const R gx = vq_reduce<R>(D, [=](int64_t d) { return g[d] * x[d]; }) * p;
  const R gc = vq_reduce<R>(D, [=](int64_t d) { return g[d] * c[d]; }) * q;
  const R between = longer((R)__builtin_sqrt(vq_reduce<R>(D, [=](int64_t d) {
    const R w = x[d] * p + c[d] * q;
    return w * w;
  })));
  const R scale = c_length * p, w = 2 * (gx + gc) / (between * between);
  R* const dx = a.dx + row * D;
  for (int64_t d = 0; d < D; ++d) dx[d] = scale * (g[d] - w * (x[d] * p + c[d] * q) + 2 * gc * (x[d] * p));
}

template <class R>
void vq_rows(const VqRows<R>& a, int64_t begin, int64_t end) {
  const int64_t D = a.D;
  for (int64_t row = begin; row < end; ++row) {
    R* const dx = a.dx + row * D;
    if (a.index[row] < 0 || !a.dquantized) {
      for (int64_t d = 0; d < D; ++d) dx[d] = R(0);
    } else if (a.rotation) {
      vq_turn(a, row);
    } else {
      __builtin_memcpy(dx, a.dquantized + row * D, (size_t)D * sizeof(R));
    }
    if (a.index[row] < 0 || !a.dcommitment) continue;
    const R *x = a.x + row * D, *c = a.codes + row * D, weight = 2 * a.dcommitment[row];
    for (int64_t d = 0; d < D; ++d) dx[d] += weight * (x[d] - c[d]);
  }
}

}  // namespace
}  // namespace fastseq::core::FASTSEQ_ISA
