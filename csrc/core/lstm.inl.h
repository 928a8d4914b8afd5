// The LSTM cell on Vec, forward and backward: one panel of units (two vectors) for each row of a register tile.
namespace fastseq::core::FASTSEQ_ISA {
namespace {

// Loads and stores of one vector of units, whole or the last part of a row.
template <class R, bool Whole>
struct Units {
  int64_t at, count;
  Vec<R> get(const R* p) const {
    if constexpr (Whole) return load(p + at);
    return load_part(p + at, count);
  }
  void put(R* p, Vec<R> v) const {
    if constexpr (Whole) return store(p + at, v);
    store_part(p + at, v, count);
  }
};

template <class R>
inline Vec<R> step_function(Vec<R> a) {
  return a > broadcast(R(0)) ? broadcast(R(1)) : broadcast(R(0));
}

template <class R, bool Whole>
inline void cell_forward(const CellForward<R>& s, int64_t row, Units<R, Whole> u) {
  const R* pre = s.pre + row * 4 * kPanel<R> + u.at;
  const R* x = s.x_gates[row];
  Vec<R> i = load(pre) + u.get(x), f = load(pre + kPanel<R>) + u.get(x + s.H);
  const Vec<R> g = tanh<R>(load(pre + 2 * kPanel<R>) + u.get(x + 2 * s.H));
  const Vec<R> o = sigmoid<R>(load(pre + 3 * kPanel<R>) + u.get(x + 3 * s.H));
  if (s.noise) {
    const R* noise = s.noise + row * 2 * kPanel<R> + u.at;
    i += load(noise);
    f += load(noise + kPanel<R>);
  }
  const Vec<R> scale = broadcast(s.inverse_tau);
  i = s.hard ? step_function<R>(i) : sigmoid<R>(i * scale);
  f = s.hard ? step_function<R>(f) : sigmoid<R>(f * scale);
  const Vec<R> c_in = s.c_in[row] ? u.get(s.c_in[row]) : broadcast(R(0));
  const Vec<R> c = fma(f, c_in, i * g);
  u.put(s.c_state[row], c);
  if (s.c[0]) u.put(s.c[row], c);
  if (s.gates[0]) {
    R* gates = s.gates[row];
    u.put(gates, i);
    u.put(gates + s.H, f);
    u.put(gates + 2 * s.H, g);
    u.put(gates + 3 * s.H, o);
  }
  store(s.out + row * kPanel<R> + u.at, o);
}

// Apart from the gates, and over all rows at once: tanh waits for c, and a processor looks ahead some 300 instructions,
// little more than the gates of one vector.
template <class R, bool Whole>
inline void cell_output(const CellForward<R>& s, int64_t row, Units<R, Whole> u) {
  R* const out = s.out + row * kPanel<R> + u.at;
  store(out, load(out) * tanh<R>(u.get(s.c_state[row])));
}

template <class R, bool Whole>
inline void cell_backward(const CellBackward<R>& s, int64_t row, Units<R, Whole> u) {
  const Vec<R> one = broadcast(R(1)), zero = broadcast(R(0));
  const R* gates = s.gates[row];
  const Vec<R> i = u.get(gates), f = u.get(gates + s.H), g = u.get(gates + 2 * s.H), o = u.get(gates + 3 * s.H);
  const Vec<R> c_in = s.c_in[row] ? u.get(s.c_in[row]) : zero;
  const Vec<R> tanh_c = tanh<R>(u.get(s.c[row])), dh = load(s.dh + row * kPanel<R> + u.at);
  Vec<R> dc = u.get(s.dc_state[row]);
  if (s.dc[0]) dc += u.get(s.dc[row]);
  dc = fma(dh * o, one - tanh_c * tanh_c, dc);
  Vec<R> di = dc * g, df = dc * c_in, dg = dc * i, d_o = dh * tanh_c;
  if (s.dgates[0]) {
    const R* upstream = s.dgates[row];
    di += u.get(upstream);
    df += u.get(upstream + s.H);
    dg += u.get(upstream + 2 * s.H);
    d_o += u.get(upstream + 3 * s.H);
  }
  const Vec<R> scale = broadcast(s.hard ? R(0) : s.inverse_tau);
  R* dx = s.dx_gates[row];
  u.put(dx, di * i * (one - i) * scale);
  u.put(dx + s.H, df * f * (one - f) * scale);
  u.put(dx + 2 * s.H, dg * (one - g * g));
  u.put(dx + 3 * s.H, d_o * o * (one - o));
  u.put(s.dc_state[row], dc * f);
  if (s.out) store(s.out + row * kPanel<R> + u.at, o * tanh_c);
}

template <class R, class Visit>
inline void each_vector(int64_t rows, int64_t units, Visit visit) {
  for (int64_t row = 0; row < rows; ++row) {
    int64_t at = 0;
    for (; at + kLanes<R> <= units; at += kLanes<R>) visit(row, Units<R, true>{at, kLanes<R>});
    if (at < units) visit(row, Units<R, false>{at, units - at});
  }
}

template <class R>
void lstm_cell_forward(const CellForward<R>& s) {
  each_vector<R>(s.rows, s.units, [&](int64_t row, auto u) { cell_forward(s, row, u); });
  each_vector<R>(s.rows, s.units, [&](int64_t row, auto u) { cell_output(s, row, u); });
}

template <class R>
void lstm_cell_backward(const CellBackward<R>& s) {
  each_vector<R>(s.rows, s.units, [&](int64_t row, auto u) { cell_backward(s, row, u); });
}

}  // namespace
}  // namespace fastseq::core::FASTSEQ_ISA
