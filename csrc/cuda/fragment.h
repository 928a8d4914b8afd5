// Where the numbers of one matrix instruction lie: D[16, 8] += A[16, 16] B[16, 8] of a warp, 16-bit A and B (PTX ISA,
// mma.m16n8k16). And which gates of which units the rows of A are: 4 units with their four gates, laid out so that
// after one exchange between neighbours every lane has all gates of one cell.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTSEQ_BOTH __host__ __device__
#else
#define FASTSEQ_BOTH
#endif

namespace fastseq::cuda {

struct Place {
  int row, column;
};

// Number i of a lane: register i / 2, its half i % 2 (A: 8 numbers, B: 4), or register i (D: 4, float32).
FASTSEQ_BOTH constexpr Place place_in_a(int lane, int i) {
  return {lane / 4 + 8 * (i / 2 % 2), 2 * (lane % 4) + i % 2 + 8 * (i / 4)};
}
FASTSEQ_BOTH constexpr Place place_in_b(int lane, int i) { return {2 * (lane % 4) + i % 2 + 8 * (i / 2), lane / 4}; }
FASTSEQ_BOTH constexpr Place place_in_d(int lane, int i) { return {lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2}; }

// Of the 16 rows of A; gates are counted i, f, g, o.
FASTSEQ_BOTH constexpr int unit_of(int row) { return row % 8 / 2; }
FASTSEQ_BOTH constexpr int gate_of(int row) { return row / 8 + 2 * (row % 2); }

// The cell that a lane keeps: its unit of 4 and its column of 8. A lane holds two gates of two columns; the lane across
// bit kPartner holds the other two gates of the same.
constexpr int kPartner = 4;
FASTSEQ_BOTH constexpr bool is_second(int lane) { return lane & kPartner; }
FASTSEQ_BOTH constexpr int cell_unit(int lane) { return lane / 8; }
FASTSEQ_BOTH constexpr int cell_column(int lane) { return 2 * (lane % 4) + is_second(lane); }

}  // namespace fastseq::cuda
