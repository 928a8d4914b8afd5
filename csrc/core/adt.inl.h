// ADT's samples and the step on their distribution. A block of a row goes through all samples while its means and
// spreads lie in the nearest cache; so does its noise, which is made block by block.
namespace fastseq::core::FASTSEQ_ISA {
namespace {

template <class R>
inline Vec<R> load_up_to(const R* p, int64_t count) {
  return count >= kLanes<R> ? load(p) : load_part<R>(p, count);
}
template <class R>
inline void store_up_to(R* p, Vec<R> v, int64_t count) {
  count >= kLanes<R> ? store(p, v) : store_part(p, v, count);
}
template <class R>
inline Vec<R> with_sign(Vec<R> v, Int<R> sign) {
  return (Vec<R>)((Int<R>)v ^ sign);
}
template <class R>
inline Vec<R> where(Int<R> mask, Vec<R> v) {
  return (Vec<R>)((Int<R>)v & mask);
}
template <class R>
inline Vec<R> where(Int<R> mask, Vec<R> v, Vec<R> other) {
  return (Vec<R>)(((Int<R>)v & mask) | ((Int<R>)other & ~mask));
}

// sin and cos of |x| <= pi / 4.
template <class R>
inline void sin_cos(Vec<R> x, Vec<R>* sine, Vec<R>* cosine) {
  constexpr int kTerms = sizeof(R) == sizeof(float) ? 5 : 9;
  const Vec<R> z = x * x;
  Vec<R> s = {}, c = {};
#pragma GCC unroll 16
  for (int i = kTerms; i >= 1; --i) {
    const R sign = i % 2 ? R(-1) : R(1);
    s = fma(s, z, broadcast(sign * inverse_factorial<R>(2 * i + 1)));
    c = fma(c, z, broadcast(sign * inverse_factorial<R>(2 * i)));
  }
  *sine = fma(x * z, s, x);
  *cosine = fma(z, c, broadcast(R(1)));
}

// sqrt(-2 log U) times cos and sin of 2 pi V, with U and V = (2 * (word >> 9) + 1) * 2^-24 (Box and Muller 1958). The
// angle is a number of quarter turns and a rest, both exact.
template <class R>
inline void normal_pair(const uint32_t* u_words, const uint32_t* v_words, R* first, R* second) {
  typedef int32_t Lanes __attribute__((vector_size(kLanes<R> * 4)));
  Lanes u, v;
  __builtin_memcpy(&u, u_words, sizeof u);
  __builtin_memcpy(&v, v_words, sizeof v);
  u = ((u >> 8) & 0xfffffe) + 1;
  v = ((v >> 8) & 0xfffffe) + 1;
  const Lanes quarters = (v + (1 << 21)) >> 22;
  const Vec<R> rest = __builtin_convertvector(v - (quarters << 22), Vec<R>);
  const Vec<R> log_u = log_quotient<R>(__builtin_convertvector(u, Vec<R>), broadcast(R(1 << 24)));
  const Vec<R> radius = root(broadcast(R(-2)) * log_u);
  Vec<R> sine, cosine;
  sin_cos<R>(rest * broadcast(R(1.57079632679489661923 / (1 << 22))), &sine, &cosine);
  constexpr int kTop = 8 * sizeof(R) - 2;  // moves bit 1 to the sign
  const Int<R> q = __builtin_convertvector(quarters, Int<R>), odd = -(q & 1);
  store(first, radius * with_sign<R>(where<R>(odd, sine, cosine), ((q + 1) & 2) << kTop));
  store(second, radius * with_sign<R>(where<R>(odd, cosine, sine), (q & 2) << kTop));
}

// Of one block of a row, [kAdtBlock].
template <class R>
inline void adt_block_noise(const Keys& keys, int64_t block, int64_t sample, int64_t row, int64_t step, R* out) {
  constexpr int kBlocks = 4;
  for (int first = 0; first < kAdtCounters; first += kBlocks * kCounters) {
    Words c[kBlocks];
    FASTSEQ_EACH(i, kBlocks) {
      const uint64_t counter = (uint64_t)(block * kAdtCounters + first + i * kCounters);
      c[i] = {
          {lane_numbers() + counter, VecU64{} + (uint64_t)sample, VecU64{} + (uint64_t)row, VecU64{} + (uint64_t)step}};
    }
    philox_rounds<kBlocks>(c, keys);
    FASTSEQ_EACH(i, kBlocks / 2) {
      VecU32 words[4];
      FASTSEQ_EACH(n, 4) words[n] = low_words(c[2 * i].w[n], c[2 * i + 1].w[n]);
#pragma GCC unroll 2
      for (int at = 0; at < 2 * kCounters; at += kLanes<R>) {
        const auto word = [&](int n) __attribute__((always_inline)) { return (const uint32_t*)&words[n] + at; };
        R* const to = out + first + 2 * i * kCounters + at;
        normal_pair(word(0), word(1), to, to + kAdtCounters);
        normal_pair(word(2), word(3), to + 2 * kAdtCounters, to + 3 * kAdtCounters);
      }
    }
  }
}

// exp(-|x|)
template <class R>
inline Vec<R> exp_of_size(Vec<R> x) {
  Vec<R> e = (Vec<R>)((Int<R>)x | (Int<R>)broadcast(R(-0.0)));
  exp_below<R, 1>(&e);
  return e;
}

// max(x, 0) + log(1 + exp(-|x|)), the logarithm as 2 atanh(e / (2 + e)): as exact for small e.
template <class R>
inline Vec<R> softplus(Vec<R> x) {
  constexpr int kTerms = sizeof(R) == sizeof(float) ? 6 : 15;
  const Vec<R> e = exp_of_size<R>(x), s = e / (e + broadcast(R(2))), z = s * s;
  Vec<R> p = broadcast(R(2.0 / (2 * kTerms + 1)));
#pragma GCC unroll 16
  for (int i = kTerms - 1; i >= 0; --i) p = fma(p, z, broadcast(R(2.0 / (2 * i + 1))));
  return fma(p, s, where<R>(x > 0, x));
}

// tanh(u), and its slope 4 e / (1 + e)^2 with e = exp(-2 |u|), which keeps its digits where 1 - tanh^2 has none.
template <class R>
inline Vec<R> tanh_slope(Vec<R> u, Vec<R>* slope) {
  const Vec<R> one = broadcast(R(1));
  Vec<R> e = to_tanh<R>(u), power;
  exp_minus_one<R, 1>(&e, &power);
  const Vec<R> less_one = cell_fma<R>(power, e, power - one), quotient = one / (broadcast(R(2)) + less_one);
  *slope = broadcast(R(4)) * cell_fma<R>(power, e, power) * quotient * quotient;
  return with_sign<R>(-less_one * quotient, (Int<R>)u & (Int<R>)broadcast(R(-0.0)));
}

// The part of a row that block number i of all rows is.
struct AdtPlace {
  int64_t row, block, first, count;  // first: of the row's numbers
  AdtPlace(int64_t i, int64_t N) {
    const int64_t blocks = (N + kAdtBlock - 1) / kAdtBlock;
    row = i / blocks;
    block = i % blocks;
    first = block * kAdtBlock;
    count = N - first < kAdtBlock ? N - first : (int64_t)kAdtBlock;
  }
};

// What all samples of a block have in common, zeros behind it; a copy, since samples are written to places whose low
// address bits are often those of the tensors here, and a processor lets loads wait for such stores.
template <class R>
struct AdtCommon {
  alignas(kVectorBytes) R x[kAdtBlock], mu[kAdtBlock], spread[kAdtBlock], eps[kAdtBlock];
  template <class Args>
  void load_from(const Args& a, const AdtPlace& p) {
    const int64_t at = p.row * a.N + p.first;
    for (int64_t n = 0; n < kAdtBlock; n += kLanes<R>) {
      const int64_t rest = p.count > n ? p.count - n : 0;
      store(x + n, load_up_to(a.x + at + n, rest));
      store(mu + n, load_up_to(a.mu + at + n, rest));
      store(spread + n, softplus<R>(load_up_to(a.rho + at + n, rest)));
      store(eps + n, load_up_to(a.eps + p.row * a.eps_row + p.first + n, rest));
    }
  }
};

// Blocks [begin, end) of all rows; as the two below.
template <class R>
void adt_noise(const AdtNoise<R>& a, int64_t begin, int64_t end) {
  const Keys keys(a.source.seed);
  R noise[kAdtBlock];
  for (int64_t i = begin; i < end; ++i) {
    const AdtPlace p(i, a.N);
    for (int64_t s = 0; s < a.S; ++s) {
      adt_block_noise(keys, p.block, s, p.row, a.source.step, noise);
      __builtin_memcpy(a.out + (s * a.B + p.row) * a.N + p.first, noise, (size_t)p.count * sizeof(R));
    }
  }
}

template <class R>
void adt_sample(const AdtSample<R>& a, int64_t begin, int64_t end) {
  const Keys keys(a.source.seed);
  alignas(kVectorBytes) R noise[kAdtBlock];
  AdtCommon<R> all;
  for (int64_t i = begin; i < end; ++i) {
    const AdtPlace p(i, a.N);
    all.load_from(a, p);
    for (int64_t s = 0; s < a.S; ++s) {
      adt_block_noise(keys, p.block, s, p.row, a.source.step, noise);
      R* const out = a.out + (s * a.B + p.row) * a.N + p.first;
      for (int64_t n = 0; n < p.count; n += kLanes<R>) {
        Vec<R> u = fma(load(all.spread + n), load(noise + n), load(all.mu + n));
        tanh<R, 1>(&u);
        const Vec<R> moved = fma(load(all.eps + n), u, load(all.x + n));
        store_up_to(out + n, clamp<R>(moved, a.low, a.high), p.count - n);
      }
    }
  }
}

// Adds the gradients through one sample of a block: of mu, and of the spread.
template <class R>
inline void add_gradients(const AdtStep<R>& a, const AdtCommon<R>& all, const R* g, const R* noise, R weight,
                          int64_t count, R* dmu, R* dspread) {
  for (int64_t n = 0; n < count; n += kLanes<R>) {
    const Vec<R> r = load(noise + n), eps = load(all.eps + n);
    Vec<R> slope;
    const Vec<R> t = tanh_slope<R>(fma(load(all.spread + n), r, load(all.mu + n)), &slope);
    const Vec<R> moved = fma(eps, t, load(all.x + n));
    const Int<R> inside = (moved >= broadcast(a.low)) & (moved <= broadcast(a.high));
    const Vec<R> through = where<R>(inside, eps * slope * load_up_to(g + n, count - n));
    const Vec<R> du = fma(where<R>(eps != 0, broadcast(R(-2) * weight)), t, through);
    store(dmu + n, load(dmu + n) + du);
    store(dspread + n, fma(du, r, load(dspread + n)));
  }
}

// Where a step goes: the sign, or what an optimizer without memory makes of a total.
template <class R>
inline Vec<R> direction(Vec<R> t, bool total) {
  const Vec<R> one = broadcast(R(1)), size = (Vec<R>)((Int<R>)t & ~(Int<R>)broadcast(R(-0.0)));
  return total ? t / (size + broadcast(R(1e-8))) : where<R>(t > 0, one) - where<R>(t < 0, one);
}

// From gradients to results, for one vector of one parameter of the two.
template <class R>
inline void finish(const AdtStep<R>& a, int which, int64_t at, int64_t rest, Vec<R> d, Vec<R> value, R* up) {
  const int64_t place = which * a.B * a.N + at;
  if (a.totals) d += load_up_to(a.totals + place, rest);
  if (a.d) store_up_to(a.d + place, d, rest);
  if (up) store_up_to(up + at, fma(broadcast(a.rate), direction<R>(d, a.totals), value), rest);
}

template <class R>
void adt_step(const AdtStep<R>& a, int64_t begin, int64_t end) {
  const Keys keys(a.source.seed);
  alignas(kVectorBytes) R noise[kAdtBlock], dmu[kAdtBlock], dspread[kAdtBlock];
  AdtCommon<R> all;
  for (int64_t i = begin; i < end; ++i) {
    const AdtPlace p(i, a.N);
    const R weight = a.weight[p.row];
    all.load_from(a, p);
    __builtin_memset(dmu, 0, sizeof dmu);
    __builtin_memset(dspread, 0, sizeof dspread);
    for (int64_t s = 0; s < a.S; ++s) {
      adt_block_noise(keys, p.block, s, p.row, a.source.step, noise);
      add_gradients(a, all, a.g + (s * a.B + p.row) * a.N + p.first, noise, weight, p.count, dmu, dspread);
    }
    for (int64_t n = 0; n < p.count; n += kLanes<R>) {
      const int64_t at = p.row * a.N + p.first + n, rest = p.count - n;
      const Vec<R> one = broadcast(R(1)), rho = load_up_to(a.rho + at, rest), e = exp_of_size<R>(rho);
      const Vec<R> sigmoid = where<R>(rho > 0, one, e) / (one + e);
      // sigmoid / softplus goes to 1 where both go to zero
      const Vec<R> of_log = where<R>(rho < -80, one, sigmoid / load(all.spread + n));
      const Vec<R> entropy = where<R>(load(all.eps + n) != 0, broadcast(R(a.S) * weight) * of_log);
      finish(a, 0, at, rest, load(dmu + n), load(all.mu + n), a.mu_up);
      finish(a, 1, at, rest, fma(load(dspread + n), sigmoid, entropy), rho, a.rho_up);
    }
  }
}

}  // namespace
}  // namespace fastseq::core::FASTSEQ_ISA
