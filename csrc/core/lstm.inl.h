// The LSTM cell on Vec, forward and backward: one panel of units (two vectors) for each row of a register tile.
namespace fastseq::core::FASTSEQ_ISA {
namespace {

// Where V vectors of units lie in a row; the last of a row that is not Whole is short.
template <class R, bool Whole, int V>
struct Units {
  int64_t at, count;
  Vec<R> get(const R* p, int v) const {
    if constexpr (Whole) return load(p + at + v * kLanes<R>);
    return load_part(p + at, count);
  }
  void put(R* p, int v, Vec<R> value) const {
    if constexpr (Whole) return store(p + at + v * kLanes<R>, value);
    store_part(p + at, value, count);
  }
};

template <int N>
struct Count {};

template <class R>
inline Vec<R> step_function(Vec<R> a) {
  return a > broadcast(R(0)) ? broadcast(R(1)) : broadcast(R(0));
}

template <class R, bool Whole, int V>
inline void cell_forward(const CellForward<R>& s, int64_t row, Units<R, Whole, V> u) {
  const R* pre = s.pre + row * 4 * s.pre_gate + u.at;
  const R* x = s.x_gates[row];
  Vec<R> a[4 * V], *const i = a, *const f = a + V, *const o = a + 2 * V, *const g = a + 3 * V;
  FASTSEQ_EACH(v, V) {
    const R* from = pre + v * kLanes<R>;
    i[v] = load(from) + u.get(x, v);
    f[v] = load(from + s.pre_gate) + u.get(x + s.x_gate, v);
    g[v] = load(from + 2 * s.pre_gate) + u.get(x + 2 * s.x_gate, v);
    o[v] = load(from + 3 * s.pre_gate) + u.get(x + 3 * s.x_gate, v);
    if (s.noise) {
      const R* noise = s.noise + row * 2 * kPanel<R> + u.at + v * kLanes<R>;
      i[v] += load(noise);
      f[v] += load(noise + kPanel<R>);
    }
  }
  Vec<R> hard[2 * V];
  FASTSEQ_EACH(n, 2 * V) {
    hard[n] = step_function<R>(a[n]);
    a[n] *= broadcast(s.inverse_tau);
  }
  sigmoid_and_tanh<R, 3 * V, 4 * V>(a);
  if (s.hard) {
    FASTSEQ_EACH(n, 2 * V) a[n] = hard[n];
  }
  FASTSEQ_EACH(v, V) {
    const Vec<R> c_in = s.c_in[row] ? u.get(s.c_in[row], v) : broadcast(R(0));
    const Vec<R> c = cell_fma<R>(f[v], c_in, i[v] * g[v]);
    u.put(s.c_state[row], v, c);
    if (s.c[0]) u.put(s.c[row], v, c);
    if (s.gates[0]) {
      R* const gates = s.gates[row];
      u.put(gates, v, i[v]);
      u.put(gates + s.H, v, f[v]);
      u.put(gates + 2 * s.H, v, g[v]);
      u.put(gates + 3 * s.H, v, o[v]);
    }
    u.put(s.out[row], v, o[v]);
  }
}

// Apart from the gates, over several rows at once.
template <class R, bool Whole, int V, int Rows>
inline void cell_output(const CellForward<R>& s, int64_t row, Units<R, Whole, V> u) {
  Vec<R> c[Rows * V];
  FASTSEQ_EACH(n, Rows * V) c[n] = u.get(s.c_state[row + n / V], n % V);
  tanh<R, Rows * V>(c);
  FASTSEQ_EACH(n, Rows * V) u.put(s.out[row + n / V], n % V, u.get(s.out[row + n / V], n % V) * c[n]);
}

template <class R, bool Whole, int V>
inline void cell_backward(const CellBackward<R>& s, int64_t row, Units<R, Whole, V> u) {
  const Vec<R> one = broadcast(R(1)), zero = broadcast(R(0));
  const Vec<R> scale = broadcast(s.hard ? R(0) : s.inverse_tau);
  const R* gates = s.gates[row];
  R* const dx = s.dx_gates[row];
  Vec<R> tanh_c[V];
  FASTSEQ_EACH(v, V) tanh_c[v] = u.get(s.c[row], v);
  tanh<R, V>(tanh_c);
  FASTSEQ_EACH(v, V) {
    const Vec<R> i = u.get(gates, v), f = u.get(gates + s.H, v);
    const Vec<R> g = u.get(gates + 2 * s.H, v), o = u.get(gates + 3 * s.H, v);
    const Vec<R> c_in = s.c_in[row] ? u.get(s.c_in[row], v) : zero;
    const Vec<R> dh = load(s.dh + row * kPanel<R> + u.at + v * kLanes<R>);
    Vec<R> dc = u.get(s.dc_state[row], v);
    if (s.dc[0]) dc += u.get(s.dc[row], v);
    dc = fma(dh * o, one - tanh_c[v] * tanh_c[v], dc);
    Vec<R> di = dc * g, df = dc * c_in, dg = dc * i, d_o = dh * tanh_c[v];
    if (s.dgates[0]) {
      const R* upstream = s.dgates[row];
      di += u.get(upstream, v);
      df += u.get(upstream + s.H, v);
      dg += u.get(upstream + 2 * s.H, v);
      d_o += u.get(upstream + 3 * s.H, v);
    }
    u.put(dx, v, di * i * (one - i) * scale);
    u.put(dx + s.H, v, df * f * (one - f) * scale);
    u.put(dx + 2 * s.H, v, dg * (one - g * g));
    u.put(dx + 3 * s.H, v, d_o * o * (one - o));
    u.put(s.dc_state[row], v, dc * f);
    if (s.out[0]) u.put(s.out[row], v, o * tanh_c[v]);
  }
}

// visit(row, units, rows) for one row or, in whole panels, Rows of them at a time.
template <class R, int Rows, class Visit>
inline void each_part(int64_t rows, int64_t units, Visit visit) {
  int64_t row = 0;
  if (units == kPanel<R>) {
    for (; row + Rows <= rows; row += Rows) visit(row, Units<R, true, 2>{0, 0}, Count<Rows>());
    for (; row < rows; ++row) visit(row, Units<R, true, 2>{0, 0}, Count<1>());
  }
  for (; row < rows; ++row) {
    int64_t at = 0;
    for (; at + kLanes<R> <= units; at += kLanes<R>) visit(row, Units<R, true, 1>{at, 0}, Count<1>());
    if (at < units) visit(row, Units<R, false, 1>{at, units - at}, Count<1>());
  }
}

template <class R>
void lstm_cell_forward(const CellForward<R>& s) {
  each_part<R, 1>(s.rows, s.units, [&](int64_t row, auto u, auto) { cell_forward(s, row, u); });
  each_part<R, 3>(s.rows, s.units, [&]<bool W, int V, int N>(int64_t row, Units<R, W, V> u, Count<N>) {
    cell_output<R, W, V, N>(s, row, u);
  });
}

template <class R>
void lstm_cell_backward(const CellBackward<R>& s) {
  each_part<R, 1>(s.rows, s.units, [&](int64_t row, auto u, auto) { cell_backward(s, row, u); });
}

}  // namespace
}  // namespace fastseq::core::FASTSEQ_ISA
