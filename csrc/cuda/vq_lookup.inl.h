// The lookup of one block of threads: 16 rows, and of every level the tiles of 32 codes that are its part's.
//
// A score is one chain of multiply-adds, which nobody can share; so a lane has a code, and a warp four of the rows,
// whose chains go side by side. What a chain begins with is a chain too, in float64: that is for a warp of its own,
// while the others wait for the level before.
//
// All blocks of a row need its code, to know what is left of it. Each hands on the best of its part as two words, which
// are zero until then and are written once: a reader polls the words themselves, one trip through the second-level
// cache without a flag or a fence. Nothing but these words, relaxed atomics, goes from block to block, and no place is
// used twice. The blocks of a launch are on the device together, so what is waited for comes.
#include "cuda/await.inl.h"
#include "cuda/vq_number.inl.h"

namespace fastseq::cuda {

struct LookupCall {
  VqLookup of;
  uint32_t* exchange;  // [G][level][groups * rows][parts, an even number][2], zeros at the start
  int blocks, groups;  // parts of the codes, and of the rows
};

// The better of two is the smaller, by score and then by code. As words neither is ever zero.
struct Best {
  uint32_t score, code;  // in the order of the scores; code + 1
  FASTSEQ_DEVICE bool after(const Best& other) const {
    return score > other.score || (score == other.score && code > other.code);
  }
};
FASTSEQ_DEVICE Best best_of(float score, int code) { return {ordered(score), static_cast<uint32_t>(code) + 1}; }
template <int kCount>
FASTSEQ_DEVICE void best_of_lanes(Best (&own)[kCount]) {
  for (int mask = 16; mask > 0; mask /= 2) {
    FASTSEQ_UNROLL
    for (int n = 0; n < kCount; ++n) {
      const Best other{across(own[n].score, mask), across(own[n].code, mask)};
      if (own[n].after(other)) own[n] = other;
    }
  }
}

struct Lookup {
  static constexpr int kWarps = kVqThreads / 32 - 1, kRows = kVqRows, kCodes = kVqCodes;
  static constexpr int kOwn = kRows / kWarps;  // rows of a warp
  static constexpr int kColumns = 2;           // of each row that a lane takes at a time

  const LookupCall& call;
  const VqLookup& of;
  int lane, warp, part, stride;
  int64_t g, first_row;
  float *rest, *codes, *starts;  // what is left of the rows; a tile of codes, and what their scores begin with
  int* chosen;                   // [level][kRows]
  int depth[kOwn];               // levels that each row of the warp uses
  bool finite[kOwn];
  float score[kOwn];  // the least that the lane has seen in this level, and its code
  int code[kOwn];

  FASTSEQ_DEVICE explicit Lookup(const LookupCall& given) : call(given), of(given.of) {
    lane = thread_index() % 32, warp = thread_index() / 32, part = block_x(), stride = vq_stride(of.D);
    g = block_z(), first_row = static_cast<int64_t>(block_y()) * kRows;
    rest = reinterpret_cast<float*>(shared_bytes());
    codes = rest + kRows * stride;
    starts = codes + kCodes * stride;
    chosen = reinterpret_cast<int*>(starts + kCodes);
  }

  FASTSEQ_DEVICE int slot(int own) const { return warp + kWarps * own; }
  FASTSEQ_DEVICE int64_t row(int own) const { return first_row + slot(own); }
  // Which block writes the results of a row: they all know them.
  FASTSEQ_DEVICE bool writes(int own) const { return row(own) < of.N && slot(own) % call.blocks == part; }
  // Whether the codes of a level are looked at for a row. One that is not finite takes code 0.
  FASTSEQ_DEVICE bool looks(int own, int m) const { return depth[own] > m && finite[own]; }
  FASTSEQ_DEVICE uint32_t* place(int own, int m) const {
    const int64_t rows = static_cast<int64_t>(call.groups) * kRows, width = 2 * ((call.blocks + 1) / 2 * 2);
    return call.exchange + (((g * of.levels + m) * rows + row(own)) * width);
  }

  // Of each row, whether v holds for all lanes.
  FASTSEQ_DEVICE static void all_lanes(const bool (&v)[kOwn], bool (&found)[kOwn]) {
    uint32_t bad = 0;
    FASTSEQ_UNROLL
    for (int own = 0; own < kOwn; ++own) bad |= static_cast<uint32_t>(!v[own]) << own;
    for (int mask = 16; mask > 0; mask /= 2) bad |= across(bad, mask);
    FASTSEQ_UNROLL
    for (int own = 0; own < kOwn; ++own) found[own] = !(bad >> own & 1);
  }

  FASTSEQ_DEVICE void enter() {
    bool whole[kOwn];
    FASTSEQ_UNROLL
    for (int own = 0; own < kOwn; ++own) {
      const int64_t n = row(own);
      const bool counts = n < of.N && (!of.mask || of.mask[g * of.N + n]);
      const int64_t used = counts && of.depth ? of.depth[n] : of.levels;
      depth[own] = counts ? static_cast<int>(used < of.levels ? used : of.levels) : 0;
      whole[own] = true;
    }
    with_type(of.row, [&]<class Of>(Of) {
      for (int d = lane; d < stride; d += 32) {
        FASTSEQ_UNROLL
        for (int own = 0; own < kOwn; ++own) {
          const bool there = depth[own] > 0 && d < of.D;
          const float v = there ? read_as<Of>(of.x, (g * of.N + row(own)) * of.D + d) : 0.0f;
          whole[own] = whole[own] && is_finite(v);
          rest[slot(own) * stride + d] = v;
        }
      }
    });
    all_lanes(whole, finite);
  }

  // A tile, two columns of each of the warp's codes at a time, asked for together; zeros where there is no code.
  template <class Of>
  FASTSEQ_DEVICE void load_tile(const VqLevel& level, int64_t first) const {
    constexpr int kMine = kCodes / kWarps;
    for (int from = lane; from < stride; from += 64) {
      float v[2][kMine];
      FASTSEQ_UNROLL
      for (int n = 0; n < 2 * kMine; ++n) {
        const int64_t k = first + warp + n % kMine * kWarps;
        const int d = from + n / kMine * 32;
        v[n / kMine][n % kMine] = k < level.K && d < of.D ? read_as<Of>(level.codes, (g * level.K + k) * of.D + d) : 0;
      }
      FASTSEQ_UNROLL
      for (int n = 0; n < 2 * kMine; ++n) {
        const int d = from + n / kMine * 32;
        if (d < stride) codes[(warp + n % kMine * kWarps) * stride + d] = v[n / kMine][n % kMine];
      }
    }
  }

  // Squares are exact in float64, so fused or not is the same.
  FASTSEQ_DEVICE void find_starts(const VqLevel& level, int64_t first) const {
    const Four* const from = reinterpret_cast<const Four*>(codes + lane * stride);
    double total = 0;
    for (int d = 0; d < stride / 4; ++d) {
      const Four c = from[d];
      total += double{c.x} * c.x;
      total += double{c.y} * c.y;
      total += double{c.z} * c.z;
      total += double{c.w} * c.w;
    }
    const float half = static_cast<float>(0.5 * total), most = infinity();
    starts[lane] = first + lane < level.K && half < most ? (of.dot ? 0.0f : half) : most;
  }

  // Zeros behind the last column leave a score as it is.
  FASTSEQ_DEVICE void sweep(int64_t first) {
    const Four* const of_code = reinterpret_cast<const Four*>(codes + lane * stride);
    float found[kOwn];
    FASTSEQ_UNROLL
    for (int own = 0; own < kOwn; ++own) found[own] = starts[lane];
    for (int d = 0; d < stride / 4; ++d) {
      const Four c = of_code[d];
      FASTSEQ_UNROLL
      for (int own = 0; own < kOwn; ++own) {
        const Four x = reinterpret_cast<const Four*>(rest + slot(own) * stride)[d];
        found[own] = fmaf(-x.x, c.x, found[own]);
        found[own] = fmaf(-x.y, c.y, found[own]);
        found[own] = fmaf(-x.z, c.z, found[own]);
        found[own] = fmaf(-x.w, c.w, found[own]);
      }
    }
    FASTSEQ_UNROLL
    for (int own = 0; own < kOwn; ++own) {
      if (found[own] < score[own]) score[own] = found[own], code[own] = static_cast<int>(first) + lane;  // never a NaN
    }
  }

  FASTSEQ_DEVICE void publish(int m) const {
    Best best[kOwn];
    FASTSEQ_UNROLL
    for (int own = 0; own < kOwn; ++own) best[own] = best_of(score[own], code[own]);
    best_of_lanes(best);
    FASTSEQ_UNROLL
    for (int own = 0; own < kOwn; ++own) {
      if (looks(own, m) && lane == 0) write_words(place(own, m) + 2 * part, best[own].score, best[own].code);
    }
  }

  // The best of all parts for each row of the warp: two parts a lane.
  FASTSEQ_DEVICE void gather(int m, Best (&best)[kOwn]) const {
    Words found[kOwn];
    const auto some = [&](int own) { return looks(own, m) && 2 * lane < call.blocks; };
    const bool both = 2 * lane + 1 < call.blocks;
    FASTSEQ_UNROLL
    for (int own = 0; own < kOwn; ++own) found[own] = {0, 0, 0, 0};
    await_all<kOwn>(
        [&](int own) {
          const Words& of = found[own];
          return some(own) && (!of.x || !of.y || (both && (!of.z || !of.w)));
        },
        [&](int own) { found[own] = read_words(place(own, m) + 4 * lane); });
    FASTSEQ_UNROLL
    for (int own = 0; own < kOwn; ++own) {
      best[own] = {~0u, ~0u};
      if (some(own)) best[own] = {found[own].x, found[own].y};
      if (const Best other{found[own].z, found[own].w}; some(own) && both && best[own].after(other)) best[own] = other;
    }
    best_of_lanes(best);
  }

  // Takes the codes of a level away from the warp's rows.
  FASTSEQ_DEVICE void take(int m) {
    const VqLevel& level = of.level[m];
    Best best[kOwn];
    gather(m, best);
    int k[kOwn];
    float apart[kOwn];
    bool whole[kOwn];
    FASTSEQ_UNROLL
    for (int own = 0; own < kOwn; ++own) {
      k[own] = looks(own, m) ? static_cast<int>(best[own].code - 1) : depth[own] > m ? 0 : -1;
      apart[own] = 0.0f, whole[own] = true;
    }
    with_type(of.code, [&]<class Of>(Of) {
      for (int from = lane; from < of.D; from += 32 * kColumns) {
        float v[kColumns][kOwn];
        FASTSEQ_UNROLL
        for (int n = 0; n < kColumns * kOwn; ++n) {
          const int own = n % kOwn, d = from + n / kOwn * 32;
          const bool there = k[own] >= 0 && d < of.D;
          v[n / kOwn][own] = there ? read_as<Of>(level.codes, (g * level.K + k[own]) * of.D + d) : 0;
        }
        FASTSEQ_UNROLL
        for (int n = 0; n < kColumns * kOwn; ++n) {
          const int own = n % kOwn, d = from + n / kOwn * 32;
          if (k[own] < 0 || d >= of.D) continue;
          float& value = rest[slot(own) * stride + d];
          const float left = value - v[n / kOwn][own];
          value = left;
          apart[own] = fmaf(left, left, apart[own]);
          whole[own] = whole[own] && is_finite(left);
        }
      }
    });
    for (int mask = 16; mask > 0; mask /= 2) {
      FASTSEQ_UNROLL
      for (int own = 0; own < kOwn; ++own) apart[own] += across(apart[own], mask);
    }
    FASTSEQ_UNROLL
    for (int own = 0; own < kOwn; ++own) {
      if (lane == 0 && writes(own))
        keep(m, own, k[own], apart[own], looks(own, m) ? score_of(best[own].score) : infinity());
    }
    all_lanes(whole, finite);
  }

  FASTSEQ_DEVICE void keep(int m, int own, int k, float apart, float least) const {
    const int64_t n = row(own), at = (g * of.levels + m) * of.N + n;
    chosen[m * kRows + slot(own)] = k;
    write_index(of.index, of.bits, (g * of.N + n) * of.levels + m, k);
    if (of.distance) of.distance[at] = apart;
    if (of.score) of.score[at] = least;
  }

  template <class Of>
  FASTSEQ_DEVICE float sum_of_codes(int slot, int d) const {
    float total = 0.0f;
    for (int m = 0; m < of.levels && chosen[m * kRows + slot] >= 0; ++m) {
      const float c = read_as<Of>(of.level[m].codes, (g * of.level[m].K + chosen[m * kRows + slot]) * of.D + d);
      total = m > 0 ? total + c : c;
    }
    return total;
  }
  FASTSEQ_DEVICE void add_up() const {
    if (!of.quantized) return;
    for (int own = 0; own < kOwn; ++own) {
      for (int d = lane; writes(own) && d < of.D; d += 32) {
        float total = 0.0f;
        with_type(of.code, [&]<class Of>(Of) { total = sum_of_codes<Of>(slot(own), d); });
        const int64_t at = (g * of.N + row(own)) * of.D + d;
        with_type(of.row, [&]<class Of>(Of) { static_cast<Stored<Of>*>(of.quantized)[at] = Of::narrow(total); });
      }
    }
  }

  FASTSEQ_DEVICE void run() {
    const int64_t step = static_cast<int64_t>(call.blocks) * kCodes, mine = static_cast<int64_t>(part) * kCodes;
    const bool beside = warp == kWarps;  // has no rows
    if (!beside) enter();
    for (int m = 0; m < of.levels; ++m) {
      const VqLevel& level = of.level[m];
      FASTSEQ_UNROLL
      for (int own = 0; own < kOwn; ++own) {
        score[own] = infinity(), code[own] = static_cast<int>(mine) + lane;
      }
      // once where the part has no code: then it hands on that it has none
      for (int64_t first = mine; first == mine || first < level.K; first += step) {
        sync_block();  // all are done with the tile before
        if (!beside) with_type(of.code, [&]<class Of>(Of) { load_tile<Of>(level, first); });
        sync_block();
        if (beside) find_starts(level, first);
        if (!beside && first == mine && m > 0) take(m - 1);
        sync_block();
        if (!beside) sweep(first);
      }
      if (!beside) publish(m);
    }
    sync_block();  // all lanes have read what is taken from now
    if (!beside) take(of.levels - 1);
    sync_block();
    if (!beside) add_up();
  }
};

}  // namespace fastseq::cuda
