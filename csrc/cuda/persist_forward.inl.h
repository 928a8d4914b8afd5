// The forward recurrence of one block of threads, for a warp that holds its tiles of weight_hh all the time.
//
// A step: h of the step before comes into shared memory; every warp multiplies it with its tiles; the lanes of the
// first part of each band go on to the cells, hand h on, and write what is kept. Inputs of the step are asked for
// before the wait for h, which is longer. With int8 weights h is multiplied as bytes.
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
  using Base::rows, Base::reverse, Base::longest, Base::ends, Base::kInt8, Base::kTile, Base::row_of, Base::time_of;
  static constexpr bool kExists = !kInt8 || Tile::kInt8Depth > 0;

  Sum* sums;
  Gates scales{};  // of this lane's cell, where weights are int8
  // Of this lane's unit, from the first row on; what steps need again and again stays in registers.
  bool exists;  // whether this warp has cells, and this lane's unit is one
  const uint16_t* x_gates;
  uint16_t *h_out, *gates_out;
  float* c_out;
  uint32_t weights[Tile::kInRegisters][4];

  FASTSEQ_DEVICE explicit Forward(const ForwardCall& given) : Base(given) {
    const int unit = first_unit + cell_unit(lane);
    sums = reinterpret_cast<Sum*>(Base::sums());
    exists = part == 0 && unit < call.shape.H;
    x_gates = static_cast<const uint16_t*>(own.x_gates) + unit;
    h_out = static_cast<uint16_t*>(own.h) + unit;
    gates_out = own.gates ? static_cast<uint16_t*>(own.gates) + unit : nullptr;
    c_out = own.c ? own.c + unit : nullptr;
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
    const uint16_t* const from =
        this->state(s) + (lane % 8) * Tile::kStride + 16 * part * Tile::kTiles + 8 * (lane / 8);
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

  // The first number of this lane's first row at time t, in [.., H]; a block of rows is 8 * H numbers after the one
  // before.
  FASTSEQ_DEVICE int64_t row_at(int t) const {
    return element(call.shape, t, first_row + cell_column(lane)) * call.shape.H;
  }

  // Pre-activations without the part of h of this lane's cell in a block of rows, asked for before they are needed.
  FASTSEQ_DEVICE void ask(int t, int64_t at, uint16_t (&x)[Tile::kRowBlocks][4]) const {
    const int H = static_cast<int>(call.shape.H);
    const uint16_t* const from = x_gates + 4 * at;
    FASTSEQ_UNROLL
    for (int block = 0; block < Tile::kRowBlocks; ++block) {
      const bool here = exists && t < ends[block];
      FASTSEQ_UNROLL
      for (int gate = 0; gate < 4; ++gate) x[block][gate] = here ? from[(32 * block + gate) * H] : 0;
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

  // What is kept of a step, in few registers.
  struct Kept {
    uint32_t i_f, g_o;
    float c;
    uint16_t h;
  };
  FASTSEQ_DEVICE Kept cell(const Sum (&d)[4], const uint16_t (&x)[4], float c) const {
    const Gates h = whole(d);
    const Gates a = activated(
        {h.i + Low::wide(x[0]), h.f + Low::wide(x[1]), h.g + Low::wide(x[2]), h.o + Low::wide(x[3])}, call.shape);
    const float after = a.f * c + a.i * a.g;
    return {Low::narrow(a.i) | uint32_t{Low::narrow(a.f)} << 16, Low::narrow(a.g) | uint32_t{Low::narrow(a.o)} << 16,
            after, exists ? Low::narrow(a.o * tanh_of(after)) : uint16_t{0}};
  }
  FASTSEQ_DEVICE void finish(const Kept& of, int block, int t, int64_t at, float& c) const {
    const bool alive = t < ends[block];
    if (alive) c = of.c;
    keep(of, block, at, alive);
    if (alive && t == (reverse ? 0 : ends[block] - 1)) keep_last(of.c, of.h, row_of(block));
  }

  // Zeros where a row of dense data has ended.
  FASTSEQ_DEVICE void keep(const Kept& of, int block, int64_t at, bool alive) const {
    const int H = static_cast<int>(call.shape.H);
    if (!exists || row_of(block) >= rows || !(alive || !call.shape.offsets)) return;
    at += 8 * block * H;
    h_out[at] = alive ? of.h : 0;
    if (c_out) c_out[at] = alive ? of.c : 0.0f;
    if (gates_out) {
      const uint32_t i_f = alive ? of.i_f : 0, g_o = alive ? of.g_o : 0;
      uint16_t* const to = gates_out + 4 * at;
      to[0] = static_cast<uint16_t>(i_f), to[H] = static_cast<uint16_t>(i_f >> 16);
      to[2 * H] = static_cast<uint16_t>(g_o), to[3 * H] = static_cast<uint16_t>(g_o >> 16);
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
    for (int block = 0; block < Tile::kRowBlocks; ++block) {
      const int64_t b = first_row + row_of(block);
      if (part == 0 && unit < H && b < call.shape.B) {
        c[block] = own.c0[b * H + unit];
        if (ends[block] == 0) {
          keep_last(c[block], static_cast<const uint16_t*>(own.h0)[b * H + unit], row_of(block));
        }
      }
    }
    const int64_t next = (reverse ? -H : H) * call.shape.B;
    int64_t at = row_at(time_of(0));
    for (int s = 0; s < longest; ++s) {
      const int t = time_of(s);
      if (call.shape.offsets) at = row_at(t);
      uint16_t x[Tile::kRowBlocks][4];
      ask(t, at, x);
      if constexpr (Tile::kCluster) {
        this->await(s);
      } else {
        this->gather(s);
        sync_block();
      }
      Sum d[Tile::kRowBlocks][4];
      multiply(s, d);
      add_parts(d);
      Kept kept[Tile::kRowBlocks];
      FASTSEQ_UNROLL
      for (int block = 0; block < Tile::kRowBlocks; ++block) {
        if (part > 0) continue;
        kept[block] = cell(d[block], x[block], c[block]);
        this->publish(kept[block].h, block, s);
        if constexpr (!Tile::kCluster) finish(kept[block], block, t, at, c[block]);
      }
      if constexpr (Tile::kCluster) {
        this->push_all(s + 1);
        FASTSEQ_UNROLL
        for (int block = 0; block < Tile::kRowBlocks; ++block) finish(kept[block], block, t, at, c[block]);
      }
      at += next;
    }
    for (int t = longest; part == 0 && !call.shape.offsets && t < call.shape.T; ++t) {
      FASTSEQ_UNROLL
      for (int block = 0; block < Tile::kRowBlocks; ++block) keep({}, block, row_at(t), false);
    }
  }
};

}  // namespace fastseq::cuda
