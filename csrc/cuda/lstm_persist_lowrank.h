// The recurrence of lstm_persist.h where weight_hh of gate g is up[g] down[g], or up[g] down[0]: every multiprocessor
// keeps its part of both factors on the chip, and per row only what lies between the factors goes from each to all
// others. Definition: fastseq/reference/lstm_lowrank.py; what is between the factors is rounded to low, as there. What
// is not said here is as in lstm_persist.h.
#pragma once

#include "cuda/lstm_persist.h"

namespace fastseq::cuda {

struct PersistLowRankShape : PersistShape {
  int64_t rank, downs;  // at least 1; of `down`, 4, or 1 which all gates share
};

struct PersistLowRankForward {
  const void* x_gates;  // low [N, 4H]
  const void* up;       // low [4, H, rank]
  const void* down;     // low [downs, rank, H]
  const void* h0;       // low [B, H]
  const float* c0;      // [B, H]
  void* h;              // low [N, H]   out
  float* c;             // [N, H]       out, or null
  void* gates;          // low [N, 4H]  out, activated, or null; may be x_gates
  void* h_n;            // low [B, H]   out
  float* c_n;           // [B, H]       out
  bool reverse;
};

struct PersistLowRankBackward {
  const void* dh;     // low [N, H] or null, as the next two
  const void* dh_n;   // low [B, H]
  const float* dc_n;  // [B, H]
  const void* gates;  // low [N, 4H] from forward
  const float* c;     // [N, H] from forward
  const void* up;
  const void* down;
  const float* c0;
  void* dx_gates;  // low [N, 4H] out; may be gates
  void* dh0;       // low [B, H]  out
  float* dc0;      // [B, H]      out
  bool reverse;
};

// It serves any H, up to `rank` of each gate, and up to `rows` rows; more rows are more groups of blocks.
struct PersistLowRankTile {
  int64_t units, rows, rank, downs, threads;
};
int persist_lowrank_tiles();
PersistLowRankTile persist_lowrank_tile(int tile);

// As in lstm_persist.h, of one direction. Scratch is that of forward and of backward alike.
size_t persist_lowrank_scratch(const PersistLowRankShape& shape, int tile);
int64_t persist_lowrank_blocks(const PersistLowRankShape& shape, int tile);
int64_t persist_lowrank_forward_room(const PersistLowRankShape& shape, int tile);
int64_t persist_lowrank_backward_room(const PersistLowRankShape& shape, int tile);

const char* persist_lowrank_forward(const PersistLowRankShape& shape, const PersistLowRankForward& direction, int tile,
                                    void* scratch, void* stream) noexcept;
const char* persist_lowrank_backward(const PersistLowRankShape& shape, const PersistLowRankBackward& direction,
                                     int tile, void* scratch, void* stream) noexcept;

}  // namespace fastseq::cuda
