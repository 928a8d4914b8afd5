// The state h in the shared memory of one block of threads: how it comes from the blocks that made it, and how this
// block's part is handed on.
//
// In a grid a block reads what all others wrote, see exchange.h. In a cluster h comes on its own, into the shared
// memory of all blocks: a place is written anew two steps later, when the writer has what all warps here, done with
// reading, have handed on since. With int8 weights h is handed on as bytes.
#pragma once

#include "cuda/await.inl.h"

namespace fastseq::cuda {

struct ForwardCall {
  PersistShape shape;
  PersistForward direction[2];
  uint32_t* exchange;  // [direction][slot][groups * rows][blocks * units / 2], zeros at the start
  int blocks, groups;  // along the units and along the batch
};

template <class Low, class Tile>
struct ForwardState {
  static constexpr bool kInt8 = Low::kPerWord == 4;
  // Numbers of the depth: of a tile of the matrix instruction, of all tiles.
  static constexpr int kTile = 8 * Low::kPerWord, kDepth = Tile::kDepth / 16 * kTile;
  static constexpr int kManyRows = 4;  // from which on a barrier costs less than pushing h in small pieces
  static constexpr int kMostBlocks = kDepth / Tile::kUnits;  // of a cluster

  const ForwardCall& call;
  const PersistForward& own;
  int lane, band, part, first_unit;
  int64_t first_row, width;    // width: units of all blocks, at least H
  int rows, sharing;           // those that there are; the warps that gather one of them
  bool reverse, staged;        // staged: how h is pushed
  bool late = false;           // whether a row begins after the first step
  int self, blocks, expected;  // in a cluster: this block, how many there are, the bytes that they push into this one
  Arrivals* arrivals;          // of even and odd steps, in a cluster
  uint16_t *shared_weights, *states;
  int* steps;      // of each row
  int lane_steps;  // of the row that is this lane's alone
  uint32_t* exchange;
  int longest = 0;

  FASTSEQ_DEVICE explicit ForwardState(const ForwardCall& given) : call(given), own(given.direction[block_z()]) {
    const int warp = thread_index() / 32;
    lane = thread_index() % 32, band = warp % Tile::kBands, part = warp / Tile::kBands;
    first_unit = block_x() * Tile::kUnits + 4 * band;
    first_row = static_cast<int64_t>(block_y()) * Tile::kRows;
    width = static_cast<int64_t>(call.blocks) * Tile::kUnits;
    rows = static_cast<int>(call.shape.B - first_row < Tile::kRows ? call.shape.B - first_row : Tile::kRows);
    self = anew(block_x()), blocks = anew(call.blocks), sharing = rows < Tile::kWarps ? Tile::kWarps / rows : 1;
    reverse = own.reverse, staged = Tile::kCluster && rows >= kManyRows && call.blocks > 1;
    arrivals = reinterpret_cast<Arrivals*>(shared_bytes());
    shared_weights = reinterpret_cast<uint16_t*>(shared_bytes() + Tile::kArrivals);
    states = shared_weights + Tile::kSharedTiles;
    steps = reinterpret_cast<int*>(sums() + Tile::kSums);
    exchange = call.exchange + block_z() * 2 * slot_words();
  }

  FASTSEQ_DEVICE float* sums() const {  // behind the states
    return reinterpret_cast<float*>(states + Tile::kStates * Tile::kRows * Tile::kStride);
  }
  FASTSEQ_DEVICE int64_t slot_words() const { return int64_t(call.groups) * Tile::kRows * width / 2; }
  FASTSEQ_DEVICE int time_of(int s) const { return reverse ? longest - 1 - s : s; }
  // Whether step s is the first of a row of so many. Rows are exchanged at every step, before they begin and after they
  // end.
  FASTSEQ_DEVICE bool begins(int steps, int s) const {
    return steps > 0 && (reverse ? time_of(s) == steps - 1 : s == 0);
  }
  // This lane's row in a block of rows.
  FASTSEQ_DEVICE int row_of(int block) const { return 8 * block + cell_column(lane); }

  // Lengths of rows, and states to begin with; all threads call it.
  FASTSEQ_DEVICE void prepare_states() {
    for (int row = thread_index(); row < Tile::kRows; row += Tile::kThreads) {
      steps[row] = steps_of(call.shape, first_row + row);
    }
    // States of rows and units that there are not stay zeros.
    for (int at = thread_index(); at < Tile::kStates * Tile::kRows * Tile::kStride / 8; at += Tile::kThreads) {
      reinterpret_cast<Words*>(states)[at] = {0, 0, 0, 0};
    }
    sync_block();
    for (int row = 0; row < Tile::kRows; ++row) longest = steps[row] > longest ? steps[row] : longest;
    for (int row = 0; row < rows; ++row) late = late || (reverse && steps[row] < longest);
    lane_steps = lane < rows ? steps[lane] : 0;
    expected = anew(static_cast<int>(rows * (width - (staged ? Tile::kUnits : 0)) * 4 / Low::kPerWord));
    if constexpr (Tile::kCluster) open();
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

  // Numbers before the state that enters step s.
  static FASTSEQ_DEVICE int state_at(int s) { return (Tile::kStates > 1 ? s & 1 : 0) * Tile::kRows * Tile::kStride; }
  FASTSEQ_DEVICE uint16_t* state(int s) const { return states + state_at(s); }

  // In a cluster: the first state, and the barrier of the next.
  FASTSEQ_DEVICE void open() const {
    if (thread_index() == 0) {
      prepare(arrivals), prepare(arrivals + 1);
      expect_state(1);
    }
    begin_rows(0);
    sync_cluster();
  }
  // The first state of the rows that begin at a step.
  FASTSEQ_DEVICE void begin_rows(int s) const {
    constexpr int kQuads = Tile::kDepth / 8;  // four words each
    for (int at = thread_index(); at < rows * kQuads; at += Tile::kThreads) {
      const int row = at / kQuads, k = at % kQuads * 4 * Low::kPerWord;
      if (begins(steps[row], s)) *in_state(s, row, k) = first_state(row, k);
    }
  }
  // There may be none: then nobody waits for it.
  FASTSEQ_DEVICE void expect_state(int s) const { expect(arrivals + slot_of(s), static_cast<uint32_t>(expected)); }
  // Returns at once at step 0: the use before the first counts as complete.
  FASTSEQ_DEVICE void await(int s) const {
    const auto all = [&] {
      Waiting wait;
      while (!arrived(arrivals + slot_of(s), (s - 1) >> 1 & 1)) wait.look_again();
    };
    if (!late) return all();
    const bool some_begin = of_any(begins(lane_steps, s));
    all();
    if (!some_begin) return;
    sync_block();  // what is overwritten has been pushed by all
    begin_rows(s);
    sync_block();
  }

  // Where numbers k and the next of a row's state are.
  template <class Of = Words>
  FASTSEQ_DEVICE Of* in_state(int s, int row, int k) const {
    return reinterpret_cast<Of*>(reinterpret_cast<uint32_t*>(state(s) + row * Tile::kStride) + k / Low::kPerWord);
  }

  // The state that enters step s. A warp takes row after row, of each lane kEach times 8 numbers; where there are few
  // rows, several warps share one. A place is always read by the same thread.
  FASTSEQ_DEVICE void gather(int s) const {
    constexpr int kEach = kDepth / 256, kMost = Tile::kRowBlocks < 4 ? 8 : kInt8 ? 2 : 4;  // at a time, as registers go
    constexpr int kSome = least(kEach, kMost), kRowsAtOnce = least(Tile::kRowBlocks, kMost / kSome);
    const int warp = thread_index() / 32, apart = Tile::kWarps / sharing;
    const int k0 = 8 * (lane + 32 * (warp % sharing)), next = 256 * sharing;
    FASTSEQ_ROLL
    for (int first = warp / sharing; first < rows; first += kRowsAtOnce * apart) {
      FASTSEQ_ROLL
      for (int k = k0; k < k0 + kEach * next; k += kSome * next) take<kRowsAtOnce, kSome>(s, first, apart, k, next);
      FASTSEQ_UNROLL
      for (int n = 0; n < kRowsAtOnce; ++n) {
        const int row = first + n * apart;
        if ((s == 0 || late) && row < rows && begins(steps[row], s)) begin_row(s, row, k0, next);
      }
    }
  }
  template <int kRowsAtOnce, int kSome>
  FASTSEQ_DEVICE void take(int s, int first, int apart, int k0, int next) const {
    constexpr int kCount = kRowsAtOnce * kSome;
    const int words = static_cast<int>(width) / 2;
    const uint32_t* const from = exchange + slot_of(s - 1) * slot_words() + (first_row + first) * words + k0 / 2;
    const auto row_of = [&](int n) { return first + n / kSome * apart; };
    const auto k_of = [&](int n) { return k0 + n % kSome * next; };
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
          [&](int n) { found[n] = read_words(from + (n / kSome * apart * words + n % kSome * next / 2)); });
    }
    FASTSEQ_UNROLL
    for (int n = 0; n < kCount; ++n) {
      if (here[n]) store(s, row_of(n), k_of(n), found[n]);
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

  // Hands on h of this lane's unit after step s, of all rows. In a grid a lane writes those of two units.
  FASTSEQ_DEVICE void publish(const uint32_t (&h)[Tile::kRowBlocks], int s) const {
    const int place = cell_unit(lane), unit = first_unit + place;
    uint32_t pairs[Tile::kRowBlocks];  // of this lane's unit and its neighbour, in their order
    FASTSEQ_UNROLL
    for (int block = 0; block < Tile::kRowBlocks; ++block) {
      const uint32_t own_number = number(h[block]), next = across(own_number, 8);
      if constexpr (Tile::kCluster) {
        pairs[block] = place % 2 ? next | own_number << 16 : own_number | next << 16;
        continue;
      }
      const int row = row_of(block);
      if (place % 2 == 0 && row < rows) {
        write_word(exchange + slot_of(s) * slot_words() + ((first_row + row) * width + unit) / 2,
                   Pair::write(safe_pair(own_number, next, Low::kInfinity), s));
      }
    }
    if constexpr (Tile::kCluster) {
      if (staged) {
        push_all(pairs, s + 1);
      } else {
        sync_warp();  // what its lanes have read may be written anew by whoever hears of this
        FASTSEQ_UNROLL
        for (int block = 0; block < Tile::kRowBlocks; ++block) push(pairs[block], block, s + 1);
      }
    }
  }

  // The same in a cluster, of few rows or to few blocks: to all at once, each lane of the four of a row to every
  // fourth.
  FASTSEQ_DEVICE void push(uint32_t pair, int block, int s) const {
    if (block > 0 && 8 * block >= rows) return;
    const int place = cell_unit(lane), row = row_of(block);
    const uint32_t other = across(pair, 16), first = place < 2 ? pair : other, second = place < 2 ? other : pair;
    if (row >= rows) return;
    uint32_t* const to = in_state<uint32_t>(s, row, first_unit);
    FASTSEQ_UNROLL
    for (int n = place; n < kMostBlocks + place; n += 4) {
      if (n >= blocks) continue;
      if constexpr (kInt8) {
        push_word(n, to, bytes_in(first, second), arrivals + slot_of(s));
      } else {
        push_words(n, to, first, second, arrivals + slot_of(s));
      }
    }
  }

  // Of many rows: into the state of this block, and from there to the other blocks, 16 bytes at a time. Once h of all
  // its units is there, all warps are done with the step, and what they have read may be written anew by whoever hears
  // of it.
  FASTSEQ_DEVICE void push_all(const uint32_t (&pairs)[Tile::kRowBlocks], int s) const {
    FASTSEQ_UNROLL
    for (int block = 0; block < Tile::kRowBlocks; ++block) {
      const int row = row_of(block), place = cell_unit(lane);
      if constexpr (kInt8) {
        const uint32_t other = across(pairs[block], 16);
        if (place == 0 && row < rows) *in_state<uint32_t>(s, row, first_unit) = bytes_in(pairs[block], other);
      } else {
        if (place % 2 == 0 && row < rows) *in_state<uint32_t>(s, row, first_unit + place) = pairs[block];
      }
    }
    sync_block();
    constexpr int kQuads = Tile::kUnits / 4 / Low::kPerWord, kEach = (Tile::kRows * kQuads + 31) / 32;  // of a lane
    const int first = self * Tile::kUnits;
    Words* to[kEach];
    Words own_words[kEach];
    FASTSEQ_UNROLL
    for (int n = 0; n < kEach; ++n) {
      const int at = lane + 32 * n;
      to[n] = in_state(s, at / kQuads, first + at % kQuads * 4 * Low::kPerWord);
      if (at < rows * kQuads) own_words[n] = *to[n];
    }
    FASTSEQ_UNROLL
    for (int other = band; other < kMostBlocks + band; other += Tile::kWarps) {
      if (other == self || other >= blocks) continue;
      FASTSEQ_UNROLL
      for (int n = 0; n < kEach; ++n) {
        if (lane + 32 * n >= rows * kQuads) continue;
        push_words(other, reinterpret_cast<uint32_t*>(to[n]), own_words[n], arrivals + slot_of(s));
      }
    }
  }
};

}  // namespace fastseq::cuda
