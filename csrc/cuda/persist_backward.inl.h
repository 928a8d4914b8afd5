// The backward recurrence of one block of threads: the same rows of weight_hh as in forward, transposed.
//
// A step: the threads add up what all blocks have found for the gradient of h of this block's units, go back through
// the cells, and put the gradients of the pre-activations into shared memory; every warp multiplies them with its
// tiles, which gives this block's part of the gradient of h for all units, and hands each part to the block that owns
// the unit. So float32 sums of H units go between blocks instead of 4 * H numbers; they are added in a fixed order. In
// a cluster they go into shared memory, see forward.
namespace fastseq::cuda {

struct BackwardCall {
  PersistShape shape;
  PersistBackward direction[2];
  uint32_t* exchange;  // [direction][slot][group][to block][from block][part of a tile], zeros at the start
  int blocks, groups;
};

template <class Low, class Tile>
struct Backward {
  using Call = BackwardCall;
  using Sizes = Tile;
  static constexpr size_t kShared = Tile::kBackwardShared;
  static constexpr bool kExists = true;

  const BackwardCall& call;
  const PersistBackward& own;
  int lane, warp;
  int first_unit, first_row, rows;  // rows: those that there are
  Arrivals* arrivals;               // of even and odd steps, in a cluster
  uint32_t* room;                   // [slot][from block][part], in a cluster
  float* sums;                      // [adder][part], those that are added up
  uint16_t *shared_weights, *gradients;
  int* steps;          // of each row
  uint32_t* exchange;  // of this group
  int longest = 0;
  uint32_t weights[Tile::kInRegisters][4];

  // A thread's cells are those of one unit, every kApart-th row.
  struct Cell {
    float dh, dc;
    int steps;  // of the row; 0 where there is no such cell
  };
  static constexpr int kApart = Tile::kThreads / Tile::kUnits;

  FASTSEQ_DEVICE explicit Backward(const BackwardCall& given) : call(given), own(given.direction[block_z()]) {
    lane = thread_index() % 32, warp = thread_index() / 32;
    first_unit = block_x() * Tile::kUnits;
    first_row = block_y() * Tile::kRows;  // far from 2^31: a launch has less than 2^16 groups
    rows = static_cast<int>(call.shape.B - first_row < Tile::kRows ? call.shape.B - first_row : Tile::kRows);
    arrivals = reinterpret_cast<Arrivals*>(shared_bytes());
    room = reinterpret_cast<uint32_t*>(shared_bytes() + Tile::kArrivals);
    sums = reinterpret_cast<float*>(room + Tile::kRoom);
    shared_weights = reinterpret_cast<uint16_t*>(sums + Tile::kAdders * Tile::kPart);
    gradients = shared_weights + Tile::kSharedTiles;
    steps = reinterpret_cast<int*>(gradients + Tile::kRows * Tile::kGateStride);
    exchange = call.exchange + block_z() * 2 * slot_words() + block_y() * group_words();
  }

  FASTSEQ_DEVICE int64_t group_words() const { return int64_t(call.blocks) * call.blocks * Tile::kPart; }
  FASTSEQ_DEVICE int64_t slot_words() const { return call.groups * group_words(); }
  // Where block `to` finds what block `from` has for it; in a cluster that is in its own shared memory.
  FASTSEQ_DEVICE uint32_t* part(int s, int to, int from) const {
    if constexpr (Tile::kCluster) return room + (slot_of(s) * (Tile::kDepth / Tile::kUnits) + from) * Tile::kPart;
    return exchange + (slot_of(s) ? slot_words() : 0) + (to * call.blocks + from) * Tile::kPart;
  }
  // Steps are undone from the last in the order of the forward recurrence. Rows are exchanged at every step.
  FASTSEQ_DEVICE int time_of(int s) const { return own.reverse ? s : longest - 1 - s; }

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

  FASTSEQ_DEVICE Words* shared_tile(int tile) const {
    return reinterpret_cast<Words*>(shared_weights) + (warp * Tile::kInShared + tile) * 32 + lane;
  }

  FASTSEQ_DEVICE void begin(Cell (&cells)[Tile::kCells]) {
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
    sync_block();
    for (int row = 0; row < Tile::kRows; ++row) longest = steps[row] > longest ? steps[row] : longest;
    FASTSEQ_UNROLL
    for (int n = 0; n < Tile::kCells; ++n) {
      Cell& cell = cells[n];
      cell = {0.0f, 0.0f, 0};
      if (!exists(n)) continue;
      cell.steps = steps[row_of(n)];
      const int64_t last = place(n);
      cell.dh = own.dh_n ? Low::wide(static_cast<const uint16_t*>(own.dh_n)[last]) : 0.0f;
      cell.dc = own.dc_n ? own.dc_n[last] : 0.0f;
    }
    if constexpr (Tile::kCluster) open();
  }

  // In a cluster: the barriers of the first two steps.
  FASTSEQ_DEVICE void open() const {
    for (int s = 0; thread_index() == 0 && s < 2; ++s) {
      prepare(arrivals + s);
      expect_parts(s);
    }
    sync_cluster();
  }
  FASTSEQ_DEVICE void expect_parts(int s) const {
    // 16 bytes for two rows of two units
    if (s < longest)
      expect(arrivals + slot_of(s), static_cast<uint32_t>(call.blocks * Tile::kUnits * 8 * ((rows + 1) / 2)));
  }
  FASTSEQ_DEVICE void await(int s) const {
    Waiting wait;
    while (!arrived(arrivals + slot_of(s), s / 2 % 2)) wait.look_again();
    if (thread_index() == 0) expect_parts(s + 2);
  }

  FASTSEQ_DEVICE int unit() const { return thread_index() % Tile::kUnits; }  // of the block
  FASTSEQ_DEVICE int row_of(int n) const { return thread_index() / Tile::kUnits + n * kApart; }
  FASTSEQ_DEVICE bool exists(int n) const { return row_of(n) < rows && first_unit + unit() < call.shape.H; }
  FASTSEQ_DEVICE int64_t place(int n) const {  // in [B, H]
    return (first_row + row_of(n)) * call.shape.H + first_unit + unit();
  }

  // Adds up what all blocks have found at step s: every thread four neighbours, of two rows, over some of the blocks.
  FASTSEQ_DEVICE void gather(int s) const {
    constexpr int kQuads = Tile::kPart / 4,
                  kSome = Tile::kCells < 4 || Tile::kInRegisters < 32 ? 8 : 2;  // as registers go
    if constexpr (Tile::kCluster) await(s);
    const int quad = thread_index() % kQuads;
    const uint32_t* const from = part(s, block_x(), 0) + quad * 4;
    const int blocks = Tile::first_row_of(quad) < rows ? call.blocks : 0;
    float sum[4] = {};
    for (int first = thread_index() / kQuads; first < blocks; first += kSome * Tile::kAdders) {
      Words found[kSome];
      const auto block_of = [&](int n) { return first + n * Tile::kAdders; };
      FASTSEQ_UNROLL
      for (int n = 0; n < kSome; ++n) {
        found[n] = {Float::mark(s + 2), 0, 0, 0};  // stale
        if (Tile::kCluster && block_of(n) < blocks)
          found[n] = *reinterpret_cast<const Words*>(from + block_of(n) * Tile::kPart);
      }
      if constexpr (!Tile::kCluster) {
        await_all<kSome>([&](int n) { return block_of(n) < blocks && stale(found[n], s); },
                         [&](int n) { found[n] = read_words(from + block_of(n) * Tile::kPart); });
      }
      FASTSEQ_UNROLL
      for (int n = 0; n < kSome; ++n) {
        if (block_of(n) >= blocks) continue;
        sum[0] += sum_in(found[n].x), sum[1] += sum_in(found[n].y);
        sum[2] += sum_in(found[n].z), sum[3] += sum_in(found[n].w);
      }
    }
    reinterpret_cast<Four*>(sums)[thread_index()] = {sum[0], sum[1], sum[2], sum[3]};
  }
  static FASTSEQ_DEVICE float sum_in(uint32_t word) { return float_of(Tile::kCluster ? word : Float::read(word)); }
  static FASTSEQ_DEVICE bool stale(const Words& w, int s) {
    return Float::stale(w.x, s) | Float::stale(w.y, s) | Float::stale(w.z, s) | Float::stale(w.w, s);
  }

  // What was added up for one cell.
  FASTSEQ_DEVICE float sum_of(int n) const {
    float sum = 0.0f;
    FASTSEQ_UNROLL
    for (int from = 0; from < Tile::kAdders; ++from) {
      sum += sums[from * Tile::kPart + Tile::place_in_part(unit(), row_of(n))];
    }
    return sum;
  }

  // What forward kept of a cell, in few registers.
  struct Kept {
    uint32_t i_f, g_o;
    float c, c_before;
    uint16_t dh;
  };
  static FASTSEQ_DEVICE Gates gates_in(const Kept& of) {
    return {Low::wide(of.i_f & 0xffff), Low::wide(of.i_f >> 16), Low::wide(of.g_o & 0xffff), Low::wide(of.g_o >> 16)};
  }

  // Where a thread's first cell is at time t, in [.., H]; the next is kApart * H numbers after it.
  FASTSEQ_DEVICE int64_t cell_at(int t) const {
    return element(call.shape, t, first_row + row_of(0)) * call.shape.H + first_unit + unit();
  }

  FASTSEQ_DEVICE void ask(const Cell (&cells)[Tile::kCells], int t, int64_t at, Kept (&kept)[Tile::kCells]) const {
    const int H = static_cast<int>(call.shape.H), before = own.reverse ? t + 1 : t - 1;
    const int64_t at_before = before >= 0 && before < longest ? cell_at(before) : 0;
    const uint16_t* const gates = static_cast<const uint16_t*>(own.gates) + 4 * at - 3 * (first_unit + unit());
    FASTSEQ_UNROLL
    for (int n = 0; n < Tile::kCells; ++n) {
      kept[n] = {};
      const Cell& cell = cells[n];
      if (t >= cell.steps) continue;
      const int more = n * kApart * H;
      const bool first = own.reverse ? before == cell.steps : t == 0;
      const uint16_t* const of = gates + 4 * more;
      kept[n].i_f = of[0] | static_cast<uint32_t>(of[H]) << 16;
      kept[n].g_o = of[2 * H] | static_cast<uint32_t>(of[3 * H]) << 16;
      kept[n].c = own.c[at + more], kept[n].c_before = first ? own.c0[place(n)] : own.c[at_before + more];
      if (own.dh) kept[n].dh = static_cast<const uint16_t*>(own.dh)[at + more];
    }
  }

  // Writes the gradients of one cell's pre-activations for the product, and to memory from `out` on.
  FASTSEQ_DEVICE void give(int n, Gates d, bool kept, uint16_t* out) const {
    const uint16_t i = Low::narrow(d.i), f = Low::narrow(d.f), g = Low::narrow(d.g), o = Low::narrow(d.o);
    uint32_t* const to = reinterpret_cast<uint32_t*>(gradients + row_of(n) * Tile::kGateStride + 4 * unit());
    *reinterpret_cast<Two*>(to) = {i | static_cast<uint32_t>(f) << 16, g | static_cast<uint32_t>(o) << 16};
    if (kept || (exists(n) && !call.shape.offsets)) write(out, i, f, g, o);
  }
  FASTSEQ_DEVICE void write(uint16_t* out, uint16_t i, uint16_t f, uint16_t g, uint16_t o) const {
    const int H = static_cast<int>(call.shape.H);
    out[0] = i, out[H] = f, out[2 * H] = g, out[3 * H] = o;
  }
  FASTSEQ_DEVICE uint16_t* gradients_at(int64_t at) const {
    return static_cast<uint16_t*>(own.dx_gates) + 4 * at - 3 * (first_unit + unit());
  }

  // What is kept is asked for before the wait for other blocks, which is longer.
  FASTSEQ_DEVICE void step_back(Cell (&cells)[Tile::kCells], int s) const {
    const int t = time_of(s);
    const int64_t at = cell_at(t);
    Kept kept[Tile::kCells];
    ask(cells, t, at, kept);
    if (s > 0) gather(s - 1);
    sync_block();  // which also tells that the gradients of the step before are multiplied
    uint16_t* const out = gradients_at(at);
    FASTSEQ_UNROLL
    for (int n = 0; n < Tile::kCells; ++n) {
      Cell& cell = cells[n];
      if (row_of(n) >= Tile::kRows) continue;
      if (s > 0 && time_of(s - 1) < cell.steps) cell.dh = sum_of(n);
      Gates d{};
      if (t < cell.steps) {
        const Kept& of = kept[n];
        d = cell_backward(gates_in(of), of.c, of.c_before, cell.dh + Low::wide(of.dh), cell.dc, call.shape);
      }
      give(n, d, t < cell.steps, out + 4 * n * kApart * static_cast<int>(call.shape.H));
    }
  }
  // This block's part of the gradient of h, to the blocks that own the units. Four bands go side by side.
  FASTSEQ_DEVICE void multiply(int s) const {
    constexpr int kSome = least(4, Tile::kBackwardBands), kLoads = Tile::kBands / 2;
    const uint16_t* const from = gradients + (lane % 8) * Tile::kGateStride + 8 * (lane / 8);
    FASTSEQ_UNROLL
    for (int block = 0; block < Tile::kRowBlocks; ++block) {
      if (8 * block >= rows) continue;
      uint32_t b[kLoads][4];
      FASTSEQ_UNROLL
      for (int n = 0; n < kLoads; ++n) load_blocks(b[n], from + 8 * block * Tile::kGateStride + 32 * n);
      FASTSEQ_UNROLL
      for (int band = 0; band < Tile::kBackwardBands; band += kSome) {
        if (first_of_band(band) >= call.blocks * Tile::kUnits) continue;
        float d[kSome][4] = {};
        FASTSEQ_UNROLL
        for (int n = 0; n < Tile::kBands * kSome; ++n) {
          const int tile = n / kSome, of = n % kSome, which = (band + of) * Tile::kBands + tile;
          const uint32_t first = b[tile / 2][tile % 2 * 2], second = b[tile / 2][tile % 2 * 2 + 1];
          if (which < Tile::kInRegisters) {
            Low::multiply_add(d[of], weights[which % Tile::kInRegisters], first, second);
          } else {
            const Words a = *shared_tile(which - Tile::kInRegisters);
            Low::multiply_add(d[of], {a.x, a.y, a.z, a.w}, first, second);
          }
        }
        FASTSEQ_UNROLL
        for (int of = 0; of < kSome; ++of) publish(first_of_band(band + of), block, d[of], s);
      }
    }
  }

  // 16 units of 8 rows.
  FASTSEQ_DEVICE void publish(int first, int block, const float (&d)[4], int s) const {
    const int to = first / Tile::kUnits, unit = first % Tile::kUnits + place_in_d(lane, 0).row;
    const int row = 8 * block + place_in_d(lane, 0).column;
    if (row >= rows || to >= call.blocks) return;
    const bool odd = unit / 16 & 1;
    uint32_t* const at = part(s, to, block_x()) + (Tile::place_in_part(unit, row) & ~3);
    const auto number = [&](int n) { return bits_of(odd ? d[n ^ 1] : d[n]); };
    if constexpr (Tile::kCluster) {
      push_words(to, at, {number(0), number(1), number(2), number(3)}, arrivals + slot_of(s));
    } else {
      const auto word = [&](int n) { return Float::write(number(n), s); };
      write_words(at, {word(0), word(1), word(2), word(3)});
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
    if (longest > 0) {
      gather(longest - 1);
      sync_block();
    }
    FASTSEQ_UNROLL
    for (int n = 0; n < Tile::kCells; ++n) end(n, cells[n]);
  }

  FASTSEQ_DEVICE void end(int n, Cell& cell) const {
    if (!exists(n)) return;
    if (longest > 0 && time_of(longest - 1) < cell.steps) cell.dh = sum_of(n);
    static_cast<uint16_t*>(own.dh0)[place(n)] = Low::narrow(cell.dh);
    own.dc0[place(n)] = cell.dc;
    for (int t = longest; !call.shape.offsets && t < call.shape.T; ++t) {
      write(gradients_at(cell_at(t) + n * kApart * call.shape.H), 0, 0, 0, 0);
    }
  }
};

}  // namespace fastseq::cuda
