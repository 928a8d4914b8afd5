// The forward recurrence of one block of threads, for a warp that holds its tiles of weight_hh all the time.
//
// A step: h of the step before comes into shared memory; every warp multiplies it with its tiles; the lanes of the
// first part of each band go on to the cells and hand h on. All else is done while h is on its way: inputs of the next
// step are asked for, what is kept is written, addresses go on. With int8 weights h is multiplied as bytes.
#include "cuda/persist_state.inl.h"

namespace fastseq::cuda {

template <class Low, class Tile>
struct Forward : ForwardState<Low, Tile> {
  using Call = ForwardCall;
  using Sizes = Tile;
  using Sum = typename Low::Sum;
  static constexpr size_t kShared = Tile::kForwardShared;

  using Base = ForwardState<Low, Tile>;
  using Base::call, Base::own, Base::lane, Base::band, Base::part, Base::first_unit, Base::first_row, Base::width;
  using Base::rows, Base::reverse, Base::longest, Base::kInt8, Base::kTile, Base::row_of, Base::time_of;
  static constexpr bool kExists = !kInt8 || Tile::kInt8Depth > 0;

  Sum* sums;
  Gates scales{};  // of this lane's cell, where weights are int8
  // What steps need again and again stays in registers.
  int zero, H;
  bool exists;          // whether this warp has cells, and this lane's unit is one
  uint32_t lane_state;  // of the numbers of the first state that this lane loads, the address of the first
  float slope;          // see activated()
  int packed, keeps_c, keeps_gates;
  // Of this lane's cells: their steps, and those that are written; 0 where there is no such cell.
  int ends[Tile::kRowBlocks], until[Tile::kRowBlocks];
  // Of this lane's cell in its first row; a block of rows is 8 rows after the one before.
  struct Places {
    const uint16_t* x;
    uint16_t *h, *gates;
    float* c;
    FASTSEQ_DEVICE explicit Places(const Forward& of) {
      const int64_t unit = of.first_unit + cell_unit(of.lane), b = of.first_row + cell_column(of.lane), H = of.H;
      x = static_cast<const uint16_t*>(of.own.x_gates) + 4 * b * H + unit;
      h = static_cast<uint16_t*>(of.own.h) + b * H + unit, c = (of.own.c ? of.own.c : of.own.c_n) + b * H + unit;
      gates = static_cast<uint16_t*>(of.own.gates ? of.own.gates : of.own.h) + 4 * b * H + unit;
    }
    FASTSEQ_DEVICE void move(int64_t n) { x += 4 * n, h += n, c += n, gates += 4 * n; }
  } at;
  uint32_t weights[Tile::kInRegisters][4];

  FASTSEQ_DEVICE explicit Forward(const ForwardCall& given)
      : Base(given),
        zero(given.blocks >> 24),  // as there are less blocks
        H(static_cast<int>(given.shape.H) + zero),
        at(*this) {
    sums = reinterpret_cast<Sum*>(Base::sums());
    exists = (Tile::kParts == 1 || part == 0) && first_unit + cell_unit(lane) < H;
    const int number = (lane % 8) * Tile::kStride + 16 * part * Tile::kTiles + 8 * (lane / 8);
    lane_state = static_cast<uint32_t>(anew(static_cast<int>(shared_address(this->states + number))));
    slope = anew(slope_of(call.shape));
    packed = anew(int{call.shape.offsets != nullptr});
    keeps_c = anew(int{own.c != nullptr}), keeps_gates = anew(int{own.gates != nullptr});
  }

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
    return reinterpret_cast<Words*>(this->shared_weights) + (warp * Tile::kInShared + tile) * 32 + lane;
  }

  FASTSEQ_DEVICE void begin() {
    FASTSEQ_UNROLL
    for (int tile = 0; tile < Tile::kInRegisters; ++tile) load_tile(tile, weights[tile]);
    for (int tile = 0; tile < Tile::kInShared; ++tile) {
      uint32_t found[4];
      load_tile(Tile::kInRegisters + tile, found);
      *shared_tile(tile) = {found[0], found[1], found[2], found[3]};
    }
    this->prepare_states();
    if constexpr (kInt8) load_scales();
  }
  FASTSEQ_DEVICE void load_scales() {
    const int64_t H = call.shape.H, unit = first_unit + cell_unit(lane);
    const float* const from = own.scale + unit;
    if (unit < H) scales = {from[0] / 127, from[H] / 127, from[2 * H] / 127, from[3 * H] / 127};
  }

  // Sums of this warp's band over its part of the depth, in four chains side by side. What they need from shared
  // memory is on its way some products before.
  FASTSEQ_DEVICE void multiply(int s, Sum (&d)[Tile::kRowBlocks][4]) const {
    constexpr int kBlocks = Tile::kRowBlocks, kChains = 4 / kBlocks, kAhead = 4;
    Sum chain[kBlocks][kChains][4] = {};
    const uint32_t from = lane_state + sizeof(uint16_t) * this->state_at(s);
    const int tiles =
        static_cast<int>((width - kTile * part * Tile::kTiles + kTile - 1) / kTile);  // the others are zeros
    uint32_t b[kAhead][4];
    Words a[2][2];
    const auto load = [&](int n) {  // of two tiles and a block of rows
      if (n < Tile::kTiles / 2 * kBlocks) {
        load_blocks(b[n % kAhead], from + sizeof(uint16_t) * (8 * (n % kBlocks) * Tile::kStride + 32 * (n / kBlocks)));
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
      if (some > 0 && some >= tiles) break;
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

  // Pre-activations without the part of h of this lane's cell in a block of rows.
  FASTSEQ_DEVICE void ask(int t, int block, uint32_t (&x)[4]) const {
    const bool alive = static_cast<unsigned>(t) < static_cast<unsigned>(ends[block]);
    FASTSEQ_UNROLL
    for (int gate = 0; gate < 4; ++gate) x[gate] = read_number(at.x + (32 * block + gate) * H, alive);
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

  // What is kept of a step, in few registers.
  struct Kept {
    uint32_t i_f, g_o, h;
    float c;
  };
  FASTSEQ_DEVICE Kept cell(const Sum (&d)[4], const uint32_t (&x)[4], float c) const {
    const Gates h = whole(d);
    const uint32_t first = kInt8 ? static_cast<uint32_t>(d[0]) : bits_of(d[0]);
    const auto sum = [&](float product, uint32_t number) {
      return product + Low::wide(static_cast<uint16_t>(after(first, number, zero)));
    };
    const Gates a = activated({sum(h.i, x[0]), sum(h.f, x[1]), sum(h.g, x[2]), sum(h.o, x[3])}, call.shape.hard, slope);
    const float next = a.f * c + a.i * a.g;
    return {Low::pair(a.i, a.f), Low::pair(a.g, a.o), Low::narrow(a.o * tanh_of(next)), next};
  }

  // Keeps what a step leaves; zeros where a row of dense data has ended.
  FASTSEQ_DEVICE void keep(const Kept& of, int block, bool alive) const {
    const int more = 8 * block * H;
    at.h[more] = static_cast<uint16_t>(alive ? of.h : 0);
    if (keeps_c) at.c[more] = alive ? of.c : 0.0f;
    if (keeps_gates) {
      const uint32_t i_f = alive ? of.i_f : 0, g_o = alive ? of.g_o : 0;
      uint16_t* const to = at.gates + 4 * more;
      to[0] = static_cast<uint16_t>(i_f), to[H] = static_cast<uint16_t>(i_f >> 16);
      to[2 * H] = static_cast<uint16_t>(g_o), to[3 * H] = static_cast<uint16_t>(g_o >> 16);
    }
  }

  // Where this lane's cell of a block of rows is, in [B, H].
  FASTSEQ_DEVICE int64_t place(int block) const {
    return (first_row + row_of(block)) * H + first_unit + cell_unit(lane);
  }
  FASTSEQ_DEVICE void keep_last(float c, int block) const {
    if (!exists || row_of(block) >= rows) return;
    const int steps = ends[block], t = reverse || steps == 0 ? 0 : steps - 1;
    const int64_t last = element(call.shape, t, first_row + row_of(block));
    const uint16_t* const h = steps == 0 ? static_cast<const uint16_t*>(own.h0) + place(block)
                                         : static_cast<uint16_t*>(own.h) + last * H + first_unit + cell_unit(lane);
    static_cast<uint16_t*>(own.h_n)[place(block)] = *h;
    own.c_n[place(block)] = c;
  }

  FASTSEQ_DEVICE void run() {
    begin();
    float c[Tile::kRowBlocks];
    uint32_t x[Tile::kRowBlocks][4];
    if (longest > 0) at.move(element(call.shape, time_of(0), 0) * H);
    FASTSEQ_UNROLL
    for (int block = 0; block < Tile::kRowBlocks; ++block) {
      const bool here = exists && row_of(block) < rows;
      ends[block] = here ? this->steps[row_of(block)] : 0;
      until[block] = packed ? ends[block] : here ? static_cast<int>(call.shape.T) : 0;
      c[block] = here ? own.c0[place(block)] : 0.0f;
      ask(time_of(0), block, x[block]);
    }
    const auto apart_now = [&](int s) { return apart_from(call.shape, s, longest, [&](int n) { return time_of(n); }); };
    int apart = apart_now(0);
    for (int s = 0; s < longest; ++s) {
      if constexpr (Tile::kCluster) {
        this->await(s);
      } else {
        this->gather(s);
        sync_block();
      }
      Sum d[Tile::kRowBlocks][4];
      multiply(s, d);
      add_parts(d);
      if (Tile::kParts == 1 || part == 0) {
        const int64_t more = int64_t{of_lane(apart, s % 32)} * H;
        at.x += 4 * more;
        step(s, d, c, x);
        at.h += more, at.c += more, at.gates += 4 * more;
        if (packed && s % 32 == 31) apart = apart_now(s + 1);
      }
    }
    FASTSEQ_UNROLL
    for (int block = 0; block < Tile::kRowBlocks; ++block) keep_last(c[block], block);
    clear();
  }

  // The cells, and inputs of the next step.
  FASTSEQ_DEVICE void step(int s, const Sum (&d)[Tile::kRowBlocks][4], float (&c)[Tile::kRowBlocks],
                           uint32_t (&x)[Tile::kRowBlocks][4]) const {
    const int t = time_of(s), next = time_of(s + 1);
    Kept kept[Tile::kRowBlocks];
    uint32_t h[Tile::kRowBlocks];
    FASTSEQ_UNROLL
    for (int block = 0; block < Tile::kRowBlocks; ++block) {
      kept[block] = cell(d[block], x[block], c[block]), h[block] = kept[block].h;
    }
    if (s + 1 < longest) this->publish(h, s);
    FASTSEQ_UNROLL
    for (int block = 0; block < Tile::kRowBlocks; ++block) ask(next, block, x[block]);
    FASTSEQ_UNROLL
    for (int block = 0; block < Tile::kRowBlocks; ++block) {
      const bool alive = t < ends[block];
      if (alive) c[block] = kept[block].c;
      if (t < until[block]) keep(kept[block], block, alive);
    }
    if (Tile::kCluster && (lane | band) == 0) this->expect_state(s + 2);
  }

  // Steps that no row has.
  FASTSEQ_DEVICE void clear() {
    at = Places(*this);
    for (int t = longest; !packed && t < call.shape.T; ++t) {
      if (t == longest) at.move(t * call.shape.B * H);
      FASTSEQ_UNROLL
      for (int block = 0; block < Tile::kRowBlocks; ++block) {
        if (until[block] > 0) keep({}, block, false);
      }
      at.move(call.shape.B * H);
    }
  }
};

}  // namespace fastseq::cuda
