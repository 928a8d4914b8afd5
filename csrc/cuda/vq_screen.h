// The nearest code of many rows: products on tensor cores say which few codes it may be, and the definition's own chain
// decides among these. The scores are never written: a block of threads keeps its rows in registers and streams the
// codes past them. Definition: fastseq/reference/vq.py; pieces and bound: fastseq_kernels/_pieces.py.
// G groups, N rows, D columns, K codes. Everything lies on one device, contiguous; nothing may alias anything.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/vq_number.h"

namespace fastseq::cuda {

constexpr int64_t kScreenMostD = 256;
constexpr int kScreenCodes = 128;  // of which `padded` is a multiple
constexpr int64_t screen_width(int64_t D) { return D <= 64 ? 64 : D <= 128 ? 128 : 256; }

struct VqScreen {
  int64_t G, N, D, K;     // each at least 1
  int64_t padded, width;  // of the pieces: codes, and columns, the least of 64, 128 and 256 that is not below D
  int products;           // 1: one piece of rows and codes, 2: two of codes, 3: two of each
  Number row, code;       // what x and the codes are
  Number piece;           // bf16, or with one product f16
  const void* x;          // row [G, N, D]     but with products 3: 4-byte aligned, and D is even
  const void* codes;      // code [G, K, D]
  const float* starts;    // [G, K]            what the definition's scores begin with
  const void* pieces;     // piece [G, 1 or 2, padded, width]  negated codes, of products 3 less `centre`
  const float* h;         // [G, padded]       what scores of pieces begin with
  const float* most;      // [G, 5]            lengths that no code exceeds
  const float* centre;    // [G, D]            with products 3, else null
  const bool* mask;       // [G, N] or null: the rows that count
  bool dot;               // see vq_scores
  float slack;            // what the bound is multiplied by: 1, but in tests
  int bits;               // of an index: 16, 32 or 64
  void* index;            // [G, N]            out  -1 where a row does not count; not written where it stays open
  float* score;           // [G, N] or null    out  +inf where a row does not count; likewise
  int32_t* open;          // [G, N]            out  rows that the screen leaves open, in any order
  int32_t* count;         // [G]               out  how many
};

// Whether the current device has room for a block of threads.
bool vq_screen_fits(const VqScreen& call);
// Null, or why nothing was launched. stream: a cudaStream_t.
const char* vq_screen(const VqScreen& call, void* stream) noexcept;

}  // namespace fastseq::cuda
