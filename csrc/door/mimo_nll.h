// Checks of the arguments of MIMO's loss, for both doors.
#pragma once

#include "core/mimo_nll.h"
#include "door/array.h"

namespace fastseq::door {

struct NllSizes {
  int64_t N, M, K;
  Type type;
};

// labels are `size`; each lies in 0 .. K - 1 or is `ignore`
inline void check_labels(const char* op, const Array& labels, const char* meaning, std::initializer_list<int64_t> size,
                         int64_t K, int64_t ignore) {
  expect(op, "labels", labels, Type::i64, meaning, size);
  int64_t count = 1;
  for (int64_t n : size) count *= n;
  const auto* const label = labels.as<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    if ((label[i] < 0 || label[i] >= K) && label[i] != ignore) {
      const int64_t at[] = {labels.dims == 2 ? i / labels.size[1] : i, labels.dims == 2 ? i % labels.size[1] : 0};
      fail(op, "labels must lie in 0 .. K - 1 = ", K - 1, " or be ignore = ", ignore, ", got ", label[i], " at ",
           shape(at, labels.dims));
    }
  }
}

inline NllSizes check_nll(const char* op, const Array& logits, const Array& labels, double smoothing, int64_t ignore) {
  expect_dims(op, "logits", logits, "[N, M, K]", 3);
  const NllSizes s{logits.size[0], logits.size[1], logits.size[2], float_type(op, "logits", logits)};
  expect(op, "logits", logits, s.type, "[N, M, K]", {s.N, s.M, s.K});
  if (s.K < 1) fail(op, "logits must have K of at least 1, got ", shape(logits.size, 3));
  if (!(smoothing >= 0 && smoothing <= 1)) fail(op, "smoothing must lie in 0 .. 1, got ", smoothing);
  check_labels(op, labels, "[N, M]", {s.N, s.M}, s.K, ignore);
  return s;
}

inline NllSizes check_nll_backward(const Array& dloss, const Array& dnll, const Array& logits, const Array& labels,
                                   const Array& top, const Array& logsum, double smoothing, int64_t ignore) {
  const char* const op = "mimo_nll_backward";
  const NllSizes s = check_nll(op, logits, labels, smoothing, ignore);
  expect(op, "top", top, s.type, "[N, M]", {s.N, s.M});
  expect(op, "logsum", logsum, s.type, "[N, M]", {s.N, s.M});
  if (dloss.given()) expect(op, "dloss", dloss, s.type, "[]", {});
  if (dnll.given()) expect(op, "dnll", dnll, s.type, "[N, M]", {s.N, s.M});
  return s;
}

}  // namespace fastseq::door
