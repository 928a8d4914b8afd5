// What the maps of csrc/cuda must be for the kernels to be right, by the maps alone. There is nothing to run.
#include <initializer_list>

#include "cuda/exchange.h"
#include "cuda/fragment.h"

namespace fastseq::cuda {
namespace {

// Every place of a matrix belongs to one number of one lane.
template <class Map>
constexpr bool covers(Map place_of, int numbers, int rows, int columns) {
  bool taken[256] = {};
  if (32 * numbers != rows * columns) return false;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < numbers; ++i) {
      const Place at = place_of(lane, i);
      if (at.row < 0 || at.row >= rows || at.column < 0 || at.column >= columns) return false;
      bool& here = taken[at.row * columns + at.column];
      if (here) return false;
      here = true;
    }
  }
  return true;
}
static_assert(covers(place_in_a, 8, 16, 16));
static_assert(covers(place_in_b, 4, 16, 8));
static_assert(covers(place_in_d, 4, 16, 8));

// The two numbers of a register are neighbours along the depth: one word of a row in memory.
constexpr bool pairs_lie_along_the_depth() {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; i += 2) {
      const Place a = place_in_a(lane, i), next = place_in_a(lane, i + 1);
      if (a.column % 2 || next.row != a.row || next.column != a.column + 1) return false;
    }
    for (int i = 0; i < 4; i += 2) {
      const Place b = place_in_b(lane, i), next = place_in_b(lane, i + 1);
      if (b.row % 2 || next.row != b.row + 1 || next.column != b.column) return false;
    }
  }
  return true;
}
static_assert(pairs_lie_along_the_depth());

static_assert(covers([](int lane, int) { return Place{unit_of(lane % 16), gate_of(lane % 16) + 4 * (lane / 16)}; }, 1,
                     4, 8));  // the 16 rows are 4 units with 4 gates, counted twice to be as many as lanes

// Backward writes two rows of D that are 8 apart as units of one block.
constexpr bool numbers_of_d_are_8_rows_apart() {
  for (int lane = 0; lane < 32; ++lane) {
    const Place first = place_in_d(lane, 0);
    for (int i = 0; i < 4; ++i) {
      const Place at = place_in_d(lane, i);
      if (at.row != first.row + 8 * (i / 2) || at.column != first.column + i % 2) return false;
    }
  }
  return true;
}
static_assert(numbers_of_d_are_8_rows_apart());

static_assert(covers([](int lane, int) { return Place{cell_unit(lane), cell_column(lane)}; }, 1, 4, 8));

// After the exchange a lane has the gates of one cell: of i, f and g, o two are its own and two its partner's, of the
// column that is the lane's.
constexpr bool gates_are_of_one_cell() {
  for (int lane = 0; lane < 32; ++lane) {
    const int partner = lane ^ kPartner, second = is_second(lane);
    if (partner >= 32 || is_second(partner) == is_second(lane)) return false;
    for (int gate = 0; gate < 4; ++gate) {
      const Place at = place_in_d(gate / 2 == second ? lane : partner, 2 * (gate % 2) + second);
      if (gate_of(at.row) != gate || unit_of(at.row) != cell_unit(lane) || at.column != cell_column(lane)) return false;
    }
  }
  return true;
}
static_assert(gates_are_of_one_cell());

// The lanes across bits 8 and 16 have the same row of the batch and the other units of four.
constexpr bool four_units_are_handed_on_together() {
  for (int lane = 0; lane < 32; ++lane) {
    if (cell_unit(lane ^ 8) != (cell_unit(lane) ^ 1) || cell_unit(lane ^ 16) != (cell_unit(lane) ^ 2)) return false;
    if (cell_column(lane ^ 8) != cell_column(lane) || cell_column(lane ^ 16) != cell_column(lane)) return false;
  }
  return true;
}
static_assert(four_units_are_handed_on_together());

// A use of a place is told from the one before and the one after, the first from zeros, whatever the word is.
template <class Stamp>
constexpr bool stamps_tell_uses_apart() {
  if (!Stamp::stale(0, 0) || !Stamp::stale(0, 1)) return false;
  for (const uint32_t value : {0u, ~0u, 0x55555555u, 0xaaaaaaaau}) {
    for (int step = 0; step < 16; ++step) {
      const uint32_t word = Stamp::write(value, step);
      if (slot_of(step) == slot_of(step + 1) || slot_of(step) != slot_of(step + 2)) return false;
      if (Stamp::stale(word, step) || !Stamp::stale(word, step + 2)) return false;
      if (step > 1 && !Stamp::stale(word, step - 2)) return false;
      if (Stamp::read(word) != Stamp::read(value)) return false;
    }
  }
  return true;
}
static_assert(stamps_tell_uses_apart<Pair>() && stamps_tell_uses_apart<Float>());
static_assert(Pair::read(~0u) == 0xbfffffff && Float::read(~0u) == 0xfffffffe);  // what the stamp costs

// Numbers below 2 arrive as they are, whatever the first is; of a NaN as the second a NaN arrives. Infinity begins at a
// low byte of 0 or 0x80, so these and their neighbours stand for all.
constexpr bool pair_is_safe(uint32_t first, uint32_t second, uint32_t infinity) {
  const bool nan = (second & 0x7fff) > infinity, small = (second & 0x7fff) < 0x4000;
  if (!nan && !small) return true;  // no h is that large
  const uint32_t pair = safe_pair(first, second, infinity), found = Pair::read(Pair::write(pair, 0));
  return found == pair && (nan ? (found & 0x7fff) > infinity : found == (first | second << 16));
}
constexpr bool pairs_are_safe(uint32_t infinity) {
  for (uint32_t high = 0; high < 0x10000; high += 0x100) {
    for (const uint32_t low : {0x00u, 0x01u, 0x7fu, 0x80u, 0x81u, 0xffu}) {
      if (!pair_is_safe(0xbf80, high | low, infinity) || !pair_is_safe(0xffff, high | low, infinity)) return false;
    }
  }
  return true;
}
static_assert(pairs_are_safe(0x7f80) && pairs_are_safe(0x7c00));  // bfloat16, float16

}  // namespace
}  // namespace fastseq::cuda
