// Drives core/lstm_layer.h, which has no numpy door, over layouts, options and odd sizes, for a build with sanitizers.
// Every buffer has exactly its size, scratch begins as NaN, results must be finite, and rebuilt gates must give the
// same gradients as kept ones, bit for bit. Arguments: the number of threads. Prints the number of calls.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "core/isa.h"
#include "core/lstm_layer.h"

namespace {

using namespace fastseq::core;

void run_team(int size, Team::Body body, const void* context) {
  Barrier barrier(size);
  std::vector<std::thread> threads;
  for (int rank = 1; rank < size; ++rank) {
    threads.emplace_back([=, &barrier] { body(context, rank, size, barrier); });
  }
  body(context, 0, size, barrier);
  for (std::thread& thread : threads) thread.join();
}

uint64_t state = 1;
double uniform() {  // in [-1, 1)
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(static_cast<int64_t>(state)) / 9223372036854775808.0;
}

// Exactly `size` elements on the heap, so that the sanitizer sees the first one beyond.
template <class R>
struct Buffer {
  std::unique_ptr<R[]> data;
  size_t size;
  explicit Buffer(size_t n) : data(new R[n]), size(n) {
    for (size_t i = 0; i < n; ++i) data[i] = std::numeric_limits<R>::quiet_NaN();
  }
  static Buffer random(size_t n, double scale) {
    Buffer out(n);
    for (size_t i = 0; i < n; ++i) out.data[i] = static_cast<R>(scale * uniform());
    return out;
  }
  R* get() const { return data.get(); }
  void check(const char* name) const {
    for (size_t i = 0; i < size; ++i) {
      if (std::isfinite(data[i])) continue;
      std::fprintf(stderr, "%s[%zu] is not finite\n", name, i);
      std::exit(1);
    }
  }
  bool operator==(const Buffer& other) const { return std::memcmp(get(), other.get(), size * sizeof(R)) == 0; }
};

template <class R>
struct Scratch {
  explicit Scratch(size_t n) : data(static_cast<R*>(::operator new(n * sizeof(R), std::align_val_t{64}))) {
    std::memset(static_cast<void*>(data), 0xff, n * sizeof(R));
  }
  ~Scratch() { ::operator delete(data, std::align_val_t{64}); }
  R* data;
};

struct Case {
  int64_t T, B, H, I;
  bool project, lengths, packed, every, reverse;  // every: reset, start states, noise and a temperature
};

template <class R>
struct Gradients {
  Buffer<R> dx, dweight_ih, dbias, dweight_hh, dweight_hr, dh0, dc0, dh_start, dc_start;
  std::vector<const Buffer<R>*> all() const {
    return {&dx, &dweight_ih, &dbias, &dweight_hh, &dweight_hr, &dh0, &dc0, &dh_start, &dc_start};
  }
};

template <class R>
void drive(const Case& c, const Team& team) {
  const int64_t P = c.project ? (c.H + 1) / 2 : c.H;
  std::unique_ptr<int64_t[]> lengths(new int64_t[c.B]), sizes(new int64_t[c.T]);
  for (int64_t b = 0; b < c.B; ++b) lengths[b] = c.packed ? c.T * (c.B - b) / c.B : b == 0 ? c.T : (b * 7) % (c.T + 1);
  int64_t N = c.packed ? 0 : c.T * c.B;
  for (int64_t t = 0; t < c.T; ++t) {
    sizes[t] = 0;
    for (int64_t b = 0; b < c.B; ++b) sizes[t] += lengths[b] > t;
    if (c.packed) N += sizes[t];
  }
  std::unique_ptr<bool[]> reset(new bool[N]);
  for (int64_t n = 0; n < N; ++n) reset[n] = uniform() > 0.4;
  const auto x = Buffer<R>::random(N * c.I, 1), weight_ih = Buffer<R>::random(4 * c.H * c.I, 1.0 / c.I);
  const auto bias = Buffer<R>::random(4 * c.H, 1), weight_hh = Buffer<R>::random(4 * c.H * P, 1.0 / P);
  const auto weight_hr = Buffer<R>::random(P * c.H, 1.0 / c.H), h0 = Buffer<R>::random(c.B * P, 1);
  const auto c0 = Buffer<R>::random(c.B * c.H, 1), h_start = Buffer<R>::random(P, 1),
             c_start = Buffer<R>::random(c.H, 1);
  const LstmArgs<R> args{c.T,
                         c.B,
                         N,
                         c.H,
                         P,
                         weight_hh.get(),
                         c.project ? weight_hr.get() : nullptr,
                         h0.get(),
                         c0.get(),
                         c.lengths ? lengths.get() : nullptr,
                         c.packed ? sizes.get() : nullptr,
                         c.every ? reset.get() : nullptr,
                         c.every ? h_start.get() : nullptr,
                         c.every ? c_start.get() : nullptr,
                         c.every ? 0.9 : 1.0,
                         false,
                         c.reverse};
  const LstmNoise noise{c.every, 77, nullptr, 3, 5, 0.5};
  const LayerInput<R> input{c.I, x.get(), weight_ih.get(), c.every ? bias.get() : nullptr};
  Buffer<R> h(N * P), cell(N * c.H), gates(N * 4 * c.H), h_n(c.B * P), c_n(c.B * c.H);
  for (const bool keep : {false, true}) {
    const LstmLayerForward<R> call{
        input, {args, noise, nullptr, h.get(), cell.get(), keep ? gates.get() : nullptr, h_n.get(), c_n.get()}};
    const Scratch<R> scratch(lstm_layer_scratch(call, team.most));
    lstm_layer_forward(call, scratch.data, team);
  }
  for (const auto* v : {&h, &cell, &gates, &h_n, &c_n}) v->check("output");
  const auto dh = Buffer<R>::random(N * P, 1), dc = Buffer<R>::random(N * c.H, 1),
             dc_n = Buffer<R>::random(c.B * c.H, 1);
  std::vector<Gradients<R>> found;
  for (const bool rebuild : {false, true}) {
    Gradients<R> g{Buffer<R>(N * c.I),     Buffer<R>(4 * c.H * c.I),           Buffer<R>(4 * c.H),
                   Buffer<R>(4 * c.H * P), Buffer<R>(c.project ? P * c.H : 0), Buffer<R>(c.B * P),
                   Buffer<R>(c.B * c.H),   Buffer<R>(c.every ? P : 0),         Buffer<R>(c.every ? c.H : 0)};
    const LstmLayerBackward<R> call{
        input,
        noise,
        {args, dh.get(), dc.get(), nullptr, nullptr, dc_n.get(), rebuild ? nullptr : gates.get(), h.get(), cell.get(),
         nullptr, g.dweight_hh.get(), c.project ? g.dweight_hr.get() : nullptr, g.dh0.get(), g.dc0.get(),
         c.every ? g.dh_start.get() : nullptr, c.every ? g.dc_start.get() : nullptr},
        g.dx.get(),
        g.dweight_ih.get(),
        g.dbias.get()};
    const Scratch<R> scratch(lstm_layer_scratch(call, team.most));
    lstm_layer_backward(call, scratch.data, team);
    for (const Buffer<R>* v : g.all()) v->check("gradient");
    found.push_back(std::move(g));
  }
  for (size_t i = 0; i < found[0].all().size(); ++i) {
    if (*found[0].all()[i] == *found[1].all()[i]) continue;
    std::fprintf(stderr, "gradient %zu differs with rebuilt gates\n", i);
    std::exit(1);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (const char* const error = choice().error) return std::fprintf(stderr, "%s\n", error), 1;
  const Team team{argc > 1 ? std::atoi(argv[1]) : 1, run_team};
  constexpr int64_t kSizes[][4] = {{1, 1, 1, 1}, {3, 2, 7, 5}, {2, 13, 8, 33},   {3, 5, 33, 17},   {2, 27, 17, 3},
                                   {0, 3, 4, 2}, {3, 0, 4, 2}, {2, 33, 130, 70}, {2, 19, 390, 400}};
  int calls = 0;
  for (const auto& s : kSizes) {
    for (int bits = 0; bits < 32; ++bits) {
      Case c{s[0], s[1], s[2], s[3], bool(bits & 1), bool(bits & 2), bool(bits & 4), bool(bits & 8), bool(bits & 16)};
      if ((c.lengths && c.packed) || (s[2] > 300 && bits % 9)) continue;
      drive<float>(c, team);
      drive<double>(c, team);
      calls += 2;
    }
  }
  std::printf("%s %d\n", kernels().name, calls);
}
