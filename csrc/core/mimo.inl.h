// The sum of a few rows that lie anywhere.
namespace fastseq::core::FASTSEQ_ISA {
namespace {

// V vectors from column `from` on.
template <class R, int V>
void add_vectors(const RowSum<R>& s, int64_t from) {
  constexpr int L = kLanes<R>;
  Vec<R> sum[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) sum[v] = s.start ? load(s.start + from + v * L) : broadcast(R(0));
  for (int64_t i = 0; i < s.count; ++i) {
    const R* const row = s.data + s.at[i] + from;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[v] += load(row + v * L);
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store(s.out + from + v * L, sum[v]);
}

template <class R>
void add_rows(const RowSum<R>& s) {
  constexpr int L = kLanes<R>;
  int64_t c = 0;
  for (; c + 4 * L <= s.columns; c += 4 * L) add_vectors<R, 4>(s, c);
  for (; c + L <= s.columns; c += L) add_vectors<R, 1>(s, c);
  if (c == s.columns) return;
  const int64_t rest = s.columns - c;
  Vec<R> sum = s.start ? load_part(s.start + c, rest) : broadcast(R(0));
  for (int64_t i = 0; i < s.count; ++i) sum += load_part(s.data + s.at[i] + c, rest);
  store_part(s.out + c, sum, rest);
}

}  // namespace
}  // namespace fastseq::core::FASTSEQ_ISA
