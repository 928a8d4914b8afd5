// Blocks of rows, drawn by the threads, meet all codes as integers; what that leaves open is scored in float32. Where
// that is much, as for rows that are about as near to many codes, the screen costs more than it saves: then, unless it
// was asked for, most blocks go the way of vq_nearest.cpp, and only now and then one tries again.
#include "core/vq_screen.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/isa.h"
#include "core/vq_results.h"
#include "core/vq_rows.h"

namespace fastseq::core {
namespace {

constexpr int64_t kMostPanels = 4;           // of rows in a block
constexpr int64_t kLanes = 8;                // numbers of a row: s, own, least, at, bound[4]
constexpr int64_t kLowestBytes = 256 << 10;  // of the second cache for the lowest scores of a block
constexpr int64_t kScreenBytes = 8 << 10;    // of the nearest cache for codes that a block meets together
// From which sizes on it was the faster way, on Zen 3.
constexpr int64_t kLeastD = 32, kLeastN = 1024;
// A panel of codes scored for one row takes about 2.5 times its share of a lookup without the screen, which itself
// takes about half of that lookup (Zen 3): it stops to pay when more than this share of the panels stays open.
constexpr double kMostOpen = 0.2;
constexpr int64_t kTryAgain = 32;  // blocks
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Plan {
  int64_t width, stride, code_panels, padded, row_panels, together;
  Plan(const VqNearest<float>& a, const Table<float>& table) {
    width = table.panel_width;
    stride = (a.shape.D + 3) / 4 * 4;
    code_panels = (a.shape.K + width - 1) / width;
    padded = code_panels * width;
    row_panels = std::clamp<int64_t>(kLowestBytes / (padded * static_cast<int64_t>(sizeof(float))), 1, kMostPanels);
    together = std::clamp<int64_t>(kScreenBytes / (width * stride), 1, code_panels);
  }
};

struct Scratch {
  // of one codebook
  int8_t* p;
  float *t, *h, *exact, *start, *mean, *bound;
  int32_t* zero;
  // of all threads
  float* partial;  // [most, D + 1]
  int64_t *rows, *valid;
  // of each thread
  float* moved;
  uint8_t* q;
  float *lowest, *lanes;
  int32_t* places;
  char* lanes_of_rows;
  int64_t* opened;
  int64_t total;

  Scratch(const VqNearest<float>& a, const Plan& plan, int most, int rank, char* base) {
    const VqShape<float>& s = a.shape;
    int64_t at = 0;
    const auto take = [&](int64_t size) {
      char* const place = base ? base + at : nullptr;
      at += size;
      return place;
    };
    const auto floats = [&](int64_t count) { return reinterpret_cast<float*>(take(bytes<float>(count))); };
    p = reinterpret_cast<int8_t*>(take(bytes<int8_t>(plan.padded * plan.stride)));
    t = floats(plan.padded);
    h = floats(plan.padded);
    exact = floats(plan.padded * s.D);
    start = floats(plan.padded);
    mean = floats(round_up(s.D));
    zero = reinterpret_cast<int32_t*>(floats(plan.padded));
    partial = floats(most * (s.D + 1));
    bound = floats(plan.code_panels * 4);
    rows = reinterpret_cast<int64_t*>(take(s.mask ? bytes<int64_t>(s.G * s.N) : 0));
    valid = reinterpret_cast<int64_t*>(take(bytes<int64_t>(s.G)));
    opened = reinterpret_cast<int64_t*>(take(bytes<int64_t>(2 * most)));
    for (int thread = 0; thread < most; ++thread) {
      const auto own = [&](auto*& pointer, int64_t size) {
        char* const place = take(size);
        if (thread == rank) pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(place);
      };
      own(moved, bytes<float>(round_up(s.D)));
      own(q, bytes<uint8_t>(plan.width * plan.stride) * plan.row_panels);
      own(lowest, bytes<float>(plan.padded * plan.width) * plan.row_panels);
      own(lanes, bytes<float>(kLanes * plan.width) * plan.row_panels);
      own(places, bytes<int32_t>(plan.padded * plan.width));
      own(lanes_of_rows, RowBlock<float>::memory(kernels().f32, s.D));
    }
    total = at;
  }
};

struct Call {
  const VqNearest<float>* args;
  char* scratch;
  int most;
  int64_t* opened;
};

class Screened {
 public:
  Screened(const Call& call, int rank, int size)
      : a(*call.args),
        s(a.shape),
        table(kernels().f32),
        screen(*kernels().vq_screen),
        plan(a, table),
        scratch(a, plan, call.most, rank, call.scratch),
        rank(rank),
        size(size) {
    codes = {s.K,       s.D,          plan.stride,   plan.code_panels, s.dot,        scratch.p, scratch.t,
             scratch.h, scratch.zero, scratch.exact, scratch.start,    scratch.mean, 0,         scratch.bound};
    scratch.opened[2 * rank] = scratch.opened[2 * rank + 1] = 0;
  }

  int64_t rows(int64_t g) const { return s.mask ? scratch.valid[g] : s.N; }
  int64_t row(int64_t g, int64_t i) const { return s.mask ? scratch.rows[g * s.N + i] : i; }

  // Mean of the codes that are finite: any mean would do, if it is the same for all threads.
  void mean(int64_t g, Barrier& barrier) {
    const int64_t D = s.D;
    float* const own = scratch.partial + rank * (D + 1);
    std::fill_n(own, D + 1, 0.0f);
    const Range mine = share(s.K, rank, size);
    for (int64_t k = mine.begin; k < mine.end; ++k) {
      const float* const c = s.codebook + (g * s.K + k) * D;
      if (!(table.vq_distance(c, c, D, nullptr) == 0.0f)) continue;  // inf - inf and NaN are NaN
      for (int64_t d = 0; d < D; ++d) own[d] += c[d];
      own[D] += 1;
    }
    barrier.wait();
    if (rank == 0) {
      float count = 0;
      double square = 0;
      for (int t = 0; t < size; ++t) count += scratch.partial[t * (D + 1) + D];
      std::fill_n(scratch.mean, round_up(D), 0.0f);
      for (int64_t d = 0; d < D; ++d) {
        float sum = 0;
        for (int t = 0; t < size; ++t) sum += scratch.partial[t * (D + 1) + d];
        scratch.mean[d] = count > 0 && std::abs(sum) < 1e18f ? sum / count : 0.0f;
        square += double(scratch.mean[d]) * scratch.mean[d];
      }
      scratch.partial[0] = static_cast<float>(square);
    }
    barrier.wait();
    codes.mean_square = scratch.partial[0];
  }

  void prepare(int64_t g, Barrier& barrier) {
    mean(g, barrier);
    const Range mine = share(plan.code_panels, rank, size);
    VqScreenPrepare part{s.codebook + g * s.K * s.D, &codes, mine.begin, mine.end, scratch.moved};
    screen.prepare(part);
    barrier.wait();
  }

  // One block, whichever way has been the better one lately.
  void either(int64_t g, int64_t first) {
    const bool asked = a.screen == core::Screen::always;
    if (!asked && !pays && blocks_without < kTryAgain) {
      ++blocks_without;
      return unscreened(g, first);
    }
    const int64_t before = scratch.opened[2 * rank], count = std::min(rows(g) - first, plan.row_panels * plan.width);
    block(g, first);
    pays = static_cast<double>(scratch.opened[2 * rank] - before) <= kMostOpen * count * plan.code_panels;
    blocks_without = 0;
  }

  void unscreened(int64_t g, int64_t first) {
    const int64_t end = first + std::min(rows(g) - first, plan.row_panels * plan.width);
    RowBlock<float> lanes(table, s.D, scratch.lanes_of_rows);
    const int64_t most = RowBlock<float>::most_panels(table, s.D) * plan.width;
    for (int64_t count; first < end; first += count) {
      count = std::min(most, end - first);
      lanes.load(count, [&](int64_t i) { return s.x + (g * s.N + row(g, first + i)) * s.D; });
      lanes.meet(s.codebook + g * s.K * s.D, codes.start, 0, s.K);
      for (int64_t i = 0; i < count; ++i) {
        finish(a, table, g, row(g, first + i), 0, lanes.index(i), lanes.score(i));
      }
    }
  }

  void block(int64_t g, int64_t first) {
    const int64_t W = plan.width, count = std::min(rows(g) - first, plan.row_panels * W);
    const int64_t panels = (count + W - 1) / W;
    const int64_t q_step = bytes<uint8_t>(W * plan.stride), low_step = bytes<float>(plan.padded * W) / sizeof(float);
    const int64_t lane_step = bytes<float>(kLanes * W) / sizeof(float);
    const float* x[kMostPanels * kMostPanelWidth];
    uint32_t strange[kMostPanels];
    for (int64_t i = 0; i < count; ++i) x[i] = s.x + (g * s.N + row(g, first + i)) * s.D;
    for (int64_t r = 0; r < panels; ++r) {
      float* const lane = scratch.lanes + r * lane_step;
      VqScreenRows part{
          &codes,   x + r * W, std::min(W, count - r * W), scratch.moved, scratch.q + r * q_step, lane, lane + 4 * W,
          lane + W, 0};
      screen.rows(part);
      strange[r] = part.strange;
      std::fill_n(lane + 2 * W, W, kInfinity);
      std::fill_n(reinterpret_cast<int32_t*>(lane + 3 * W), W, 0);
    }
    for (int64_t p = 0; p < plan.code_panels; p += plan.together) {
      for (int64_t r = 0; r < panels; ++r) {
        float* const lane = scratch.lanes + r * lane_step;
        screen.tile({&codes, p, std::min(plan.together, plan.code_panels - p), scratch.q + r * q_step, lane,
                     scratch.lowest + r * low_step + p * W, lane + 2 * W, reinterpret_cast<int32_t*>(lane + 3 * W)});
      }
    }
    for (int64_t r = 0; r < panels; ++r) {
      rescore(g, first + r * W, std::min(W, count - r * W), x + r * W, strange[r], scratch.lanes + r * lane_step,
              scratch.lowest + r * low_step);
    }
  }

  // The panel that looks best gives a score that must be beaten; every panel that could is tried.
  void rescore(int64_t g, int64_t first, int64_t count, const float* const* x, uint32_t strange, const float* lane,
               const float* lowest) {
    const int64_t W = plan.width;
    const auto* const at = reinterpret_cast<const int32_t*>(lane + 3 * W);
    float best[kMostPanelWidth], score[kMostPanelWidth];
    int64_t index[kMostPanelWidth];
    std::fill_n(best, W, kInfinity);
    std::fill_n(score, W, -kInfinity);
    std::fill_n(index, W, int64_t(0));
    int64_t places = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (!(strange >> i & 1)) scratch.places[places++] = static_cast<int32_t>(at[i] * W + i);
    }
    pairs(places, x, best, index);
    for (int64_t i = 0; i < count; ++i) {
      if (!(strange >> i & 1)) score[i] = std::max(best[i], std::numeric_limits<float>::lowest());
    }
    places = screen.open({&codes, lowest, lane + 4 * W, lane + W, score, at, scratch.places});
    pairs(places, x, best, index);
    scratch.opened[2 * rank] += places;
    uint32_t open = 0;
    for (int64_t i = 0; i < places; ++i) open |= uint32_t(1) << (scratch.places[i] % W);
    scratch.opened[2 * rank + 1] += __builtin_popcount(open);
    for (int64_t i = 0; i < count; ++i) finish(a, table, g, row(g, first + i), 0, index[i], best[i]);
  }

  void pairs(int64_t count, const float* const* x, float* best, int64_t* index) const {
    const int64_t W = plan.width;
    for (int64_t i = 0; i < count; i += 4) {
      VqPairs part;
      part.count = std::min<int64_t>(4, count - i);
      part.D = s.D;
      for (int64_t j = 0; j < part.count; ++j) {
        const int64_t panel = scratch.places[i + j] / W;
        part.x[j] = x[scratch.places[i + j] % W];
        part.code[j] = codes.exact + panel * W * s.D;
        part.start[j] = codes.start + panel * W;
      }
      screen.pairs(part);
      for (int64_t j = 0; j < part.count; ++j) {
        const int64_t lane = scratch.places[i + j] % W, k = scratch.places[i + j] / W * W + part.lane[j];
        if (part.score[j] < best[lane] || (part.score[j] == best[lane] && k < index[lane])) {
          best[lane] = part.score[j], index[lane] = k;
        }
      }
    }
  }

  const VqNearest<float>& a;
  const VqShape<float>& s;
  const Table<float>& table;
  const VqScreenTable& screen;
  const Plan plan;
  const Scratch scratch;
  const int rank, size;
  VqScreenCodes codes;
  bool pays = true;            // of the last block that was screened
  int64_t blocks_without = 0;  // since then
};

void body(const void* context, int rank, int size, Barrier& barrier) {
  const auto& call = *static_cast<const Call*>(context);
  Screened screen(call, rank, size);
  const VqShape<float>& s = call.args->shape;
  if (s.mask) {
    sort_rows(*call.args, screen.scratch.rows, screen.scratch.valid, share(s.G, rank, size));
    barrier.wait();
  }
  for (int64_t g = 0; g < s.G; ++g) {
    screen.prepare(g, barrier);
    const int64_t step = screen.plan.row_panels * screen.plan.width;
    for (int64_t item; (item = barrier.draw()) * step < screen.rows(g);) screen.either(g, item * step);
    barrier.wait();
  }
  if (rank == 0 && call.opened) {
    call.opened[0] = call.opened[1] = 0;
    for (int i = 0; i < 2 * size; ++i) call.opened[i % 2] += screen.scratch.opened[i];
  }
}

}  // namespace

bool vq_screens(const VqNearest<float>& a) {
  const VqShape<float>& s = a.shape;
  if (!kernels().vq_screen || a.best > 1 || s.D > kScreenMostD || a.screen == core::Screen::never) return false;
  return a.screen == core::Screen::always ||
         (s.D >= kLeastD && s.K >= kernels().vq_screen->least_codes && s.N >= kLeastN);
}

size_t vq_screen_scratch(const VqNearest<float>& a, int most) {
  const Plan plan(a, kernels().f32);
  return Scratch(a, plan, most, 0, nullptr).total;
}

void vq_screen(const VqNearest<float>& args, void* scratch, const Team& team, int64_t opened[2]) noexcept {
  const Call call{&args, static_cast<char*>(scratch), team.most, opened};
  const VqShape<float>& s = args.shape;
  if (opened) opened[0] = opened[1] = 0;
  if (s.G * s.N == 0) return;
  team.run(team_size(double(s.G) * s.N * s.K * s.D / 2, team.most), body, &call);
}

}  // namespace fastseq::core
