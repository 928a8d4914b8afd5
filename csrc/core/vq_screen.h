// Lookup at the speed of 8-bit integers with the index of vq.h: rows and codes are rounded to 7 bits (8 where products
// of bytes add up in 32 bits, AVX512_VNNI), their scores come with a proven bound on what the rounding did, and only
// panels of codes that the bound leaves open are scored again in float32, in the order of vq.h.
//
// With m the mean of the codes, x' = x - m and c' = c - m, the score differs from s' = h - x'*c' by a number that
// depends on the row alone; h = c'*c'/2 (with `dot`: -m*c'). Rows become s*(q - 64) and codes t*p with whole numbers
// 1 <= q <= 127 and -63 <= p <= 63 (with 8 bits: s*(q - 128), 1 <= q <= 255, -127 <= p <= 127). Then, by Cauchy and
// Schwarz,
//   | x'*c' - s*(q - 64) * t*p |  <=  |x' - s*(q - 64)| * |c'| + |s*(q - 64)| * |c' - t*p|,
// where all four lengths are measured, not estimated. To this comes what float32 rounds: of the chain of D + 1
// operations in vq.h at most (D + 2) * u * (c*c/2 + |x|*|c|), u = 2^-24, and some u more for means and the formula.
#pragma once

#include "core/vq.h"

namespace fastseq::core {

constexpr int64_t kScreenMostD = 8192;     // up to which lengths are summed exactly enough
constexpr int64_t kScreenWindow = 32;      // dimensions that are added up in 16 bits
constexpr int32_t kScreenWindowSum = 258;  // most that codes of one sign may add up to in a window: 127 * 258 < 2^15

// One codebook, prepared. panels = codes / panel_width, rounded up; padding codes start at +inf.
struct VqScreenCodes {
  int64_t K, D, stride, panels;  // stride: bytes of a code, a multiple of 4
  bool dot;
  int8_t* p;      // [panels * panel_width, stride]
  float* t;       // [panels * panel_width]   negated
  float* h;       // [panels * panel_width]
  int32_t* zero;  // [panels * panel_width]   -64 (8 bits: -128) * the sum of p
  float* exact;   // [panels][D][panel_width]   the codes themselves
  float* start;   // [panels * panel_width]     as in vq.h
  float* mean;    // [D]
  float mean_square;
  float* bound;  // [panels][4]   per panel: |c'|, |c' - t*p|, and what stands with |x| and alone in the bound
};
// Fills panels [begin, end) from the codes.
struct VqScreenPrepare {
  const float* codebook;
  const VqScreenCodes* codes;
  int64_t begin, end;
  float* moved;  // [D, up to the next 16] scratch
};

// A panel of rows, prepared.
struct VqScreenRows {
  const VqScreenCodes* codes;
  const float* const* x;  // `count` rows
  int64_t count;
  float* moved;      // [D] scratch
  uint8_t* q;        // [stride / 4][panel_width][4]  out
  float* s;          // [panel_width]  out
  float* bound;      // [4][panel_width]  out   what multiplies the bound of a panel of codes; the last: score minus s'
  float* own;        // [panel_width]  out   what the row adds to the bound
  uint32_t strange;  // out   a bit per row that is not finite
};

struct VqScreenTile {
  const VqScreenCodes* codes;
  int64_t first, panels;  // of codes
  const uint8_t* q;
  const float* s;
  float* lowest;  // [panels][panel_width]  out   per row the smallest rounded score of each panel of codes
  float* least;   // [panel_width]  in/out   the smallest of all panels so far
  int32_t* at;    // [panel_width]  in/out   its panel
};

// The places panel * panel_width + lane of panels of codes other than at[lane] with a code whose score may be as low as
// score[lane]. Returns their number.
struct VqScreenOpen {
  const VqScreenCodes* codes;
  const float *lowest, *bound, *own;  // [panels][panel_width], and of VqScreenRows
  const float* score;                 // [panel_width]; -inf: none
  const int32_t* at;                  // [panel_width]
  int32_t* places;                    // out
};

// `count` (1 .. 4) pairs of a row and a panel of codes: the smallest score as in vq.h, and its lane, the first of
// equals. A NaN counts as +inf.
struct VqPairs {
  int64_t count, D;
  const float *x[4], *code[4], *start[4];
  float score[4];  // out
  int lane[4];     // out
};

struct VqScreenTable {
  int64_t least_codes;  // from how many on it is taken
  void (*prepare)(VqScreenPrepare& prepare);
  void (*rows)(VqScreenRows& rows);
  void (*tile)(const VqScreenTile& tile);
  int64_t (*open)(const VqScreenOpen& open);
  void (*pairs)(VqPairs& pairs);
};

size_t vq_screen_scratch(const VqNearest<float>& args, int most);
// For best = 1 and D up to kScreenMostD. `opened`, where given, gets the number of panels of codes that were scored in
// float32 beyond one per row, and that of the rows which had such panels.
void vq_screen(const VqNearest<float>& args, void* scratch, const Team& team, int64_t opened[2]) noexcept;
// Whether a lookup goes this way: where it was asked for and is possible, or where it is the faster one.
bool vq_screens(const VqNearest<float>& args);

}  // namespace fastseq::core
