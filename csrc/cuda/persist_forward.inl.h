// The forward recurrence of one block of threads, for a warp that holds its tiles of weight_hh all the time.
//
// A step: h of the step before comes from the blocks that made it into shared memory; every warp multiplies it with its
// tiles; the lanes of the first part of each band go on to the cells, hand h on, and write what is kept. Inputs of the
// step are asked for before the wait for h, which is longer. In a cluster h comes on its own, into the shared memory of
// all blocks: a place is written anew two steps later, when the writer has what all warps here, done with reading, have
// handed on since. With int8 weights h is multiplied and handed on as bytes.
namespace fastseq::cuda {

struct ForwardCall {
  PersistShape shape;
  PersistForward direction[2];
  uint32_t* exchange;  // [direction][slot][groups * rows][blocks * units / 2], zeros at the start
  int blocks, groups;  // along the units and along the batch
};

template <class Low, class Tile>
struct Forward {
  using Call = ForwardCall;
  using Sizes = Tile;
  using Sum = typename Low::Sum;
  static constexpr size_t kShared = Tile::kForwardShared;
  static constexpr bool kInt8 = Low::kPerWord == 4;
  // Numbers of the depth: of a tile of the matrix instruction, of all tiles.
  static constexpr int kTile = 8 * Low::kPerWord, kDepth = Tile::kDepth / 16 * kTile;
  static constexpr bool kExists = !kInt8 || Tile::kInt8Depth > 0;

  const ForwardCall& call;
  const PersistForward& own;
  int lane, band, part, first_unit;
  int64_t first_row, width;  // width: units of all blocks, at least H
  int rows, sharing;         // those that there are; the warps that gather one of them
  Arrivals* arrivals;        // of even and odd steps, in a cluster
  uint16_t *shared_weights, *states;
  Sum* sums;
  int* steps;      // of each row
  Gates scales{};  // of this lane's cell, where weights are int8
  uint32_t* exchange;
  int longest = 0;
  uint32_t weights[Tile::kInRegisters][4];

  FASTSEQ_DEVICE explicit Forward(const ForwardCall& given) : call(given), own(given.direction[block_z()]) {
    const int warp = thread_index() / 32;
    lane = thread_index() % 32, band = warp % Tile::kBands, part = warp / Tile::kBands;
    first_unit = block_x() * Tile::kUnits + 4 * band;
    first_row = static_cast<int64_t>(block_y()) * Tile::kRows;
    width = static_cast<int64_t>(call.blocks) * Tile::kUnits;
    rows = static_cast<int>(call.shape.B - first_row < Tile::kRows ? call.shape.B - first_row : Tile::kRows);
    sharing = rows < Tile::kWarps ? Tile::kWarps / rows : 1;
    arrivals = reinterpret_cast<Arrivals*>(shared_bytes());
    shared_weights = reinterpret_cast<uint16_t*>(shared_bytes() + Tile::kArrivals);
    states = shared_weights + Tile::kSharedTiles;
    sums = reinterpret_cast<Sum*>(states + Tile::kStates * Tile::kRows * Tile::kStride);
    steps = reinterpret_cast<int*>(sums + Tile::kSums);
    exchange = call.exchange + block_z() * 2 * slot_words();
  }

  FASTSEQ_DEVICE int64_t slot_words() const { return int64_t(call.groups) * Tile::kRows * width / 2; }
  FASTSEQ_DEVICE int time_of(int s) const { return own.reverse ? longest - 1 - s : s; }
  // Whether step s is the first of a row. Rows are exchanged at every step, before they begin and after they end.
  FASTSEQ_DEVICE bool begins(int row, int s) const { return own.reverse ? time_of(s) == steps[row] - 1 : s == 0; }

  // The neighbours of one word along the depth, of row `row` of this warp's band.
  FASTSEQ_DEVICE uint32_t weight_word(int row, int64_t k) const {
    const int64_t H = call.shape.H, unit = first_unit + unit_of(row), first = (gate_of(row) * H + unit) * H;
    if (unit >= H) return 0;
    if constexpr (kInt8) return bytes_at(static_cast<const uint8_t*>(own.weight_hh) + first, k, H);
    return pair_at(static_cast<const uint16_t*>(own.weight_hh) + first, k, H);
  }

  FASTSEQ_DEVICE void load_tile(int tile, uint32_t (&to)[4]) const {
    const int64_t k = kTile * (part * Tile::kTiles + tile);
    FASTSEQ_UNROLL
    for (int r = 0; r < 4; ++r) {
      const Place at = place_in_a(lane, 2 * r);  // of numbers of 16 bits
      to[r] = weight_word(at.row, k + at.column / 2 * Low::kPerWord);
    }
  }

  // This lane's part of a tile in shared memory.
  FASTSEQ_DEVICE Words* shared_tile(int tile) const {
    const int warp = part * Tile::kBands + band;
    return reinterpret_cast<Words*>(shared_weights) + (warp * Tile::kInShared + tile) * 32 + lane;
  }

  FASTSEQ_DEVICE void begin() {
    FASTSEQ_UNROLL
    for (int tile = 0; tile < Tile::kInRegisters; ++tile) load_tile(tile, weights[tile]);
    for (int tile = 0; tile < Tile::kInShared; ++tile) {
      uint32_t found[4];
      load_tile(Tile::kInRegisters + tile, found);
      *shared_tile(tile) = {found[0], found[1], found[2], found[3]};
    }
    for (int row = thread_index(); row < Tile::kRows; row += Tile::kThreads) {
      steps[row] = steps_of(call.shape, first_row + row);
    }
    // States of rows and units that there are not stay zeros.
    for (int at = thread_index(); at < Tile::kStates * Tile::kRows * Tile::kStride / 8; at += Tile::kThreads) {
      reinterpret_cast<Words*>(states)[at] = {0, 0, 0, 0};
    }
    sync_block();
    for (int row = 0; row < Tile::kRows; ++row) longest = steps[row] > longest ? steps[row] : longest;
    if constexpr (Tile::kCluster) open();
    if constexpr (kInt8) load_scales();
  }
  FASTSEQ_DEVICE void load_scales() {
    const int64_t H = call.shape.H, unit = first_unit + cell_unit(lane);
    const float* const from = own.scale + unit;
    if (unit < H) scales = {from[0] / 127, from[H] / 127, from[2 * H] / 127, from[3 * H] / 127};
  }

  // A word of the state that a row begins with, and four.
  FASTSEQ_DEVICE uint32_t first_word(int row, int64_t k) const {
    const int64_t H = call.shape.H;
    const uint16_t* const h0 = static_cast<const uint16_t*>(own.h0) + (first_row + row) * H;
    if (!kInt8) return pair_at(h0, k, H);
    const uint32_t first = pair_at(h0, k, H), second = pair_at(h0, k + 2, H);
    return bytes_in(number(first) | number(first >> 16) << 16, number(second) | number(second >> 16) << 16);
  }
  FASTSEQ_DEVICE Words first_state(int row, int64_t k) const {
    constexpr int n = Low::kPerWord;
    return {first_word(row, k), first_word(row, k + n), first_word(row, k + 2 * n), first_word(row, k + 3 * n)};
  }
  // h as it is multiplied and handed on: with int8 weights a byte.
  static FASTSEQ_DEVICE uint32_t number(uint32_t h) {
    return kInt8 ? quantized(Low::wide(static_cast<uint16_t>(h))) : h & 0xffff;
  }
  // The bytes of two pairs.
  static FASTSEQ_DEVICE uint32_t bytes_in(uint32_t first, uint32_t second) {
    return (first & 0xff) | (first >> 8 & 0xff00) | (second & 0xff) << 16 | (second << 8 & 0xff000000);
  }

  static FASTSEQ_DEVICE bool stale(const Words& w, int s) {
    return Pair::stale(w.x, s) | Pair::stale(w.y, s) | Pair::stale(w.z, s) | Pair::stale(w.w, s);
  }

  FASTSEQ_DEVICE uint16_t* state(int s) const {
    return states + (Tile::kStates > 1 ? s & 1 : 0) * Tile::kRows * Tile::kStride;
  }

  // In a cluster: the first state, and the barriers of the next two.
  FASTSEQ_DEVICE void open() const {
    for (int s = 1; thread_index() == 0 && s <= 2; ++s) {
      prepare(arrivals + slot_of(s));
      expect_state(s);
    }
    constexpr int kQuads = Tile::kDepth / 8;  // four words each
    for (int at = thread_index(); at < rows * kQuads; at += Tile::kThreads) {
      const int row = at / kQuads, k = at % kQuads * 4 * Low::kPerWord;
      if (begins(row, 0) && steps[row] > 0) *in_state(0, row, k) = first_state(row, k);
    }
    sync_cluster();
  }
  FASTSEQ_DEVICE void expect_state(int s) const {
    if (s < longest) expect(arrivals + slot_of(s), static_cast<uint32_t>(rows * width * 4 / Low::kPerWord));
  }
  FASTSEQ_DEVICE void await(int s) const {
    if (s == 0) return;
    Waiting wait;
    while (!arrived(arrivals + slot_of(s), (s - 1) / 2 % 2)) wait.look_again();
    if (thread_index() == 0) expect_state(s + 2);
  }

  // Where numbers k and the next of a row's state are.
  template <class Of = Words>
  FASTSEQ_DEVICE Of* in_state(int s, int row, int k) const {
    return reinterpret_cast<Of*>(reinterpret_cast<uint32_t*>(state(s) + row * Tile::kStride) + k / Low::kPerWord);
  }

  // The state that enters step s. A warp takes row after row, of each lane kEach times 8 numbers; where there are few
  // rows, several warps share one. A place is always read by the same thread.
  FASTSEQ_DEVICE void gather(int s) const {
    constexpr int kEach = kDepth / 256, kRowsAtOnce = least(Tile::kRowBlocks, kEach < 8 ? 8 / kEach : 1);
    constexpr int kCount = kRowsAtOnce * kEach;
    const int warp = thread_index() / 32, apart = Tile::kWarps / sharing, words = static_cast<int>(width) / 2;
    const int k0 = 8 * (lane + 32 * (warp % sharing)), next = 256 * sharing;
    const uint32_t* const from = exchange + slot_of(s - 1) * slot_words() + first_row * words + k0 / 2;
    FASTSEQ_ROLL
    for (int first = warp / sharing; first < rows; first += kRowsAtOnce * apart) {
      const auto row_of = [&](int n) { return first + n / kEach * apart; };
      const auto k_of = [&](int n) { return k0 + n % kEach * next; };
      const uint32_t* const of_row = from + first * words;
      Words found[kCount];
      bool here[kCount];
      FASTSEQ_UNROLL
      for (int n = 0; n < kCount; ++n) {
        here[n] = row_of(n) < rows && k_of(n) < width;
        found[n] = {Pair::mark(s + 1), 0, 0, 0};  // stale, and zeros
      }
      if (s > 0) {
        await_all<kCount>(
            [&](int n) { return here[n] && stale(found[n], s - 1); },
            [&](int n) { found[n] = read_words(of_row + (n / kEach * apart * words + n % kEach * next / 2)); });
      }
      FASTSEQ_UNROLL
      for (int n = 0; n < kCount; ++n) {
        if (here[n]) store(s, row_of(n), k_of(n), found[n]);
      }
      FASTSEQ_UNROLL
      for (int n = 0; n < kCount; n += kEach) {
        if (row_of(n) < rows && begins(row_of(n), s) && steps[row_of(n)] > 0) begin_row(s, row_of(n), k0, next);
      }
    }
  }

  // Eight numbers of a row's state as they were found, and all of this lane's as the row begins.
  FASTSEQ_DEVICE void store(int s, int row, int k, const Words& found) const {
    const Words of{Pair::read(found.x), Pair::read(found.y), Pair::read(found.z), Pair::read(found.w)};
    if constexpr (kInt8) {
      *in_state<Two>(s, row, k) = {bytes_in(of.x, of.y), bytes_in(of.z, of.w)};
    } else {
      *in_state(s, row, k) = of;
    }
  }
  FASTSEQ_DEVICE void begin_row(int s, int row, int first, int next) const {
    FASTSEQ_ROLL
    for (int k = first; k < width; k += next) {
      if constexpr (kInt8) {
        *in_state<Two>(s, row, k) = {first_word(row, k), first_word(row, k + 4)};
      } else {
        *in_state(s, row, k) = first_state(row, k);
      }
    }
  }

  // Sums of this warp's band over its part of the depth, in four chains side by side. What they need from shared
  // memory is on its way some products before.
  FASTSEQ_DEVICE void multiply(int s, Sum (&d)[Tile::kRowBlocks][4]) const {
    constexpr int kBlocks = Tile::kRowBlocks, kChains = 4 / kBlocks, kAhead = 4;
    Sum chain[kBlocks][kChains][4] = {};
    const uint16_t* const from = state(s) + (lane % 8) * Tile::kStride + 16 * part * Tile::kTiles + 8 * (lane / 8);
    const int tiles =
        static_cast<int>((width - kTile * part * Tile::kTiles + kTile - 1) / kTile);  // the others are zeros
    uint32_t b[kAhead][4];
    Words a[2][2];
    const auto load = [&](int n) {  // of two tiles and a block of rows
      if (n < Tile::kTiles / 2 * kBlocks) {
        load_blocks(b[n % kAhead], from + 8 * (n % kBlocks) * Tile::kStride + 32 * (n / kBlocks));
      }
    };
    const auto fetch = [&](int tile) {
      FASTSEQ_UNROLL
      for (int n = 0; n < 2; ++n) {
        if (tile >= Tile::kInRegisters && tile < Tile::kTiles) {
          a[tile / 2 % 2][n] = *shared_tile(tile + n - Tile::kInRegisters);
        }
      }
    };
    FASTSEQ_UNROLL
    for (int n = 0; n < kAhead; ++n) load(n);
    FASTSEQ_UNROLL
    for (int some = 0; some < Tile::kTiles; some += 8) {
      if (some >= tiles) continue;
      FASTSEQ_UNROLL
      for (int n = some / 2 * kBlocks; n < (some / 2 + 4) * kBlocks; ++n) {
        const int tile = n / kBlocks * 2, block = n % kBlocks;
        if (block == 0) fetch(tile + 2);
        FASTSEQ_UNROLL
        for (int which = 0; which < 2; ++which) {
          Sum(&sum)[4] = chain[block][(tile + which) % kChains];
          const uint32_t (&right)[4] = b[n % kAhead];
          if (tile < Tile::kInRegisters) {
            Low::multiply_add(sum, weights[(tile + which) % Tile::kInRegisters], right[2 * which],
                              right[2 * which + 1]);
          } else {
            const Words& left = a[tile / 2 % 2][which];
            Low::multiply_add(sum, {left.x, left.y, left.z, left.w}, right[2 * which], right[2 * which + 1]);
          }
        }
        load(n + kAhead);
      }
    }
    FASTSEQ_UNROLL
    for (int n = 0; n < 4 * kBlocks; ++n) {
      d[n / 4][n % 4] = chain[n / 4][0][n % 4];
      FASTSEQ_UNROLL
      for (int other = 1; other < kChains; ++other) d[n / 4][n % 4] += chain[n / 4][other][n % 4];
    }
  }

  // The first part of each band adds up the sums of all.
  FASTSEQ_DEVICE void add_parts(Sum (&d)[Tile::kRowBlocks][4]) const {
    if (Tile::kParts == 1) return;
    constexpr int kBand = Tile::kRowBlocks * 128;
    if (part > 0) {
      FASTSEQ_UNROLL
      for (int n = 0; n < Tile::kRowBlocks * 4; ++n) {
        sums[((part - 1) * Tile::kBands + band) * kBand + n * 32 + lane] = d[n / 4][n % 4];
      }
    }
    sync_block();
    for (int other = 1; part == 0 && other < Tile::kParts; ++other) {
      FASTSEQ_UNROLL
      for (int n = 0; n < Tile::kRowBlocks * 4; ++n) {
        d[n / 4][n % 4] += sums[((other - 1) * Tile::kBands + band) * kBand + n * 32 + lane];
      }
    }
  }

  // Pre-activations without the part of h of this lane's cell in a block of rows, asked for before they are needed.
  FASTSEQ_DEVICE void ask(int s, uint16_t (&x)[Tile::kRowBlocks][4]) const {
    const int64_t H = call.shape.H, unit = first_unit + cell_unit(lane);
    FASTSEQ_UNROLL
    for (int block = 0; block < Tile::kRowBlocks; ++block) {
      const int row = 8 * block + cell_column(lane), t = time_of(s);
      const bool here = part == 0 && unit < H && t < steps[row];
      const uint16_t* const from = static_cast<const uint16_t*>(own.x_gates) +
                                   (here ? element(call.shape, t, first_row + row) * 4 * H + unit : 0);
      FASTSEQ_UNROLL
      for (int gate = 0; gate < 4; ++gate) x[block][gate] = here ? from[gate * H] : 0;
    }
  }

  // The products of all gates of this lane's cell, from its own two of two columns and the partner's.
  FASTSEQ_DEVICE Gates whole(const Sum (&d)[4]) const {
    const bool second = is_second(lane);
    const auto first_gate = static_cast<float>(across(second ? d[0] : d[1], kPartner)),
               other_gate = static_cast<float>(across(second ? d[2] : d[3], kPartner));
    const auto own_first = static_cast<float>(second ? d[1] : d[0]),
               own_other = static_cast<float>(second ? d[3] : d[2]);
    const Gates z = second ? Gates{first_gate, other_gate, own_first, own_other}
                           : Gates{own_first, own_other, first_gate, other_gate};
    return kInt8 ? Gates{z.i * scales.i, z.f * scales.f, z.g * scales.g, z.o * scales.o} : z;
  }

  // Hands on h of four units, of which this lane has one.
  FASTSEQ_DEVICE void publish(uint32_t h, int row, int s) const {
    if constexpr (Tile::kCluster) return push(h, row, s + 1);
    const uint32_t own_number = number(h), next = across(own_number, 8);
    const uint32_t pair = Pair::write(safe_pair(own_number, next, Low::kInfinity), s);  // of even units
    const uint32_t other = across(pair, 16);
    if (cell_unit(lane) == 0 && row < rows) {
      write_words(exchange + slot_of(s) * slot_words() + ((first_row + row) * width + first_unit) / 2, pair, other);
    }
  }

  // The same to all blocks of the cluster, each lane of the four to every fourth; where a row begins, its first state.
  FASTSEQ_DEVICE void push(uint32_t h, int row, int s) const {
    if (s == longest) return;
    const int64_t H = call.shape.H;
    const int place = cell_unit(lane), unit = first_unit + place;
    if (begins(row, s) && steps[row] > 0) {
      h = unit < H ? static_cast<const uint16_t*>(own.h0)[(first_row + row) * H + unit] : 0;
    }
    const uint32_t own_number = number(h), next = across(own_number, 8);
    const uint32_t pair = place % 2 ? next | own_number << 16 : own_number | next << 16, other = across(pair, 16);
    const uint32_t first = place < 2 ? pair : other, second = place < 2 ? other : pair;
    uint32_t* const to = in_state<uint32_t>(s, row, first_unit);
    sync_warp();  // what its lanes have read may be written anew by whoever hears of this
    for (int block = place; row < rows && block < call.blocks; block += 4) {
      if constexpr (kInt8) {
        push_word(block, to, bytes_in(first, second), arrivals + slot_of(s));
      } else {
        push_words(block, to, first, second, arrivals + slot_of(s));
      }
    }
  }

  // What is kept of a step: zeros where a row of dense data has ended.
  FASTSEQ_DEVICE void keep(Gates a, float c, uint16_t h, int row, int t, bool alive) const {
    const int64_t H = call.shape.H, unit = first_unit + cell_unit(lane), b = first_row + row;
    if (unit >= H || b >= call.shape.B || !(alive || !call.shape.offsets)) return;
    const int64_t at = element(call.shape, t, b);
    static_cast<uint16_t*>(own.h)[at * H + unit] = alive ? h : 0;
    if (own.c) own.c[at * H + unit] = alive ? c : 0.0f;
    if (own.gates) {
      uint16_t* const to = static_cast<uint16_t*>(own.gates) + at * 4 * H + unit;
      to[0] = alive ? Low::narrow(a.i) : 0, to[H] = alive ? Low::narrow(a.f) : 0;
      to[2 * H] = alive ? Low::narrow(a.g) : 0, to[3 * H] = alive ? Low::narrow(a.o) : 0;
    }
  }

  FASTSEQ_DEVICE void keep_last(float c, uint16_t h, int row) const {
    const int64_t H = call.shape.H, unit = first_unit + cell_unit(lane), at = (first_row + row) * H + unit;
    if (unit >= H || first_row + row >= call.shape.B) return;
    static_cast<uint16_t*>(own.h_n)[at] = h;
    own.c_n[at] = c;
  }

  FASTSEQ_DEVICE void run() {
    begin();
    const int64_t H = call.shape.H, unit = first_unit + cell_unit(lane);
    float c[Tile::kRowBlocks] = {};
    FASTSEQ_UNROLL
    for (int block = 0; part == 0 && block < Tile::kRowBlocks; ++block) {
      const int row = 8 * block + cell_column(lane);
      const int64_t b = first_row + row;
      if (unit < H && b < call.shape.B) {
        c[block] = own.c0[b * H + unit];
        if (steps[row] == 0) keep_last(c[block], static_cast<const uint16_t*>(own.h0)[b * H + unit], row);
      }
    }
    for (int s = 0; s < longest; ++s) {
      uint16_t x[Tile::kRowBlocks][4];
      ask(s, x);
      if constexpr (Tile::kCluster) {
        await(s);
      } else {
        gather(s);
        sync_block();
      }
      Sum d[Tile::kRowBlocks][4];
      multiply(s, d);
      add_parts(d);
      FASTSEQ_UNROLL
      for (int block = 0; part == 0 && block < Tile::kRowBlocks; ++block) {
        const int row = 8 * block + cell_column(lane), t = time_of(s);
        const bool alive = t < steps[row];
        Gates z = whole(d[block]);
        z = {z.i + Low::wide(x[block][0]), z.f + Low::wide(x[block][1]), z.g + Low::wide(x[block][2]),
             z.o + Low::wide(x[block][3])};
        const Gates a = activated(z, call.shape);
        const float after = a.f * c[block] + a.i * a.g;
        const uint16_t h = unit < H ? Low::narrow(a.o * tanh_of(after)) : 0;
        publish(h, row, s);
        if (alive) c[block] = after;
        keep(a, after, h, row, t, alive);
        if (alive && t == (own.reverse ? 0 : steps[row] - 1)) keep_last(after, h, row);
      }
    }
    for (int t = longest; part == 0 && !call.shape.offsets && t < call.shape.T; ++t) {
      FASTSEQ_UNROLL
      for (int block = 0; block < Tile::kRowBlocks; ++block) keep({}, 0, 0, 8 * block + cell_column(lane), t, false);
    }
  }
};

}  // namespace fastseq::cuda
