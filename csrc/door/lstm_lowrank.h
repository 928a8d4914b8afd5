// Checks of the arguments of the low-rank operators, for both doors.
#pragma once

#include "core/lstm_lowrank.h"
#include "door/lstm.h"

namespace fastseq::door {

// Recurrent weights by gate: up [4, H, r] with down [4, r, H] or [1, r, H]; or, where `mixed`, up [H, R] and down
// [R, H] of R = the sum of ranks, one gate after the other, and weight_hh [D*H, H] of the D gates that are full.
struct LowRankState {
  Array up, down, weight_hh;
  bool mixed;
  int64_t ranks[4];  // of a mixed one; -1: full
};

inline void check_lowrank(const char* op, const LowRankState& w, const LstmSizes& z) {
  if (!w.mixed) {
    expect_dims(op, "up", w.up, "[4, H, r]", 3);
    const int64_t r = w.up.size[2], downs = w.down.given() && w.down.size[0] == 1 ? 1 : 4;
    expect(op, "up", w.up, z.type, "[4, H, r]", {4, z.H, r});
    expect(op, "down", w.down, z.type, downs == 1 ? "[1, r, H]" : "[4, r, H]", {downs, r, z.H});
    return;
  }
  int64_t values = 0, full = 0;
  for (int64_t rank : w.ranks) {
    if (rank < -1) fail(op, "ranks must be at least 0, or -1 for a full gate, got ", rank);
    rank < 0 ? full += 1 : values += rank;
  }
  expect(op, "up", w.up, z.type, "[H, R]", {z.H, values});
  expect(op, "down", w.down, z.type, "[R, H]", {values, z.H});
  if (full || w.weight_hh.given()) {
    expect(op, "weight_hh", w.weight_hh, z.type, "[D*H, H]", {full * z.H, z.H});
  }
}

template <class R>
core::LowRankWeights<R> lowrank_weights(const LowRankState& w, int64_t H) {
  core::LowRankWeights<R> out{w.down.as<R>(), 0, false, {}};
  if (!w.mixed) {
    const int64_t r = w.up.size[2];
    out.shared = w.down.size[0] == 1;
    out.count = out.shared ? r : 4 * r;
    for (int g = 0; g < 4; ++g) out.gates[g] = {nullptr, w.up.as<R>() + g * H * r, r, r, out.shared ? 0 : g * r};
    return out;
  }
  for (int64_t rank : w.ranks) out.count += rank > 0 ? rank : 0;
  int64_t first = 0, full = 0;
  for (int g = 0; g < 4; ++g) {
    if (w.ranks[g] < 0) {
      out.gates[g] = {w.weight_hh.as<R>() + full++ * H * H, nullptr, 0, 0, first};
    } else {
      out.gates[g] = {nullptr, w.up.as<R>() + first, out.count, w.ranks[g], first};
      first += w.ranks[g];
    }
  }
  return out;
}

// Where the gradients of the weights go, if they are wanted.
template <class R>
core::LowRankBackward<R> lowrank_backward(const LowRankState& state, const core::LstmBackward<R>& recurrence, int64_t H,
                                          bool wanted, R* dup, R* ddown, R* dweight_hh) {
  core::LowRankBackward<R> out{lowrank_weights<R>(state, H), recurrence, wanted, {}, {}, ddown};
  int64_t full = 0;
  for (int g = 0; g < 4 && wanted; ++g) {
    const core::LowRankGate<R>& gate = out.weights.gates[g];
    if (gate.weight) {
      out.dweight[g] = dweight_hh + full++ * H * H;
    } else if (gate.rank) {
      out.dup[g] = dup + (state.mixed ? gate.first : g * H * gate.rank);
    }
  }
  return out;
}

}  // namespace fastseq::door
