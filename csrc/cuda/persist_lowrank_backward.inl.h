// The backward recurrence of one block of threads: the same numbers of both factors as in forward, transposed.
//
// A step: the lanes go back through their cells; every warp multiplies the gradients of its pre-activations with its
// rows of up; the sums of all warps of all blocks are rounded, and multiplied with its columns of down they are the
// gradient of h of the step before.
namespace fastseq::cuda {

struct LowRankBackwardCall {
  PersistLowRankShape shape;
  PersistLowRankBackward direction;
  uint32_t* exchange;  // [slot][group][from block][entry], zeros at the start
  int blocks, groups;
};

template <class Low, class Tile>
struct LowRankBackward : LowRankSums<LowRankBackwardCall, PersistLowRankBackward, Low, Tile> {
  using Call = LowRankBackwardCall;
  using Sizes = Tile;
  static constexpr size_t kShared = Tile::kShared;

  using Base = LowRankSums<LowRankBackwardCall, PersistLowRankBackward, Low, Tile>;
  using Base::call, Base::own, Base::steps, Base::longest, Base::unit, Base::row_of;

  uint32_t ups[4 * Tile::kRankTiles][4], downs[Tile::kSumTiles][4];
  float dh[Tile::kRowBlocks][4], dc[Tile::kRowBlocks][4];

  FASTSEQ_DEVICE explicit LowRankBackward(const Call& given) : Base(given) {
    this->paired = in_words(call.shape.H, own.gates, own.dx_gates, own.dh);
  }

  // Steps are undone from the last in the order of the forward recurrence.
  FASTSEQ_DEVICE int time_of(int s) const { return own.reverse ? s : longest - 1 - s; }
  FASTSEQ_DEVICE bool alive(int row, int s) const { return time_of(s) < steps[row]; }

  FASTSEQ_DEVICE void begin() {
    this->load_tiles(ups, [&](int tile, int k, int row) {
      return this->up(tile / Tile::kRankTiles, row, 16 * (tile % Tile::kRankTiles) + k);
    });
    this->load_tiles(downs, [&](int tile, int row, int sum) { return this->down(row, 16 * tile + sum); });
    this->count_steps();
    FASTSEQ_UNROLL
    for (int n = 0; n < 4 * Tile::kRowBlocks; ++n) {
      const int i = n % 4, row = row_of(n / 4) + this->second_row(i), more = this->second_unit(i);
      const bool here = this->exists(row, more);
      const int64_t at = this->place(row) + more;
      dh[n / 4][i] = here && own.dh_n ? Low::wide(static_cast<const uint16_t*>(own.dh_n)[at]) : 0.0f;
      dc[n / 4][i] = here && own.dc_n ? own.dc_n[at] : 0.0f;
    }
  }

  // What forward kept of this lane's cells in a row, and the gradient of h from above.
  struct Kept {
    uint32_t gates[4], dh;
    float c[2], c_before[2];
  };

  FASTSEQ_DEVICE Kept ask(int row, int s) const {
    Kept found{};
    if (s >= longest || unit() >= call.shape.H || !alive(row, s)) return found;
    const int64_t H = call.shape.H, b = this->first_row() + row;
    const int t = time_of(s), before = own.reverse ? t + 1 : t - 1;
    const bool first = own.reverse ? before == steps[row] : t == 0;
    const int64_t at = element(call.shape, t, b);
    const float* const earlier = first ? own.c0 + b * H : own.c + element(call.shape, before, b) * H;
    FASTSEQ_UNROLL
    for (int gate = 0; gate < 4; ++gate) found.gates[gate] = this->two(own.gates, (at * 4 + gate) * H + unit());
    if (own.dh) found.dh = this->two(own.dh, at * H + unit());
    FASTSEQ_UNROLL
    for (int more = 0; more < 2; ++more) {
      if (!this->exists(row, more)) continue;
      found.c[more] = own.c[at * H + unit() + more], found.c_before[more] = earlier[unit() + more];
    }
    return found;
  }

  // Low gradients of the pre-activations of 8 rows: of each gate and unit, those of two rows.
  FASTSEQ_DEVICE void step_back(int block, const Kept (&kept)[2], int s, uint32_t (&low)[4][2]) {
    FASTSEQ_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int n = this->second_row(i), more = this->second_unit(i), row = row_of(block) + n;
      const auto gate = [&](int which) { return this->number(kept[n].gates[which], more); };
      Gates d{};
      if (this->exists(row, more) && alive(row, s)) {
        const float above = dh[block][i] + this->number(kept[n].dh, more);
        const Gates a{gate(0), gate(1), gate(2), gate(3)};
        d = cell_backward(a, kept[n].c[more], kept[n].c_before[more], above, dc[block][i], call.shape);
      }
      const uint16_t found[4] = {Low::narrow(d.i), Low::narrow(d.f), Low::narrow(d.g), Low::narrow(d.o)};
      FASTSEQ_UNROLL
      for (int which = 0; which < 4; ++which) {
        low[which][more] = n ? low[which][more] | static_cast<uint32_t>(found[which]) << 16 : found[which];
      }
    }
  }

  // Writes them: zeros where a row of dense data has ended.
  FASTSEQ_DEVICE void keep(int s, const uint32_t (&low)[Tile::kRowBlocks][4][2]) const {
    FASTSEQ_UNROLL
    for (int at = 0; at < 2 * Tile::kRowBlocks; ++at) {
      const int n = at % 2, row = row_of(at / 2) + n;
      if (!this->exists(row, 0) || !(alive(row, s) || !call.shape.offsets)) continue;
      uint32_t both[4];  // of two units
      FASTSEQ_UNROLL
      for (int gate = 0; gate < 4; ++gate) {
        const uint32_t (&of)[2] = low[at / 2][gate];
        both[gate] = (of[0] >> 16 * n & 0xffff) | of[1] >> 16 * n << 16;
      }
      write(row, time_of(s), both);
    }
  }
  FASTSEQ_DEVICE void write(int row, int t, const uint32_t (&d)[4]) const {
    const int64_t H = call.shape.H, at = element(call.shape, t, this->first_row() + row) * 4 * H + unit();
    FASTSEQ_UNROLL
    for (int gate = 0; gate < 4; ++gate) this->put_two(own.dx_gates, at + gate * H, d[gate]);
  }

  // This warp's part of the gradient of what is between the factors.
  FASTSEQ_DEVICE void narrow(int block, const uint32_t (&low)[4][2]) const {
    uint32_t b[4][2];
    FASTSEQ_UNROLL
    for (int n = 0; n < 8; ++n) b[n / 2][n % 2] = transposed(low[n / 2][n % 2]);
    FASTSEQ_UNROLL
    for (int tile = 0; tile < Tile::kSumTiles; ++tile) {
      float d[4] = {};
      FASTSEQ_UNROLL
      for (int gate = 0; gate < 4; ++gate) {
        if (Tile::kDowns == 1 || tile / Tile::kRankTiles == gate) {
          Low::multiply_add(d, ups[gate * Tile::kRankTiles + tile % Tile::kRankTiles], b[gate][0], b[gate][1]);
        }
      }
      this->give(tile, block, d);
    }
  }

  // The gradient of h of the rows that were alive at step s.
  FASTSEQ_DEVICE void widen(int s) {
    FASTSEQ_UNROLL
    for (int block = 0; block < Tile::kRowBlocks; ++block) {
      float d[4] = {}, other[4] = {};
      FASTSEQ_UNROLL
      for (int tile = 0; tile < Tile::kSumTiles; tile += 2) {
        uint32_t b[4];
        this->take(b, tile, block);
        Low::multiply_add(d, downs[tile], b[0], b[1]);
        Low::multiply_add(other, downs[tile + 1], b[2], b[3]);
      }
      FASTSEQ_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (alive(row_of(block) + this->second_row(i), s)) dh[block][i] = d[i] + other[i];
      }
    }
  }

  FASTSEQ_DEVICE void ask_all(Kept (&kept)[Tile::kRowBlocks][2], int s) const {
    FASTSEQ_UNROLL
    for (int n = 0; n < 2 * Tile::kRowBlocks; ++n) kept[n / 2][n % 2] = ask(row_of(n / 2) + n % 2, s);
  }

  // While the sums are on their way, gradients are written, and what forward kept of the next step is asked for.
  FASTSEQ_DEVICE void run() {
    begin();
    Kept kept[Tile::kRowBlocks][2];
    ask_all(kept, 0);
    for (int s = 0; s < longest; ++s) {
      uint32_t low[Tile::kRowBlocks][4][2];
      FASTSEQ_UNROLL
      for (int block = 0; block < Tile::kRowBlocks; ++block) {
        step_back(block, kept[block], s, low[block]);
        narrow(block, low[block]);
      }
      this->collect(s, [&] {
        keep(s, low);
        ask_all(kept, s + 1);
      });
      widen(s);
    }
    end();
  }

  FASTSEQ_DEVICE void end() const {
    FASTSEQ_UNROLL
    for (int n = 0; n < 4 * Tile::kRowBlocks; ++n) {
      const int i = n % 4, row = row_of(n / 4) + this->second_row(i), more = this->second_unit(i);
      if (!this->exists(row, more)) continue;
      const int64_t at = this->place(row) + more;
      static_cast<uint16_t*>(own.dh0)[at] = Low::narrow(dh[n / 4][i]);
      own.dc0[at] = dc[n / 4][i];
    }
    for (int t = longest; !call.shape.offsets && t < call.shape.T; ++t) {
      for (int n = 0; n < 2 * Tile::kRowBlocks; ++n) {
        const int row = row_of(n / 2) + n % 2;
        if (this->exists(row, 0)) write(row, t, {0, 0, 0, 0});
      }
    }
  }
};

}  // namespace fastseq::cuda
