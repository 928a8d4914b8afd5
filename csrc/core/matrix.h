// A matrix of weights [N, K] for inference, packed once: float32, bfloat16, 8 or 4 bits, whole or as two thin factors,
// per gate. The layout is the same on every instruction set: panels of 16 rows, so a packed matrix may be kept and
// moved.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/parallel.h"

namespace fastseq::core {

constexpr int64_t kMatrixPanel = 16;

// How numbers are kept, in a panel of 16 rows w[0] .. w[15]:
//   f32   [K][16] floats
//   bf16  [K/2][16][2] upper halves of floats
//   int8  [K/4][16][4] bytes, value + 128; for more than 32 columns K is rounded up to a multiple of 64
//   int4  [K/8][16][4] bytes, value + 8: the low nibbles hold columns 8 j .. 8 j + 3, the high ones the next four
// K is rounded up, with zeros (of the value). Integers carry float scales [groups][16] for each panel.
enum class Storage : int32_t { f32, bf16, int8, int4 };
constexpr int kStorages = 4;

constexpr bool is_integer(Storage s) { return s == Storage::int8 || s == Storage::int4; }
// Columns that lie together in memory.
constexpr int64_t storage_step(Storage s) {
  return s == Storage::f32 ? 1 : s == Storage::bf16 ? 2 : s == Storage::int8 ? 4 : 8;
}

// One packed array of rows. Panel p begins at data + p * stride and its scales at scale + p * scale_stride.
struct Piece {
  Storage storage;
  int64_t N, K;
  int64_t group;  // columns that share a scale: a multiple of 8, or K where there is one group
  const uint8_t* data;
  const float* scale;            // null for floats
  int64_t stride, scale_stride;  // bytes, floats
  int64_t groups() const { return (K + group - 1) / group; }
  int64_t panels() const { return (N + kMatrixPanel - 1) / kMatrixPanel; }
};

// The rows of one gate: whole, or the upper of two factors, which meets `rank` of the values that `down` makes.
struct GateRows {
  Piece piece;
  int64_t rank;    // 0: whole
  int64_t offset;  // of those values: a multiple of 16
};

// gates 1: a plain matrix. gates 4: [4H, K], rows in the order i, f, g, o; where all four are alike (same storage,
// group and rank) the panels of the same units of the four lie side by side.
struct PackedMatrix {
  int64_t N, K;
  int gates;
  bool alike;
  bool bounded;  // made for inputs within -1 .. 1: integers of them are 127 times their value, in scales already
  GateRows gate[4];
  Piece down;  // the lower factors of all gates, each padded to whole panels; N = 0 where there are none
};

// What a matrix is made of, before it is packed.
struct PartSource {
  Storage storage;
  int64_t group;  // 0: all of K
  // float, bfloat16 or int8 [N, K]; int4: [N, (K + 1) / 2] bytes, value + 8, even columns in the low nibbles
  const void* values;
  const float* scale;  // [N, groups] of integers
};
struct MatrixSource {
  int64_t N, K;
  int gates;
  bool bounded;
  struct {
    int64_t rank;           // 0: `rows` is the whole part, else the upper factor [N, rank]
    PartSource rows, down;  // down: [rank, K]
  } gate[4];
};

constexpr int64_t kMostMatrixSize = 65536;  // of N / gates and K: sums of products of bytes fit 32 bits

// Null, or why the source cannot be packed.
const char* matrix_fault(const MatrixSource& source);
// Bytes of the packed form of a source without fault; `out` must have 64-byte alignment, all of it is written.
size_t packed_bytes(const MatrixSource& source);
void pack_matrix(const MatrixSource& source, uint8_t* out);
// Where things lie in a packed matrix. False where these bytes do not hold one.
bool open_matrix(const uint8_t* packed, size_t bytes, PackedMatrix* out);

// y [M, N] = x [M, K] @ w.T + bias, in the arithmetic of reference/packed.py: where rows of x meet integers, each is
// scaled by its own largest magnitude.
struct LinearPacked {
  int64_t M;
  const float* x;  // row m at x + m * x_stride
  int64_t x_stride;
  const float* bias;  // [N] or null
  float* y;           // row m at y + m * y_stride; may not alias x
  int64_t y_stride;
};
// Bytes of scratch for a team of at most `most`; 64-byte aligned, uninitialised.
size_t linear_packed_scratch(const PackedMatrix& w, int64_t M, int most);
void linear_packed(const PackedMatrix& w, const LinearPacked& call, uint8_t* scratch, const Team& team) noexcept;

// ---- what an instruction set provides; see isa.h ----

constexpr int kMostMatrixRows = 32;
constexpr int64_t kIntegerPad = 64;  // a row of integers has zeros up to a multiple of it

// c[i][p][:16] = sum over k of a[i][k] * panel p [k], i < rows, p < panels; for integers in the order of
// reference/packed.py, with scales, times a_scale[i] where that is given, plus bias.
struct MatrixTile {
  Storage storage;
  int64_t rows, panels;                   // rows: 1 .. matrix_rows; panels: any number
  int64_t K, group, block;                // block: of a sum of floats, see block_k
  const void* a[kMostMatrixRows];         // float or int8
  const int32_t* sums[kMostMatrixRows];   // of integers, by group
  const float* a_scale[kMostMatrixRows];  // [0] null: 1
  const uint8_t* b;
  int64_t b_panel;  // bytes from one panel to the next
  const float* scale;
  int64_t scale_panel;  // floats
  const float* bias;    // [panels][16], or null
  float* c;
  int64_t c_row, c_panel;  // floats
};

struct MatrixTable {
  int rows;  // most of a tile
  void (*tile)(const MatrixTile& tile);
  // q = x * times to the nearest integer, ties to even, within -127 .. 127; NaN becomes 0
  void (*to_integers)(const float* x, int64_t count, float times, int8_t* q);
  // the largest magnitude; infinity where a number is not finite
  float (*magnitude)(const float* x, int64_t count);
  // out[g] of the groups of a row
  void (*sum_integers)(const int8_t* q, int64_t K, int64_t group, int32_t* out);
};

}  // namespace fastseq::core
