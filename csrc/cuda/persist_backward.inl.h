// The backward recurrence of one block of threads: the same rows of weight_hh as in forward, transposed.
//
// A step: the threads add up what all blocks have found for the gradient of h of this block's units, go back through
// the cells, and put the gradients of the pre-activations into shared memory; every warp multiplies them with its
// tiles, which gives this block's part of the gradient of h for all units, and hands each part to the block that owns
// the unit. So float32 sums of H units go between blocks instead of 4 * H numbers; they are added in a fixed order. In
// a cluster they go into shared memory, see forward. What forward kept of a step is asked for a step before in a
// cluster, and in a grid before the wait for other blocks, which is longer.
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
  int zero, H;                      // zero: see after()
  int first_unit, first_row, rows;  // rows: those that there are
  int self, blocks, expected;  // in a cluster: this block, how many there are, the bytes that they push into this one
  int packed, has_dh, reverse;
  Arrivals* arrivals;  // of even and odd steps, in a cluster
  uint32_t* room;      // [slot][from block][part], in a cluster
  float* sums;         // [adder][part], those that are added up
  uint16_t *shared_weights, *gradients;
  int* steps;          // of each row
  uint32_t* exchange;  // of this group
  int longest = 0;
  uint32_t weights[Tile::kInRegisters][4];

  // A thread's cells are those of one unit, every kApart-th row.
  struct Cell {
    float dh, dc, c0;
    int steps;  // of the row; 0 where there is no such cell
  };
  static constexpr int kApart = Tile::kThreads / Tile::kUnits;
  static constexpr bool kFull = Tile::kCells >= 4 && Tile::kInRegisters >= 32;  // no register is left

  FASTSEQ_DEVICE explicit Backward(const BackwardCall& given) : call(given), own(given.direction[block_z()]) {
    lane = thread_index() % 32, warp = thread_index() / 32;
    zero = Tile::kCluster ? call.blocks >> 24 : 0, H = static_cast<int>(call.shape.H) + zero;  // there are less blocks
    self = Tile::kCluster ? anew(block_x()) : block_x(), blocks = Tile::kCluster ? anew(call.blocks) : call.blocks;
    packed = anew(int{call.shape.offsets != nullptr}), has_dh = anew(int{own.dh != nullptr});
    reverse = anew(int{own.reverse});
    first_unit = block_x() * Tile::kUnits;
    first_row = block_y() * Tile::kRows;  // far from 2^31: a launch has less than 2^16 groups
    rows = static_cast<int>(call.shape.B - first_row < Tile::kRows ? call.shape.B - first_row : Tile::kRows);
    arrivals = reinterpret_cast<Arrivals*>(shared_bytes());
    room = reinterpret_cast<uint32_t*>(shared_bytes() + Tile::kArrivals);
    sums = reinterpret_cast<float*>(room + Tile::kRoom);
    shared_weights = reinterpret_cast<uint16_t*>(sums + Tile::kAdders * Tile::kPart);
    gradients = shared_weights + Tile::kSharedTiles;
    steps = reinterpret_cast<int*>(gradients + Tile::kRows * Tile::kGateStride);
    expected = anew(call.blocks * Tile::kUnits * 8 * ((rows + 1) / 2));  // 16 bytes for two rows of two units
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
  FASTSEQ_DEVICE int time_of(int s) const { return reverse ? s : longest - 1 - s; }

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
      cell = {0.0f, 0.0f, 0.0f, 0};
      if (!exists(n)) continue;
      cell.steps = steps[row_of(n)];
      const int64_t last = place(n);
      cell.dh = own.dh_n ? Low::wide(static_cast<const uint16_t*>(own.dh_n)[last]) : 0.0f;
      cell.dc = own.dc_n ? own.dc_n[last] : 0.0f;
      cell.c0 = own.c0[last];
    }
    if constexpr (Tile::kCluster) open();
  }

  // In a cluster: the barrier of the first step.
  FASTSEQ_DEVICE void open() const {
    if (thread_index() == 0) {
      prepare(arrivals), prepare(arrivals + 1);
      expect_parts(0);
    }
    sync_cluster();
  }
  // There may be none: then nobody waits for them.
  FASTSEQ_DEVICE void expect_parts(int s) const { expect(arrivals + slot_of(s), static_cast<uint32_t>(expected)); }
  FASTSEQ_DEVICE void await(int s) const {
    Waiting wait;
    while (!arrived(arrivals + slot_of(s), s >> 1 & 1)) wait.look_again();
  }

  FASTSEQ_DEVICE int unit() const { return thread_index() % Tile::kUnits; }  // of the block
  FASTSEQ_DEVICE int row_of(int n) const { return thread_index() / Tile::kUnits + n * kApart; }
  FASTSEQ_DEVICE bool exists(int n) const { return row_of(n) < rows && first_unit + unit() < call.shape.H; }
  FASTSEQ_DEVICE int64_t place(int n) const {  // in [B, H]
    return (first_row + row_of(n)) * call.shape.H + first_unit + unit();
  }

  // Adds up what all blocks have found at step s: every thread four neighbours, of two rows, over some of the blocks.
  FASTSEQ_DEVICE void gather(int s) const {
    constexpr int kQuads = Tile::kPart / 4, kMost = Tile::kDepth / Tile::kUnits / Tile::kAdders;
    constexpr int kSome = Tile::kCluster                                ? least(4, kMost > 0 ? kMost : 1)
                          : Tile::kCells < 2 || Tile::kInRegisters < 32 ? 8
                          : Tile::kCells < 4                            ? 4
                                                                        : 2;  // as registers go
    const int quad = thread_index() % kQuads, first = thread_index() / kQuads;
    const uint32_t* const from = part(s, self, 0) + quad * 4;
    const int end = Tile::first_row_of(quad) < rows ? blocks : 0;
    float sum[4] = {};
    if constexpr (Tile::kCluster) await(s);
    if constexpr (Tile::kCluster && !kFull) {
      FASTSEQ_UNROLL
      for (int n = 0; n < kMost || n == 0; n += kSome) add<kSome>(from, first + n * Tile::kAdders, end, s, sum);
    } else {
      FASTSEQ_ROLL
      for (int n = first; n < end; n += kSome * Tile::kAdders) add<kSome>(from, n, end, s, sum);
    }
    reinterpret_cast<Four*>(sums)[thread_index()] = {sum[0], sum[1], sum[2], sum[3]};
  }
  // Those of kSome blocks from `first` on, of which each is kAdders after the one before.
  template <int kSome>
  FASTSEQ_DEVICE void add(const uint32_t* from, int first, int end, int s, float (&sum)[4]) const {
    const auto block_of = [&](int n) { return first + n * Tile::kAdders; };
    const uint32_t stamp = Tile::kCluster ? 0 : Float::mark(s + 2);  // of what is stale
    Words found[kSome];
    FASTSEQ_UNROLL
    for (int n = 0; n < kSome; ++n) {
      found[n] = {stamp, 0, 0, 0};
      if (Tile::kCluster && block_of(n) < end) {
        found[n] = *reinterpret_cast<const Words*>(from + block_of(n) * Tile::kPart);
      }
    }
    if constexpr (!Tile::kCluster) {
      await_all<kSome>([&](int n) { return block_of(n) < end && stale(found[n], s); },
                       [&](int n) { found[n] = read_words(from + block_of(n) * Tile::kPart); });
    }
    FASTSEQ_UNROLL
    for (int n = 0; n < kSome; ++n) {
      if (!Tile::kCluster && block_of(n) >= end) continue;  // in a cluster zeros were found there
      sum[0] += sum_in(found[n].x), sum[1] += sum_in(found[n].y);
      sum[2] += sum_in(found[n].z), sum[3] += sum_in(found[n].w);
    }
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

  // What forward kept of a cell, as it was found, and the gradient of h from above.
  struct Kept {
    uint32_t i, f, g, o, dh;
    float c, c_before;
  };
  // Where the numbers of this thread's first cell are: of a step the gradients, of the next what is kept, and c of the
  // one after that. The next cell is kApart rows after it.
  struct Places {
    uint16_t* out;
    const uint16_t *gates, *dh;
    const float *c, *c_before;
    FASTSEQ_DEVICE Places(const Backward& of, int64_t at, int64_t more) {
      const auto gates_of = static_cast<const uint16_t*>(of.own.gates);
      out = static_cast<uint16_t*>(of.own.dx_gates) + of.gates_at(at), gates = gates_of + of.gates_at(at);
      dh = (of.has_dh ? static_cast<const uint16_t*>(of.own.dh) : gates_of) + at;
      c = of.own.c + at, c_before = c + more;
    }
    // What is asked for goes on by `more`, to where the step after that is `next` numbers away.
    FASTSEQ_DEVICE void move(int more, int next) {
      gates += 4 * int64_t{more}, dh += more, c = c_before, c_before += next;
    }
  };
  // Where a thread's first cell is at time t, in [.., H]; the next is kApart * H numbers after it. And in [.., 4H].
  FASTSEQ_DEVICE int64_t cell_at(int t) const {
    return element(call.shape, t, first_row + row_of(0)) * H + first_unit + unit();
  }
  FASTSEQ_DEVICE int64_t gates_at(int64_t cell) const { return 4 * cell - 3 * (first_unit + unit()); }

  // Whether a cell's row begins at time t, with c0.
  FASTSEQ_DEVICE bool is_first(int t, const Cell& cell) const { return reverse ? t + 1 == cell.steps : t == 0; }

  // Asks for what is kept of a step, in time for it.
  FASTSEQ_DEVICE void ask(const Places& at, const Cell (&cells)[Tile::kCells], int s,
                          Kept (&kept)[Tile::kCells]) const {
    const int t = time_of(s);
    FASTSEQ_UNROLL
    for (int n = 0; n < Tile::kCells; ++n) {
      const int more = n * kApart * H;
      const bool alive = static_cast<unsigned>(t) < static_cast<unsigned>(cells[n].steps);
      const uint16_t* const of = at.gates + 4 * more;
      kept[n].i = read_number(of, alive), kept[n].f = read_number(of + H, alive);
      kept[n].g = read_number(of + 2 * H, alive), kept[n].o = read_number(of + 3 * H, alive);
      kept[n].dh = read_number(at.dh + more, alive && has_dh);
      kept[n].c = read_number(at.c + more, alive);
      const bool first = is_first(t, cells[n]);
      const float* const before = kFull && first ? own.c0 + place(n) : at.c_before + more;
      kept[n].c_before = read_number(before, alive && (kFull || !first));
    }
  }

  // Gradients of the pre-activations of this thread's cells at step s, as they are multiplied.
  struct Gradients {
    uint32_t i_f, g_o;
  };
  FASTSEQ_DEVICE void step_back(Cell (&cells)[Tile::kCells], const Kept (&kept)[Tile::kCells], int s,
                                Gradients (&low)[Tile::kCells]) const {
    const int t = time_of(s);
    FASTSEQ_UNROLL
    for (int n = 0; n < Tile::kCells; ++n) {
      Cell& cell = cells[n];
      if (Tile::kRows < kApart && row_of(n) >= Tile::kRows) continue;
      const float sum = sum_of(n);
      if (s > 0 && time_of(s - 1) < cell.steps) cell.dh = sum;
      const Kept& of = kept[n];
      const auto wide = [&](uint32_t v) {
        return Low::wide(static_cast<uint16_t>(Tile::kCluster ? after(bits_of(sum), v, zero) : v));
      };
      float dc = cell.dc;
      const float c_before = !kFull && is_first(t, cell) ? cell.c0 : of.c_before;
      Gates d = cell_backward({wide(of.i), wide(of.f), wide(of.g), wide(of.o)}, of.c, c_before, cell.dh + wide(of.dh),
                              dc, call.shape);
      const bool alive = t < cell.steps;
      low[n] = {alive ? Low::pair(d.i, d.f) : 0, alive ? Low::pair(d.g, d.o) : 0};
      if (alive) cell.dc = dc;
      *reinterpret_cast<Two*>(gradients + row_of(n) * Tile::kGateStride + 4 * unit()) = {low[n].i_f, low[n].g_o};
    }
  }
  FASTSEQ_DEVICE void write(uint16_t* out, const Gradients& d) const {
    out[0] = static_cast<uint16_t>(d.i_f), out[H] = static_cast<uint16_t>(d.i_f >> 16);
    out[2 * H] = static_cast<uint16_t>(d.g_o), out[3 * H] = static_cast<uint16_t>(d.g_o >> 16);
  }

  // This block's part of the gradient of h, to the blocks that own the units, in four chains side by side.
  FASTSEQ_DEVICE void multiply(int s) const {
    constexpr int kSome = least(4, Tile::kBackwardBands), kChains = 4 / kSome, kLoads = Tile::kBands / 2;
    const uint16_t* const from = gradients + (lane % 8) * Tile::kGateStride + 8 * (lane / 8);
    FASTSEQ_UNROLL
    for (int block = 0; block < Tile::kRowBlocks; ++block) {
      if (8 * block >= rows) continue;
      uint32_t b[kLoads][4];
      FASTSEQ_UNROLL
      for (int n = 0; n < kLoads; ++n) load_blocks(b[n], from + 8 * block * Tile::kGateStride + 32 * n);
      FASTSEQ_UNROLL
      for (int band = 0; band < Tile::kBackwardBands; band += kSome) {
        if (first_of_band(band) >= blocks * Tile::kUnits) continue;
        float d[kSome][kChains][4] = {};
        FASTSEQ_UNROLL
        for (int n = 0; n < Tile::kBands * kSome; ++n) {
          const int tile = n / kSome, of = n % kSome, which = (band + of) * Tile::kBands + tile;
          const uint32_t first = b[tile / 2][tile % 2 * 2], second = b[tile / 2][tile % 2 * 2 + 1];
          float (&sum)[4] = d[of][tile % kChains];
          if (which < Tile::kInRegisters) {
            Low::multiply_add(sum, weights[which % Tile::kInRegisters], first, second);
          } else {
            const Words a = *shared_tile(which - Tile::kInRegisters);
            Low::multiply_add(sum, {a.x, a.y, a.z, a.w}, first, second);
          }
        }
        FASTSEQ_UNROLL
        for (int of = 0; of < kSome; ++of) {
          FASTSEQ_UNROLL
          for (int n = 4; n < 4 * kChains; ++n) d[of][0][n % 4] += d[of][n / 4][n % 4];
          publish(first_of_band(band + of), block, d[of][0], s);
        }
      }
    }
  }

  // 16 units of 8 rows.
  FASTSEQ_DEVICE void publish(int first, int block, const float (&d)[4], int s) const {
    const int to = first / Tile::kUnits, unit = first % Tile::kUnits + place_in_d(lane, 0).row;
    const int row = 8 * block + place_in_d(lane, 0).column;
    if (row >= rows || to >= blocks) return;
    const bool odd = unit / 16 & 1;
    uint32_t* const at = part(s, to, self) + (Tile::place_in_part(unit, row) & ~3);
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
    Kept kept[Tile::kCells];
    begin(cells);
    const auto apart_now = [&](int s) { return apart_from(call.shape, s, longest, [&](int n) { return time_of(n); }); };
    int apart = apart_now(0);
    const auto next_apart = [&](int s) { return of_lane(apart, s % 32) * H; };  // less than 2^31 numbers
    int more = next_apart(0);
    Places at(*this, longest > 0 ? cell_at(time_of(0)) : 0, more);
    if constexpr (Tile::kCluster) {
      ask(at, cells, 0, kept);
      at.move(more, next_apart(1));
    }
    for (int s = 0; s < longest; ++s) {
      if constexpr (!Tile::kCluster) {
        ask(at, cells, s, kept);
        at.move(more, next_apart(s + 1));
      }
      if (s > 0) gather(s - 1);
      sync_block();  // which also tells that the gradients of the step before are multiplied
      Gradients low[Tile::kCells];
      step_back(cells, kept, s, low);
      if constexpr (Tile::kCluster) ask(at, cells, s + 1, kept);
      sync_block();
      const auto keep = [&] {
        const int t = time_of(s);
        FASTSEQ_UNROLL
        for (int n = 0; n < Tile::kCells; ++n) {
          if (t < cells[n].steps || (!packed && exists(n))) write(at.out + 4 * n * kApart * H, low[n]);
        }
      };
      if constexpr (kFull) keep();
      multiply(s);
      if constexpr (!kFull) keep();
      if (Tile::kCluster && thread_index() == 0) expect_parts(s + 1);
      if (packed && (s + 2) % 32 == 0) apart = apart_now(s + 2);
      at.out += 4 * int64_t{more}, more = static_cast<int>(at.c_before - at.c);
      if constexpr (Tile::kCluster) at.move(more, next_apart(s + 2));
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
    for (int t = longest; !packed && t < call.shape.T; ++t) {
      const int64_t at = cell_at(t) + int64_t{n} * kApart * H;
      write(static_cast<uint16_t*>(own.dx_gates) + gates_at(at), {0, 0});
    }
  }
};

}  // namespace fastseq::cuda
