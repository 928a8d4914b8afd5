// What forward and backward of the low-rank LSTM share: where a warp's numbers lie, and the sums over all units that
// lie between the factors: of every block's part, added in the order of the warps, then of the blocks.
//
// The 16 units of a warp are the rows of its tiles, neighbours in memory 8 rows apart: a lane then has two neighbouring
// units of two rows of the batch, with all four gates.
namespace fastseq::cuda {

// Of the 16 units of a warp, which one is row `row` of its tiles.
FASTSEQ_BOTH constexpr int unit_of_tile(int row) { return 2 * (row % 8) + row / 8; }

// Whether two neighbouring units of any row of these are one word in memory.
template <class... Pointers>
FASTSEQ_DEVICE bool in_words(int64_t H, Pointers... rows) {
  return H % 2 == 0 && ((reinterpret_cast<uintptr_t>(rows) % 4 == 0) && ...);
}

template <class Call, class Direction, class Low, class Tile>
struct LowRankSums {
  const Call& call;
  const Direction& own;
  int lane, warp;
  int first_unit;      // of the warp
  bool paired;         // whether two neighbouring units are one word in memory
  float* parts;        // [warp][piece][place][lane], of this block
  uint16_t* sums;      // [row][kStride], low
  int* steps;          // of each row
  uint32_t* exchange;  // [slot][from block][entry], of this group
  int longest = 0;

  // A lane's cell i of a block of 8 rows, which is number i of its part of a product: first the same unit's.
  static FASTSEQ_DEVICE int second_unit(int i) { return i / 2; }
  static FASTSEQ_DEVICE int second_row(int i) { return i % 2; }

  FASTSEQ_DEVICE explicit LowRankSums(const Call& given) : call(given), own(given.direction) {
    lane = thread_index() % 32, warp = thread_index() / 32;
    first_unit = block_x() * Tile::kUnits + 16 * warp;
    parts = reinterpret_cast<float*>(shared_bytes());
    sums = reinterpret_cast<uint16_t*>(parts + Tile::kWarps * Tile::kEntries);
    steps = reinterpret_cast<int*>(sums + Tile::kRows * Tile::kStride);
  }

  static FASTSEQ_DEVICE int first_row() { return block_y() * Tile::kRows; }  // of the block

  // A lane's units are this one and the next; its rows, within the block, likewise.
  FASTSEQ_DEVICE int unit() const { return first_unit + 2 * (lane / 4); }
  FASTSEQ_DEVICE int row_of(int block) const { return 8 * block + 2 * (lane % 4); }
  FASTSEQ_DEVICE bool exists(int row, int more) const {
    return unit() + more < call.shape.H && first_row() + row < call.shape.B;
  }
  FASTSEQ_DEVICE int64_t place(int row) const {
    return int64_t{first_row() + row} * call.shape.H + unit();
  }  // in [B, H]

  FASTSEQ_DEVICE void count_steps() {
    for (int row = thread_index(); row < Tile::kRows; row += Tile::kThreads) {
      steps[row] = steps_of(call.shape, first_row() + row);
    }
    sync_block();
    for (int row = 0; row < Tile::kRows; ++row) longest = steps[row] > longest ? steps[row] : longest;
  }

  // Two numbers of a lane's units, 0 for one that there is not.
  FASTSEQ_DEVICE uint32_t two(const void* from, int64_t at) const {
    const uint16_t* const first = static_cast<const uint16_t*>(from) + at;
    if (paired) return *reinterpret_cast<const uint32_t*>(first);
    return first[0] | static_cast<uint32_t>(unit() + 1 < call.shape.H ? first[1] : 0) << 16;
  }
  FASTSEQ_DEVICE void put_two(void* to, int64_t at, uint32_t value) const {
    uint16_t* const first = static_cast<uint16_t*>(to) + at;
    if (paired) {
      *reinterpret_cast<uint32_t*>(first) = value;
      return;
    }
    first[0] = static_cast<uint16_t>(value);
    if (unit() + 1 < call.shape.H) first[1] = static_cast<uint16_t>(value >> 16);
  }
  FASTSEQ_DEVICE float number(uint32_t two, int which) const {
    return Low::wide(static_cast<uint16_t>(two >> 16 * which));
  }

  // Numbers of the factors, of row `row` of the warp's tiles, that is a unit; zeros beyond the units and ranks.
  FASTSEQ_DEVICE uint32_t up(int gate, int row, int k) const {
    const int64_t H = anew(call.shape.H), rank = call.shape.rank, unit = first_unit + unit_of_tile(row);
    return unit < H && k < rank ? static_cast<const uint16_t*>(own.up)[(gate * H + unit) * rank + k] : 0;
  }
  FASTSEQ_DEVICE uint32_t down(int row, int sum) const {
    const int64_t H = anew(call.shape.H), rank = call.shape.rank, unit = first_unit + unit_of_tile(row);
    const int which = sum / Tile::kRank, k = sum % Tile::kRank;
    return unit < H && k < rank ? static_cast<const uint16_t*>(own.down)[(which * rank + k) * H + unit] : 0;
  }

  // This lane's part of tiles whose numbers are of(tile, row, column). A few at a time pass through shared memory: else
  // there would be more numbers and addresses on their way than registers.
  template <int kTiles, class Of>
  FASTSEQ_DEVICE void load_tiles(uint32_t (&to)[kTiles][4], Of of) const {
    constexpr int kSome = kTiles < Tile::kPieces ? kTiles : Tile::kPieces;
    static_assert(kTiles % kSome == 0);
    uint32_t* const way = reinterpret_cast<uint32_t*>(parts) + warp * Tile::kEntries + lane;
    FASTSEQ_UNROLL
    for (int first = 0; first < kTiles; first += kSome) {
      FASTSEQ_ROLL
      for (int n = 0; n < 4 * kSome; ++n) {
        const Place at = place_in_a(lane, 2 * (n % 4)), next = place_in_a(lane, 2 * (n % 4) + 1);
        const int tile = first + n / 4;
        way[32 * n] = of(tile, at.row, at.column) | of(tile, next.row, next.column) << 16;
      }
      FASTSEQ_UNROLL
      for (int n = 0; n < 4 * kSome; ++n) {
        to[first + n / 4][n % 4] = way[32 * n];
      }
    }
  }

  // This warp's part of 16 sums of 8 rows.
  FASTSEQ_DEVICE void give(int tile, int block, const float (&d)[4]) const {
    float* const to = parts + (warp * Tile::kPieces + tile * Tile::kRowBlocks + block) * 128 + lane;
    FASTSEQ_UNROLL
    for (int i = 0; i < 4; ++i) to[32 * i] = d[i];
  }

  // Which sum, of which row, entry `n` of this thread is. Those beyond the rank and the batch stay zeros.
  struct Sum {
    int sum, row;
  };
  static FASTSEQ_DEVICE Sum sum_of(int n) {
    const int piece = n * (Tile::kThreads / 128) + thread_index() / 128;
    const Place at = place_in_d(thread_index() % 32, thread_index() / 32 % 4);
    return {16 * (piece / Tile::kRowBlocks) + at.row, 8 * (piece % Tile::kRowBlocks) + at.column};
  }
  FASTSEQ_DEVICE bool is_used(Sum of) const {
    return of.sum % Tile::kRank < call.shape.rank && first_row() + of.row < call.shape.B;
  }

  // [from block][entry] of this group, for this step.
  FASTSEQ_DEVICE uint32_t* slot(int s) const {
    return call.exchange + (int64_t{slot_of(s)} * call.groups + block_y()) * call.blocks * Tile::kEntries;
  }

  // From the parts of all warps of all blocks to `sums`. Every thread hands on and takes in the same entries, and does
  // what else there is in between.
  static constexpr int kOwn = Tile::kEntries / Tile::kThreads;
  template <class Meanwhile>
  FASTSEQ_DEVICE void collect(int s, Meanwhile meanwhile) const {
    sync_block();
    float total[kOwn];
    FASTSEQ_UNROLL
    for (int n = 0; n < kOwn; ++n) {
      const float* const own = parts + n * Tile::kThreads + thread_index();
      total[n] = own[0];
      FASTSEQ_UNROLL
      for (int from = 1; from < Tile::kWarps; ++from) total[n] += own[from * Tile::kEntries];
    }
    if (call.blocks > 1) hand_on(total, s);
    meanwhile();
    if (call.blocks > 1) take_in(total, s);
    FASTSEQ_UNROLL
    for (int n = 0; n < kOwn; ++n) {
      const Sum of = sum_of(n);
      sums[of.row * Tile::kStride + of.sum] = is_used(of) ? Low::narrow(total[n]) : 0;
    }
    sync_block();
  }

  // This block's sums, to all blocks.
  FASTSEQ_DEVICE void hand_on(const float (&total)[kOwn], int s) const {
    uint32_t* const here = slot(s) + block_x() * Tile::kEntries + thread_index();
    FASTSEQ_UNROLL
    for (int n = 0; n < kOwn; ++n) {
      if (is_used(sum_of(n))) write_word(here + n * Tile::kThreads, Float::write(bits_of(total[n]), s));
    }
  }

  // The sums over all blocks, of which some are asked for at a time.
  FASTSEQ_DEVICE void take_in(float (&total)[kOwn], int s) const {
    constexpr int kSome = kOwn < Tile::kAhead ? Tile::kAhead / kOwn : 1;
    const uint32_t* const own = slot(s) + thread_index();
    bool used[kOwn];
    FASTSEQ_UNROLL
    for (int n = 0; n < kOwn; ++n) used[n] = is_used(sum_of(n)), total[n] = 0.0f;
    for (int first = 0; first < call.blocks; first += kSome) {
      uint32_t found[kSome * kOwn];
      const auto here = [&](int at) { return used[at % kOwn] && first + at / kOwn < call.blocks; };
      FASTSEQ_UNROLL
      for (int at = 0; at < kSome * kOwn; ++at) found[at] = Float::mark(s + 2);  // stale
      await_all<kSome * kOwn>([&](int at) { return here(at) && Float::stale(found[at], s); },
                              [&](int at) {
                                found[at] =
                                    read_word(own + (first + at / kOwn) * Tile::kEntries + at % kOwn * Tile::kThreads);
                              });
      FASTSEQ_UNROLL
      for (int at = 0; at < kSome * kOwn; ++at) {
        if (here(at)) total[at % kOwn] += float_of(Float::read(found[at]));
      }
    }
  }

  // Two tiles along the depth of 8 rows of `sums`, as the other side of the matrix instruction.
  FASTSEQ_DEVICE void take(uint32_t (&b)[4], int tile, int block) const {
    load_blocks(b, sums + (8 * block + lane % 8) * Tile::kStride + 16 * tile + 8 * (lane / 8));
  }
};

}  // namespace fastseq::cuda
