// Checks of the arguments of an ensemble's figures, for both doors.
#pragma once

#include "core/ensemble_stats.h"
#include "door/mimo_nll.h"

namespace fastseq::door {

struct StatsSizes {
  int64_t B, M, K;
  Type type;
};

inline StatsSizes check_stats(const Array& logits, const Array& labels, int64_t bins, int64_t ignore) {
  const char* const op = "ensemble_stats";
  expect_dims(op, "logits", logits, "[B, M, K]", 3);
  const StatsSizes s{logits.size[0], logits.size[1], logits.size[2], float_type(op, "logits", logits)};
  expect(op, "logits", logits, s.type, "[B, M, K]", {s.B, s.M, s.K});
  if (s.M < 1 || s.K < 1) fail(op, "logits must have M and K of at least 1, got ", shape(logits.size, 3));
  if (bins < 1 || bins > 4096) fail(op, "bins must lie in 1 .. 4096, got ", bins);
  if (labels.given()) check_labels(op, labels, "[B]", {s.B}, s.K, ignore);
  return s;
}

}  // namespace fastseq::door
