// The screen of one block of threads. Its rows lie in registers, as fragments A of the matrix instruction; the codes
// come by, tile after tile, through shared memory. Four lanes have the scores of a row, each of two classes of codes:
// of each class it keeps the least score, which code that was, and the second least. Whatever rounding did lies within
// a proven bound, so that at last it is known which of the eight the definition may take; and that no other code can be
// it, where no second is within the bound. Such rows are decided here, the others are left open.
//
// The place of a code among those of a class that are multiplied together is kept in the lowest bits of its score.
#include "cuda/vq_number.inl.h"

namespace fastseq::cuda {

// Rows that are split into pieces, as words that are read.
struct Words32 {
  using Word = uint32_t;
  static FASTSEQ_DEVICE float wide_word(uint32_t word) { return float_of(word); }
};
struct Words16 {
  using Word = uint16_t;
  static FASTSEQ_DEVICE float wide_word(uint32_t word) { return Float16::wide(static_cast<uint16_t>(word)); }
};

template <class Low, class Sizes>
struct Screen {
  static constexpr int kTiles = Sizes::kTiles, kDepth = Sizes::kDepth, kSome = Sizes::kSome, kPlaces = Sizes::kPlaces;
  static constexpr int kOwn = 2 * kTiles;     // rows of a lane, which four lanes have
  static constexpr int kChunks = 2 * kDepth;  // of 16 bytes, of a code in shared memory
  static constexpr float kMore = 1 + 0x1p-9f, kLeast = 0x1p-113f, kFlush = 0x1p-118f, kMost = 0x1p100f;

  const VqScreen& of;
  int lane, warp, quarter;
  int lane_at[4];  // of its row of an 8 x 8 block, within a piece of a tile, for columns 16 * (0 .. 3)
  int64_t g, first_row;
  unsigned char* tiles;
  float* widths;  // of the rows of the warp: twice the bound
  uint32_t rows[Sizes::kRowPieces][kTiles][kDepth][4];
  float least[kOwn][2], second[kOwn][2];  // of both classes
  int some[kOwn][2];                      // the first code of those among which the least is

  FASTSEQ_DEVICE explicit Screen(const VqScreen& given) : of(given) {
    lane = thread_index() % 32, warp = thread_index() / 32, quarter = lane % 4;
    g = block_y(), first_row = static_cast<int64_t>(block_x()) * Sizes::kRows + warp * 16 * kTiles;
    FASTSEQ_UNROLL
    for (int k = 0; k < 4; ++k) lane_at[k] = chunk_at(lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2);
    tiles = shared_bytes();
    widths = reinterpret_cast<float*>(tiles + Sizes::kStages * Sizes::kStage) + warp * 16 * kTiles;
  }

  FASTSEQ_DEVICE int slot(int own) const { return 16 * (own / 2) + 8 * (own % 2) + lane / 4; }
  FASTSEQ_DEVICE int64_t row(int own) const { return first_row + slot(own); }

  // Sums of squares of a lane's columns of a row: of what is multiplied, of what rounding leaves, of the second piece,
  // and of the row as it is.
  struct Squares {
    float moved = 0, left = 0, lo = 0, whole = 0;
  };

  // The lane's first number of a row, as words of that type. Beyond the last row the last: nothing is written for
  // these.
  template <class Word>
  FASTSEQ_DEVICE const Word* begin_of(int own, int bytes) const {
    const int64_t n = row(own) < of.N ? row(own) : of.N - 1;
    return reinterpret_cast<const Word*>(static_cast<const char*>(of.x) +
                                         ((g * of.N + n) * of.D + 2 * quarter) * bytes);
  }
  // Both pieces, lo above hi.
  FASTSEQ_DEVICE static uint32_t pieces_of(float v, float centre, Squares& squares) {
    const float moved = v - centre;
    const uint16_t hi = Low::narrow(moved), lo = Low::narrow(moved - Low::wide(hi));
    const float left = moved - Low::wide(hi) - Low::wide(lo);
    squares.moved += moved * moved, squares.left += left * left, squares.lo += Low::wide(lo) * Low::wide(lo);
    squares.whole += v * v;
    return hi | static_cast<uint32_t>(lo) << 16;
  }

  // f(own, m, k, i, d) for all words of a lane, in which are columns d and d + 1 from its first on.
  template <class F>
  FASTSEQ_DEVICE static void each_word(F f) {
    FASTSEQ_UNROLL
    for (int k = 0; k < kDepth; ++k) {
      FASTSEQ_UNROLL
      for (int n = 0; n < 4 * kTiles; ++n) f(2 * (n / 4) + n % 2, n / 4, k, n % 4, 16 * k + 8 * (n % 4 / 2));
    }
  }
  // Rows of 16-bit numbers as they are, all words of a lane asked for together.
  FASTSEQ_DEVICE void take_rows(Squares (&squares)[kOwn]) {
    const uint32_t* from[kOwn];
    FASTSEQ_UNROLL
    for (int own = 0; own < kOwn; ++own) from[own] = begin_of<uint32_t>(own, 2);
    const int left = static_cast<int>(of.D) - 2 * quarter;
    each_word([&](int own, int m, int k, int i, int d) { rows[0][m][k][i] = read_if(d < left, from[own] + d / 2); });
    each_word([&](int own, int m, int k, int i, int) {
      const uint32_t two = rows[0][m][k][i];
      const float v = Low::wide(static_cast<uint16_t>(two)), w = Low::wide(static_cast<uint16_t>(two >> 16));
      squares[own].whole += v * v + w * w;
    });
  }
  template <class Of>
  FASTSEQ_DEVICE void split_rows(Squares (&squares)[kOwn]) {
    using Word = typename Of::Word;
    const Word* from[kOwn];
    FASTSEQ_UNROLL
    for (int own = 0; own < kOwn; ++own) from[own] = begin_of<Word>(own, sizeof(Word));
    const auto* const centre = reinterpret_cast<const uint32_t*>(of.centre) + g * of.D + 2 * quarter;
    const int left = static_cast<int>(of.D) - 2 * quarter;
    each_word([&](int own, int m, int k, int i, int d) {
      uint32_t split[2];
      FASTSEQ_UNROLL
      for (int n = 0; n < 2; ++n) {
        const bool there = d + n < left;
        const float v = Of::wide_word(read_if(there, from[own] + d + n));
        split[n] = pieces_of(v, float_of(read_if(there, centre + d + n)), squares[own]);
      }
      rows[0][m][k][i] = (split[0] & 0xffffu) | split[1] << 16;
      rows[1][m][k][i] = split[0] >> 16 | (split[1] & 0xffff0000u);
    });
  }

  FASTSEQ_DEVICE void enter() {
    Squares squares[kOwn];
    if constexpr (Sizes::kRowPieces == 1) {
      take_rows(squares);
    } else if (of.row == Number::f32) {
      split_rows<Words32>(squares);
    } else {
      split_rows<Words16>(squares);
    }
    FASTSEQ_UNROLL
    for (int own = 0; own < kOwn; ++own) {
      Squares& own_squares = squares[own];
      for (float* sum : {&own_squares.moved, &own_squares.left, &own_squares.lo, &own_squares.whole}) {
        *sum += across(*sum, 1);
        *sum += across(*sum, 2);
      }
      const float width = bound(own_squares);
      if (quarter == 0) widths[slot(own)] = width;
      for (int c = 0; c < 2; ++c) least[own][c] = second[own][c] = infinity(), some[own][c] = 0;
    }
  }

  FASTSEQ_DEVICE static float length(float squares) { return sqrtf(squares * kMore + kLeast) * kMore; }
  // Twice what a score may be wrong by, as `_rows_kernel` of fastseq_kernels/_pieces.py has it; +inf where it is none.
  FASTSEQ_DEVICE float bound(const Squares& squares) const {
    constexpr bool kExact = Sizes::kRowPieces == 1;
    const float* const most = of.most + 5 * g;
    const float whole = length(squares.whole), moved = kExact ? whole : length(squares.moved);
    const float left = kExact ? 0.0f : length(squares.left) + 0x1p-24f * moved + kFlush;
    const float lo = kExact ? 0.0f : length(squares.lo);
    const float within = moved + left, depth = static_cast<float>(of.D), products = static_cast<float>(of.products);
    const float sums = (within + 2 * lo) * (most[0] + most[1] + 2 * most[2]);
    const float chain = whole * most[3] + (of.dot ? 0.0f : 0.5f * most[3] * most[3]);
    float e = left * most[0] + within * most[1] + lo * most[2];
    e += (products * depth * 0x1p-22f + (kPlaces + 4) * 0x1p-23f) * (most[4] + sums);
    e += (depth + 2) * 0x1p-24f * chain * 1.002f + 0x1p-109f;
    return most[4] + sums + chain < kMost ? 2 * e * kMore * of.slack : infinity();
  }

  FASTSEQ_DEVICE unsigned char* stage(int tile) const { return tiles + tile % Sizes::kStages * Sizes::kStage; }
  // Eight codes that lie one below the other do not meet in a bank.
  FASTSEQ_DEVICE static int chunk_at(int code, int chunk) { return (code * kChunks + (chunk ^ code % 8)) * 16; }

  FASTSEQ_DEVICE void fetch(int tile) const {
    constexpr int kStep = Sizes::kThreads / kChunks;  // codes that all threads copy at a time
    const int chunk = thread_index() % kChunks;
    const int64_t first = static_cast<int64_t>(tile) * Sizes::kCodes;
    if (first < of.padded) {
      unsigned char* const to = stage(tile);
      FASTSEQ_UNROLL
      for (int n = 0; n < Sizes::kCodePieces * Sizes::kCodes / kStep; ++n) {
        constexpr int kEach = Sizes::kCodes / kStep;
        const int piece = n / kEach, code = n % kEach * kStep + thread_index() / kChunks;
        const int64_t line = (g * Sizes::kCodePieces + piece) * of.padded + first + code;
        const auto* const from = static_cast<const uint16_t*>(of.pieces) + line * of.width + 8 * chunk;
        copy_begin(to + piece * Sizes::kPieceBytes + chunk_at(code, chunk), from);
      }
      const int at = 4 * thread_index();
      if (at < Sizes::kCodes) {
        copy_begin(to + Sizes::kCodePieces * Sizes::kPieceBytes + 4 * at, of.h + g * of.padded + first + at);
      }
    }
    copies_close();
  }

  // h - x*c of some codes: from `first` of the tile on.
  FASTSEQ_DEVICE void multiply(const unsigned char* tile, int first, float (&sum)[kTiles][kSome / 8][4]) const {
    const auto* const h = reinterpret_cast<const Two*>(tile + Sizes::kCodePieces * Sizes::kPieceBytes);
    FASTSEQ_UNROLL
    for (int j = 0; j < kSome / 8; ++j) {
      const Two start = h[first / 2 + 4 * j + quarter];
      FASTSEQ_UNROLL
      for (int m = 0; m < kTiles; ++m) {
        sum[m][j][0] = sum[m][j][2] = float_of(start.x), sum[m][j][1] = sum[m][j][3] = float_of(start.y);
      }
    }
    uint32_t at[4];
    FASTSEQ_UNROLL
    for (int k = 0; k < 4; ++k) at[k] = shared_address(tile) + first * kChunks * 16 + lane_at[k];
    FASTSEQ_UNROLL
    for (int k = 0; k < kDepth; ++k) step(at, k, sum);
  }
  FASTSEQ_DEVICE void step(const uint32_t (&at)[4], int k, float (&sum)[kTiles][kSome / 8][4]) const {
    uint32_t codes[Sizes::kCodePieces][kSome / 16][4];
    FASTSEQ_UNROLL
    for (int n = 0; n < Sizes::kCodePieces * (kSome / 16); ++n) {
      const int piece = n / (kSome / 16), pair = n % (kSome / 16);
      const uint32_t more = piece * Sizes::kPieceBytes + pair * 16 * kChunks * 16 + k / 4 * 128;
      load_blocks(codes[piece][pair], at[k % 4] + more);
    }
    FASTSEQ_UNROLL
    for (int p = 0; p < Sizes::kRowPieces + Sizes::kCodePieces - 1; ++p) {  // but for the product of both seconds
      const int of_rows = p == 2, of_codes = p == 1;
      FASTSEQ_UNROLL
      for (int j = 0; j < kSome / 8; ++j) {
        const uint32_t (&b)[4] = codes[of_codes][j / 2];
        FASTSEQ_UNROLL
        for (int m = 0; m < kTiles; ++m) {
          Low::multiply_add(sum[m][j], rows[of_rows][m][k], b[j % 2 * 2], b[j % 2 * 2 + 1]);
        }
      }
    }
  }

  // Class c of the codes of sum[.][j]: column c of the lane's two.
  FASTSEQ_DEVICE void look(int code, const float (&sum)[kTiles][kSome / 8][4]) {
    constexpr uint32_t kMask = -static_cast<uint32_t>(kPlaces);
    FASTSEQ_UNROLL
    for (int n = 0; n < 2 * kOwn; ++n) {
      const int own = n / 2, c = n % 2;
      const auto score = [&](uint32_t j) {
        return float_of(masked_or(bits_of(sum[own / 2][j][2 * (own % 2) + c]), kMask, j));
      };
      float low = fminf(score(0), score(1)), next = fmaxf(score(0), score(1));
      FASTSEQ_UNROLL
      for (uint32_t j = 2; j < kPlaces; ++j) {
        next = fminf(next, fmaxf(low, score(j)));
        low = fminf(low, score(j));
      }
      second[own][c] = fminf(fminf(second[own][c], next), fmaxf(low, least[own][c]));
      if (low < least[own][c]) least[own][c] = low, some[own][c] = code;
    }
  }

  // What a warp knows of its rows when all codes went by, kept where the codes were.
  struct Known {
    uint64_t best[16 * kTiles];  // by slot: the least of score and code, in their order
    struct {
      int slot, code;
    } list[8 * 16 * kTiles];  // codes whose scores are wanted
    bool open[16 * kTiles];
    int listed;
  };
  static_assert(sizeof(Known) * Sizes::kWarps <= Sizes::kStages * Sizes::kStage);
  static constexpr uint64_t kNone = ~uint64_t{0};

  FASTSEQ_DEVICE bool counts(int64_t n) const { return n < of.N && (!of.mask || of.mask[g * of.N + n]); }
  // As an integer that is ordered as scores, and then as codes.
  FASTSEQ_DEVICE static uint64_t key_of(float score, int code) {
    return uint64_t{ordered(score)} << 32 | static_cast<uint32_t>(code);
  }

  FASTSEQ_DEVICE void judge(int own, Known& known) const {
    float best = fminf(least[own][0], least[own][1]);
    best = fminf(best, across(best, 1));
    best = fminf(best, across(best, 2));
    const float limit = best + widths[slot(own)];
    const auto left = [&](int c) { return least[own][c] <= limit; };
    int many = left(0) + left(1), hidden = !(second[own][0] > limit && second[own][1] > limit);
    many += across(many, 1), hidden |= across(hidden, 1);
    many += across(many, 2), hidden |= across(hidden, 2);
    const bool closed = !hidden && limit < kMost && many > 0;
    if (quarter == 0) known.open[slot(own)] = !closed;
    if (!closed || !counts(row(own))) return;
    FASTSEQ_UNROLL
    for (int c = 0; c < 2; ++c) {
      if (!left(c)) continue;
      const int place = static_cast<int>(bits_of(least[own][c]) & (kPlaces - 1));
      const int code = some[own][c] + 8 * place + 2 * quarter + c;
      if (many > 1 || of.score) {
        known.list[take_places(&known.listed, 1)] = {slot(own), code};
      } else {
        known.best[slot(own)] = key_of(infinity(), code);
      }
    }
  }

  // Eight numbers of a row or a code, which begin at a multiple of 16 bytes.
  template <class Of>
  FASTSEQ_DEVICE static void eight_of(const void* from, int64_t at, float (&v)[8]) {
    const auto* const begin = static_cast<const Stored<Of>*>(from) + at;
    if constexpr (sizeof(*begin) == 4) {
      for (int n = 0; n < 2; ++n) {
        const Words w = read_sixteen(begin + 4 * n);
        v[4 * n] = float_of(w.x), v[4 * n + 1] = float_of(w.y), v[4 * n + 2] = float_of(w.z);
        v[4 * n + 3] = float_of(w.w);
      }
    } else {
      const Words w = read_sixteen(begin);
      const uint32_t words[4] = {w.x, w.y, w.z, w.w};
      for (int n = 0; n < 8; ++n) v[n] = Of::wide(static_cast<uint16_t>(words[n / 2] >> 16 * (n % 2)));
    }
  }
  // The definition's score, +inf where it is NaN.
  template <class Row, class Code>
  FASTSEQ_DEVICE float follow(int64_t n, int64_t code) const {
    float score = of.starts[g * of.K + code];
    const int64_t x = (g * of.N + n) * of.D, c = (g * of.K + code) * of.D;
    const uintptr_t begins = reinterpret_cast<uintptr_t>(of.x) | reinterpret_cast<uintptr_t>(of.codes);
    const int whole = of.D % 8 == 0 && begins % 16 == 0 ? static_cast<int>(of.D) : 0;
    FASTSEQ_UNROLL_FOUR
    for (int d = 0; d < whole; d += 8) {
      float v[8], w[8];
      eight_of<Row>(of.x, x + d, v), eight_of<Code>(of.codes, c + d, w);
      for (int e = 0; e < 8; ++e) score = fmaf(-v[e], w[e], score);
    }
    for (int d = whole; d < of.D; ++d) {
      score = fmaf(-read_as<Row>(of.x, x + d), read_as<Code>(of.codes, c + d), score);
    }
    return score == score ? score : infinity();
  }
  FASTSEQ_DEVICE float chain(int64_t n, int64_t code) const {
    if constexpr (Sizes::kCodePieces == 1) return follow<Low, Low>(n, code);
    float found = 0;
    if constexpr (Sizes::kRowPieces == 1) {
      with_type(of.code, [&]<class Code>(Code) { found = follow<Low, Code>(n, code); });
    } else {
      with_type(of.row, [&]<class Row>(Row) {
        with_type(of.code, [&]<class Code>(Code) { found = follow<Row, Code>(n, code); });
      });
    }
    return found;
  }

  FASTSEQ_DEVICE void decide() const {
    Known& known = reinterpret_cast<Known*>(tiles)[warp];
    if (lane < 16 * kTiles) known.best[lane] = kNone;
    if (lane == 0) known.listed = 0;
    sync_warp();
    FASTSEQ_UNROLL
    for (int own = 0; own < kOwn; ++own) judge(own, known);
    sync_warp();
    for (int i = lane; i < known.listed; i += 32) {
      const auto [slot, code] = known.list[i];
      keep_least(&known.best[slot], key_of(chain(first_row + slot, code), code));
    }
    sync_warp();
    const int64_t n = first_row + lane;
    if (lane >= 16 * kTiles || n >= of.N) return;
    if (counts(n) && known.open[lane]) {
      of.open[g * of.N + take_places(of.count + g, 1)] = static_cast<int32_t>(n);
      return;
    }
    const uint64_t best = known.best[lane];
    write_index(of.index, of.bits, g * of.N + n, best == kNone ? -1 : static_cast<int>(static_cast<uint32_t>(best)));
    if (of.score) of.score[g * of.N + n] = best == kNone ? infinity() : score_of(static_cast<uint32_t>(best >> 32));
  }

  FASTSEQ_DEVICE void run() {
    const int count = static_cast<int>((of.padded + Sizes::kCodes - 1) / Sizes::kCodes);
    for (int tile = 0; tile < Sizes::kStages - 1; ++tile) fetch(tile);
    enter();
    for (int tile = 0; tile < count; ++tile) {
      copies_wait<Sizes::kStages - 2>();
      sync_block();  // all have this tile, and are done with the one before, whose place is next
      fetch(tile + Sizes::kStages - 1);
      FASTSEQ_ROLL
      for (int first = 0; first < Sizes::kCodes; first += kSome) {
        float sum[kTiles][kSome / 8][4];
        multiply(stage(tile), first, sum);
        look(tile * Sizes::kCodes + first, sum);
      }
    }
    sync_block();  // all are done with the codes
    decide();
  }
};

}  // namespace fastseq::cuda
