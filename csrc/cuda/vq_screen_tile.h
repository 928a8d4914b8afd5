// Sizes of a screen: of a block of threads, by the number of pieces and the columns that it has room for.
#pragma once

#include <cstddef>

#include "cuda/fragment.h"
#include "cuda/vq_screen.h"

namespace fastseq::cuda {

// kDepth: 16 columns each; the pieces have as many.
template <int kRowPieces_, int kCodePieces_, int kDepth_>
struct ScreenTile {
  static constexpr int kRowPieces = kRowPieces_, kCodePieces = kCodePieces_, kDepth = kDepth_;
  static constexpr int kWarps = 8, kThreads = 32 * kWarps;
  // Rows fill up to 128 registers of a thread; short ones leave room for a second block on the multiprocessor.
  static constexpr int kTiles = kRowPieces * kDepth <= (kRowPieces > 1 ? 8 : 16) ? 2 : 1;  // of 16 rows that a warp has
  static constexpr int kBlocks = kRowPieces * kDepth <= 4 ? 2 : 1;                         // on a multiprocessor
  static constexpr int kRows = 16 * kTiles * kWarps;
  static constexpr int kCodeBytes = 32 * kDepth * kCodePieces;
  static constexpr int kCodes = 64 / (kBlocks > 1 ? kCodePieces : kCodeBytes > 512 ? 2 : 1);  // that arrive together
  static constexpr int kStages = kCodes * kCodeBytes > 16 << 10 ? 3 : 4;     // of them in shared memory
  static constexpr int kSome = 64 / kTiles < kCodes ? 64 / kTiles : kCodes;  // that are multiplied together
  static constexpr int kPlaces = kSome / 8;  // of a class of a row's codes, that a thread then has; of two classes
  static constexpr int kPieceBytes = kCodes * kDepth * 32;
  static constexpr int kStage = kCodePieces * kPieceBytes + 4 * kCodes;
  static constexpr size_t kShared = kStages * kStage + 4 * kRows;  // with what each row may be wrong by

  static_assert(kCodes % kSome == 0 && kScreenCodes % kCodes == 0 && (kPlaces & (kPlaces - 1)) == 0);
  static_assert(kBlocks * (kShared + 1024) <= 100 << 10, "the smallest multiprocessor has room");
};

// f(kRowPieces, kCodePieces, kDepth)
#define FASTSEQ_SCREEN_ONE(f) f(1, 1, 4) f(1, 1, 8) f(1, 1, 16)
#define FASTSEQ_SCREEN_MORE(f) f(1, 2, 4) f(1, 2, 8) f(1, 2, 16) f(2, 2, 4) f(2, 2, 8) f(2, 2, 16)

constexpr int screen_row_pieces(int products) { return products == 3 ? 2 : 1; }
constexpr int screen_code_pieces(int products) { return products == 1 ? 1 : 2; }
constexpr int screen_depth(int64_t width) { return static_cast<int>(width / 16); }

}  // namespace fastseq::cuda
