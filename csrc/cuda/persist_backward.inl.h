// The backward recurrence of one block of threads: the same rows of weight_hh as in forward, transposed.
//
// A step: every thread adds up what all blocks have found for its cells' gradient of h, goes back through the cells,
// and puts the gradients of the pre-activations into shared memory; every warp multiplies them with its tiles, which
// gives this block's part of the gradient of h for all units, and hands each part to the block that owns the unit. So
// float32 sums of H units go between blocks instead of 4 * H numbers; they are added in the order of the blocks.
namespace fastseq::cuda {

struct BackwardCall {
  PersistShape shape;
  PersistBackward direction[2];
  uint32_t* exchange;  // [direction][slot][group][to block][from block][rows][units], zeros at the start
  int blocks, groups;
};

template <class Low, class Tile>
struct Backward {
  using Call = BackwardCall;
  using Sizes = Tile;
  static constexpr size_t kShared = Tile::kBackwardShared;

  const BackwardCall& call;
  const PersistBackward& own;
  int lane, warp;
  int64_t first_unit, first_row;
  uint16_t *shared_weights, *gradients;
  int* steps;          // of each row
  uint32_t* exchange;  // of this group
  int longest = 0;
  uint32_t weights[Tile::kInRegisters][4];

  struct Cell {
    int unit, row;  // of the block
    float dh, dc;
  };

  FASTSEQ_DEVICE explicit Backward(const BackwardCall& given) : call(given), own(given.direction[block_z()]) {
    lane = thread_index() % 32, warp = thread_index() / 32;
    first_unit = static_cast<int64_t>(block_x()) * Tile::kUnits;
    first_row = static_cast<int64_t>(block_y()) * Tile::kRows;
    shared_weights = reinterpret_cast<uint16_t*>(shared_bytes());
    gradients = shared_weights + Tile::kSharedTiles;
    steps = reinterpret_cast<int*>(gradients + 2 * Tile::kRows * Tile::kGateStride);
    exchange = call.exchange + block_z() * 2 * slot_words() + block_y() * group_words();
  }

  FASTSEQ_DEVICE int64_t group_words() const { return int64_t(call.blocks) * call.blocks * Tile::kRows * Tile::kUnits; }
  FASTSEQ_DEVICE int64_t slot_words() const { return call.groups * group_words(); }
  // Of a group, where block `to` finds what block `from` has for one of its rows; a group has far less than 2^31 words.
  FASTSEQ_DEVICE int part(int to, int from, int row) const {
    return ((to * call.blocks + from) * Tile::kRows + row) * Tile::kUnits;
  }
  FASTSEQ_DEVICE uint32_t* slot(int s) const { return exchange + (slot_of(s) ? slot_words() : 0); }
  // Steps are undone from the last in the order of the forward recurrence. All rows are exchanged at every step.
  FASTSEQ_DEVICE int time_of(int s) const { return own.reverse ? s : longest - 1 - s; }
  FASTSEQ_DEVICE bool alive(int row, int s) const { return time_of(s) < steps[row]; }

  // Numbers k and k + 1 of row j of the transpose: their column is unit * 4 + gate.
  FASTSEQ_DEVICE uint32_t weight_pair(int64_t j, int k) const {
    const int64_t H = anew(call.shape.H), unit = first_unit + k / 4;
    if (unit >= H || j >= H) return 0;
    const uint16_t* const from = static_cast<const uint16_t*>(own.weight_hh) + unit * H + j;
    return from[k % 4 * H * H] | static_cast<uint32_t>(from[(k % 4 + 1) * H * H]) << 16;
  }

  // Tile `tile` of this warp: band tile / kBands of its bands, and of that the one at depth tile % kBands.
  FASTSEQ_DEVICE int first_of_band(int band) const { return 16 * (warp * Tile::kBackwardBands + band); }

  FASTSEQ_DEVICE void load_tile(int tile, uint32_t (&to)[4]) const {
    FASTSEQ_UNROLL
    for (int r = 0; r < 4; ++r) {
      const Place at = place_in_a(lane, 2 * r);
      to[r] = weight_pair(first_of_band(tile / Tile::kBands) + at.row, 16 * (tile % Tile::kBands) + at.column);
    }
  }

  FASTSEQ_DEVICE uint32_t* shared_tile(int tile) const {
    return reinterpret_cast<uint32_t*>(shared_weights) + ((warp * Tile::kInShared + tile) * 32 + lane) * 4;
  }

  FASTSEQ_DEVICE void begin(Cell (&cells)[Tile::kCells]) {
    FASTSEQ_UNROLL
    for (int tile = 0; tile < Tile::kInRegisters; ++tile) load_tile(tile, weights[tile]);
    for (int tile = 0; tile < Tile::kInShared; ++tile) {
      uint32_t found[4];
      load_tile(Tile::kInRegisters + tile, found);
      for (int r = 0; r < 4; ++r) shared_tile(tile)[r] = found[r];
    }
    for (int row = thread_index(); row < Tile::kRows; row += Tile::kThreads) {
      steps[row] = steps_of(call.shape, first_row + row);
    }
    sync_block();
    for (int row = 0; row < Tile::kRows; ++row) longest = steps[row] > longest ? steps[row] : longest;
    FASTSEQ_UNROLL
    for (int n = 0; n < Tile::kCells; ++n) {
      const int at = thread_index() + n * Tile::kThreads;
      Cell& cell = cells[n];
      cell = {at % Tile::kUnits, at / Tile::kUnits, 0.0f, 0.0f};
      if (!exists(cell)) continue;
      const int64_t last = place(cell);
      cell.dh = own.dh_n ? Low::wide(static_cast<const uint16_t*>(own.dh_n)[last]) : 0.0f;
      cell.dc = own.dc_n ? own.dc_n[last] : 0.0f;
    }
  }

  FASTSEQ_DEVICE bool exists(const Cell& cell) const {
    return cell.row < Tile::kRows && first_unit + cell.unit < call.shape.H && first_row + cell.row < call.shape.B;
  }
  FASTSEQ_DEVICE int64_t place(const Cell& cell) const {  // in [B, H]
    return (first_row + cell.row) * call.shape.H + first_unit + cell.unit;
  }

  // The sum of what all blocks have found at step s, for one cell.
  FASTSEQ_DEVICE float sum_of_parts(const Cell& cell, int s) const {
    constexpr int kSome = 4;
    const uint32_t* const from = slot(s) + part(block_x(), 0, cell.row) + cell.unit;
    float sum = 0.0f;
    for (int first = 0; first < call.blocks; first += kSome) {
      uint32_t found[kSome];
      FASTSEQ_UNROLL
      for (int n = 0; n < kSome; ++n) {
        if (first + n < call.blocks) found[n] = read_word(from + (first + n) * (Tile::kRows * Tile::kUnits));
      }
      FASTSEQ_UNROLL
      for (int n = 0; n < kSome; ++n) {
        if (first + n >= call.blocks) continue;
        Waiting wait;
        while (Float::stale(found[n], s)) {
          wait.look_again();
          found[n] = read_word(from + (first + n) * (Tile::kRows * Tile::kUnits));
        }
        sum += float_of(Float::read(found[n]));
      }
    }
    return sum;
  }

  struct Kept {
    Gates gates;
    float c, c_before, dh;
  };

  FASTSEQ_DEVICE Kept ask(const Cell& cell, int t) const {
    const int64_t H = call.shape.H, unit = first_unit + cell.unit, b = first_row + cell.row;
    const int64_t at = element(call.shape, t, b);
    const uint16_t* const gates = static_cast<const uint16_t*>(own.gates) + at * 4 * H + unit;
    const int before = own.reverse ? t + 1 : t - 1;
    const bool first = own.reverse ? before == steps[cell.row] : t == 0;
    return {{Low::wide(gates[0]), Low::wide(gates[H]), Low::wide(gates[2 * H]), Low::wide(gates[3 * H])},
            own.c[at * H + unit],
            first ? own.c0[b * H + unit] : own.c[element(call.shape, before, b) * H + unit],
            own.dh ? Low::wide(static_cast<const uint16_t*>(own.dh)[at * H + unit]) : 0.0f};
  }

  FASTSEQ_DEVICE uint16_t* gradient(int s) const { return gradients + (s & 1) * Tile::kRows * Tile::kGateStride; }

  // Writes the gradients of one cell's pre-activations, to memory and for the product.
  FASTSEQ_DEVICE void give(const Cell& cell, Gates d, int s) const {
    const uint16_t i = Low::narrow(d.i), f = Low::narrow(d.f), g = Low::narrow(d.g), o = Low::narrow(d.o);
    uint32_t* const to = reinterpret_cast<uint32_t*>(gradient(s) + cell.row * Tile::kGateStride + 4 * cell.unit);
    to[0] = i | static_cast<uint32_t>(f) << 16, to[1] = g | static_cast<uint32_t>(o) << 16;
    if (exists(cell) && (alive(cell.row, s) || !call.shape.offsets)) write(cell, time_of(s), i, f, g, o);
  }
  FASTSEQ_DEVICE void write(const Cell& cell, int t, uint16_t i, uint16_t f, uint16_t g, uint16_t o) const {
    const int64_t H = call.shape.H, at = element(call.shape, t, first_row + cell.row) * 4 * H;
    uint16_t* const out = static_cast<uint16_t*>(own.dx_gates) + at + first_unit + cell.unit;
    out[0] = i, out[H] = f, out[2 * H] = g, out[3 * H] = o;
  }

  // What is kept is asked for before the wait for other blocks, which is longer.
  FASTSEQ_DEVICE void step_back(Cell (&cells)[Tile::kCells], int s) const {
    Kept kept[Tile::kCells];
    FASTSEQ_UNROLL
    for (int n = 0; n < Tile::kCells; ++n) {
      kept[n] = {};
      if (exists(cells[n]) && alive(cells[n].row, s)) kept[n] = ask(cells[n], time_of(s));
    }
    FASTSEQ_UNROLL
    for (int n = 0; n < Tile::kCells; ++n) {
      Cell& cell = cells[n];
      if (cell.row >= Tile::kRows) continue;
      if (s > 0 && exists(cell)) take(cell, s - 1);
      Gates d{};
      if (exists(cell) && alive(cell.row, s)) {
        const Kept& of = kept[n];
        d = cell_backward(of.gates, of.c, of.c_before, cell.dh + of.dh, cell.dc, call.shape);
      }
      give(cell, d, s);
    }
  }
  FASTSEQ_DEVICE void take(Cell& cell, int s) const {
    const float sum = sum_of_parts(cell, s);
    if (alive(cell.row, s)) cell.dh = sum;
  }

  // This block's part of the gradient of h, to the blocks that own the units.
  FASTSEQ_DEVICE void multiply(int s) const {
    const uint16_t* const from = gradient(s) + (lane % 8) * Tile::kGateStride + 8 * (lane / 8);
    FASTSEQ_UNROLL
    for (int band = 0; band < Tile::kBackwardBands; ++band) {
      if (first_of_band(band) >= call.blocks * Tile::kUnits) continue;
      float d[Tile::kRowBlocks][4] = {};
      FASTSEQ_UNROLL
      for (int tile = 0; tile < Tile::kBands; tile += 2) {
        uint32_t a[2][4];
        FASTSEQ_UNROLL
        for (int n = 0; n < 2; ++n) {
          const int which = band * Tile::kBands + tile + n;
          FASTSEQ_UNROLL
          for (int r = 0; r < 4; ++r) {
            a[n][r] = which < Tile::kInRegisters ? weights[which % Tile::kInRegisters][r]
                                                 : shared_tile(which - Tile::kInRegisters)[r];
          }
        }
        FASTSEQ_UNROLL
        for (int block = 0; block < Tile::kRowBlocks; ++block) {
          uint32_t b[4];
          load_blocks(b, from + 8 * block * Tile::kGateStride + 16 * tile);
          Low::multiply_add(d[block], a[0], b[0], b[1]);
          Low::multiply_add(d[block], a[1], b[2], b[3]);
        }
      }
      publish(first_of_band(band), d, s);
    }
  }

  FASTSEQ_DEVICE void publish(int first, const float (&d)[Tile::kRowBlocks][4], int s) const {
    const Place at = place_in_d(lane, 0);
    const int unit = first + at.row;  // and the one 8 further, which lies in the same block
    uint32_t* const to = slot(s) + part(unit / Tile::kUnits, block_x(), at.column) + unit % Tile::kUnits;
    FASTSEQ_UNROLL
    for (int block = 0; block < Tile::kRowBlocks; ++block) {
      FASTSEQ_UNROLL
      for (int i = 0; i < 4; ++i) {
        write_word(to + (8 * block + i % 2) * Tile::kUnits + i / 2 * 8, Float::write(bits_of(d[block][i]), s));
      }
    }
  }

  FASTSEQ_DEVICE void run() {
    Cell cells[Tile::kCells];
    begin(cells);
    for (int s = 0; s < longest; ++s) {
      step_back(cells, s);
      sync_block();
      multiply(s);
    }
    FASTSEQ_UNROLL
    for (int n = 0; n < Tile::kCells; ++n) end(cells[n]);
  }

  FASTSEQ_DEVICE void end(Cell& cell) const {
    if (!exists(cell)) return;
    if (longest > 0) take(cell, longest - 1);
    static_cast<uint16_t*>(own.dh0)[place(cell)] = Low::narrow(cell.dh);
    own.dc0[place(cell)] = cell.dc;
    for (int t = longest; !call.shape.offsets && t < call.shape.T; ++t) write(cell, t, 0, 0, 0, 0);
  }
};

}  // namespace fastseq::cuda
