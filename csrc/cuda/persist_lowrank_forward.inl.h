// The forward recurrence of one block of threads, for a warp that holds its tiles of both factors all the time.
//
// A step: every warp multiplies the states of its units with its columns of down; the sums of all warps of all blocks
// are rounded and multiplied with its rows of up; the lanes go on to their cells. Rows that have not begun keep their
// first state, rows that have ended their last. Inputs of the step are asked for before all that.
namespace fastseq::cuda {

struct LowRankForwardCall {
  PersistLowRankShape shape;
  PersistLowRankForward direction;
  uint32_t* exchange;  // [slot][group][from block][entry], zeros at the start
  int blocks, groups;  // along the units and along the batch
};

template <class Low, class Tile>
struct LowRankForward : LowRankSums<LowRankForwardCall, PersistLowRankForward, Low, Tile> {
  using Call = LowRankForwardCall;
  using Sizes = Tile;
  static constexpr size_t kShared = Tile::kShared;

  using Base = LowRankSums<LowRankForwardCall, PersistLowRankForward, Low, Tile>;
  using Base::call, Base::own, Base::steps, Base::longest, Base::unit, Base::row_of;

  uint32_t ups[4 * Tile::kRankTiles][4], downs[Tile::kSumTiles][4];
  float c[Tile::kRowBlocks][4];
  uint32_t h[Tile::kRowBlocks][2];  // of each unit, two rows

  FASTSEQ_DEVICE explicit LowRankForward(const Call& given) : Base(given) {
    this->paired = in_words(call.shape.H, own.x_gates, own.h, own.gates);
  }

  FASTSEQ_DEVICE int time_of(int s) const { return own.reverse ? longest - 1 - s : s; }

  FASTSEQ_DEVICE void begin() {
    this->load_tiles(ups, [&](int tile, int row, int k) {
      return this->up(tile / Tile::kRankTiles, row, 16 * (tile % Tile::kRankTiles) + k);
    });
    this->load_tiles(downs, [&](int tile, int sum, int row) { return this->down(row, 16 * tile + sum); });
    this->count_steps();
    FASTSEQ_UNROLL
    for (int n = 0; n < 4 * Tile::kRowBlocks; ++n) {
      const int block = n / 4, i = n % 4, row = row_of(block) + this->second_row(i), more = this->second_unit(i);
      const bool here = this->exists(row, more);
      const int64_t at = this->place(row) + more;
      const uint16_t first = here ? static_cast<const uint16_t*>(own.h0)[at] : 0;
      c[block][i] = here ? own.c0[at] : 0.0f;
      h[block][more] = i % 2 ? h[block][more] | static_cast<uint32_t>(first) << 16 : first;
      if (here && steps[row] == 0) keep_last(block, i, first);
    }
  }

  // Pre-activations without the part of h, of this lane's two rows: of each gate, those of its two units.
  FASTSEQ_DEVICE void ask(int s, uint32_t (&x)[Tile::kRowBlocks][2][4]) const {
    const int64_t H = call.shape.H;
    FASTSEQ_UNROLL
    for (int n = 0; n < 2 * Tile::kRowBlocks; ++n) {
      const int row = row_of(n / 2) + n % 2, t = time_of(s);
      const bool here = unit() < H && t < steps[row];
      const int64_t at = here ? element(call.shape, t, this->first_row() + row) * 4 * H + unit() : 0;
      FASTSEQ_UNROLL
      for (int gate = 0; gate < 4; ++gate) x[n / 2][n % 2][gate] = here ? this->two(own.x_gates, at + gate * H) : 0;
    }
  }

  // This warp's part of down h.
  FASTSEQ_DEVICE void narrow() const {
    FASTSEQ_UNROLL
    for (int block = 0; block < Tile::kRowBlocks; ++block) {
      const uint32_t b0 = transposed(h[block][0]), b1 = transposed(h[block][1]);
      FASTSEQ_UNROLL
      for (int tile = 0; tile < Tile::kSumTiles; ++tile) {
        float d[4] = {};
        Low::multiply_add(d, downs[tile], b0, b1);
        this->give(tile, block, d);
      }
    }
  }

  // up times the sums of 8 rows, gate by gate.
  FASTSEQ_DEVICE void widen(int block, float (&d)[4][4]) const {
    FASTSEQ_UNROLL
    for (int n = 0; n < 16; ++n) d[n / 4][n % 4] = 0.0f;
    FASTSEQ_UNROLL
    for (int tile = 0; tile < Tile::kSumTiles; tile += 2) {
      uint32_t b[4];
      this->take(b, tile, block);
      FASTSEQ_UNROLL
      for (int n = 0; n < 8; ++n) {
        const int gate = n % 4, of = tile + n / 4, k = of % Tile::kRankTiles;
        if (Tile::kDowns == 1 || of / Tile::kRankTiles == gate) {
          Low::multiply_add(d[gate], ups[gate * Tile::kRankTiles + k], b[n / 4 * 2], b[n / 4 * 2 + 1]);
        }
      }
    }
  }

  FASTSEQ_DEVICE void keep_last(int block, int i, uint16_t state) const {
    const int64_t at = this->place(row_of(block) + this->second_row(i)) + this->second_unit(i);
    static_cast<uint16_t*>(own.h_n)[at] = state;
    own.c_n[at] = c[block][i];
  }

  // One step of the cells of 8 rows; activated gates of both units are left in `gates`, by row.
  FASTSEQ_DEVICE void step(int s, int block, const uint32_t (&x)[2][4], uint32_t (&gates)[2][4]) {
    float d[4][4];
    widen(block, d);
    const int t = time_of(s);
    FASTSEQ_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int n = this->second_row(i), more = this->second_unit(i), row = row_of(block) + n;
      const Gates z{d[0][i] + this->number(x[n][0], more), d[1][i] + this->number(x[n][1], more),
                    d[2][i] + this->number(x[n][2], more), d[3][i] + this->number(x[n][3], more)};
      const Gates a = activated(z, call.shape.hard, slope_of(call.shape));
      const float after = a.f * c[block][i] + a.i * a.g;
      const uint16_t low[4] = {Low::narrow(a.i), Low::narrow(a.f), Low::narrow(a.g), Low::narrow(a.o)};
      FASTSEQ_UNROLL
      for (int gate = 0; gate < 4; ++gate) {
        gates[n][gate] = more ? gates[n][gate] | static_cast<uint32_t>(low[gate]) << 16 : low[gate];
      }
      if (t >= steps[row] || !this->exists(row, more)) continue;
      const uint16_t state = Low::narrow(a.o * tanh_of(after));
      c[block][i] = after;
      h[block][more] = (h[block][more] & (n ? 0xffff : 0xffff0000)) | static_cast<uint32_t>(state) << 16 * n;
      if (t == (own.reverse ? 0 : steps[row] - 1)) keep_last(block, i, state);
    }
  }

  // What is kept of a step, from the gates that it left and the states as they are after it.
  FASTSEQ_DEVICE void keep(int s, const uint32_t (&gates)[Tile::kRowBlocks][2][4]) const {
    const int64_t H = call.shape.H;
    FASTSEQ_UNROLL
    for (int at = 0; at < 2 * Tile::kRowBlocks; ++at) {
      const int block = at / 2, n = at % 2, row = row_of(block) + n, t = time_of(s);
      if (t >= steps[row]) {
        clear(row, t);
        continue;
      }
      if (!this->exists(row, 0)) continue;
      const int64_t to = element(call.shape, t, this->first_row() + row) * H + unit();
      this->put_two(own.h, to, (h[block][0] >> 16 * n & 0xffff) | h[block][1] >> 16 * n << 16);
      if (own.c) {
        own.c[to] = c[block][n];
        if (this->exists(row, 1)) own.c[to + 1] = c[block][n + 2];
      }
      if (own.gates) write_gates(row, t, gates[block][n]);
    }
  }
  FASTSEQ_DEVICE void write_gates(int row, int t, const uint32_t (&gates)[4]) const {
    const int64_t H = call.shape.H, to = element(call.shape, t, this->first_row() + row) * 4 * H + unit();
    FASTSEQ_UNROLL
    for (int gate = 0; gate < 4; ++gate) this->put_two(own.gates, to + gate * H, gates[gate]);
  }

  // Zeros where a row of dense data has ended.
  FASTSEQ_DEVICE void clear(int row, int t) const {
    if (call.shape.offsets || !this->exists(row, 0)) return;
    const int64_t to = element(call.shape, t, this->first_row() + row) * call.shape.H + unit();
    this->put_two(own.h, to, 0);
    if (own.c) {
      own.c[to] = 0.0f;
      if (this->exists(row, 1)) own.c[to + 1] = 0.0f;
    }
    if (own.gates) write_gates(row, t, {0, 0, 0, 0});
  }

  // A step is written to memory while the next one waits for other blocks.
  FASTSEQ_DEVICE void run() {
    begin();
    uint32_t gates[Tile::kRowBlocks][2][4];
    for (int s = 0; s < longest; ++s) {
      uint32_t x[Tile::kRowBlocks][2][4];
      ask(s, x);
      narrow();
      this->collect(s, [&] {
        if (s > 0) keep(s - 1, gates);
      });
      FASTSEQ_UNROLL
      for (int block = 0; block < Tile::kRowBlocks; ++block) step(s, block, x[block], gates[block]);
    }
    if (longest > 0) keep(longest - 1, gates);
    for (int t = longest; t < call.shape.T; ++t) {
      for (int n = 0; n < 2 * Tile::kRowBlocks; ++n) clear(row_of(n / 2) + n % 2, t);
    }
  }
};

}  // namespace fastseq::cuda
