// What both directions of the computation share: where rows and steps lie, and the arithmetic of one cell in float32.
#include "cuda/await.inl.h"

namespace fastseq::cuda {

// Row b has steps 0 .. steps - 1.
FASTSEQ_DEVICE int steps_of(const PersistShape& shape, int64_t b) {
  if (b >= shape.B) return 0;
  if (!shape.lengths) return static_cast<int>(shape.T);
  const int64_t own = shape.lengths[b];
  return static_cast<int>(own < 0 ? 0 : own > shape.T ? shape.T : own);
}

// Elements from step s to the next, of 32 steps from s on: each lane has those of one. Dense rows lie evenly.
template <class TimeOf>
FASTSEQ_DEVICE int apart_from(const PersistShape& shape, int s, int steps, TimeOf time_of) {
  const int before = s + thread_index() % 32;
  if (!shape.offsets) return static_cast<int>((time_of(1) - time_of(0)) * shape.B);
  return before + 1 < steps ? static_cast<int>(shape.offsets[time_of(before + 1)] - shape.offsets[time_of(before)]) : 0;
}

FASTSEQ_DEVICE int64_t element(const PersistShape& shape, int t, int64_t b) {
  return shape.offsets ? shape.offsets[t] + b : t * shape.B + b;
}

// Two neighbours of a row of `width` numbers from k on, zeros beyond its end.
FASTSEQ_DEVICE uint32_t pair_at(const uint16_t* row, int64_t k, int64_t width) {
  const uint32_t first = k < width ? row[k] : 0, second = k + 1 < width ? row[k + 1] : 0;
  return first | second << 16;
}

// Four neighbours of a row of bytes.
FASTSEQ_DEVICE uint32_t bytes_at(const uint8_t* row, int64_t k, int64_t width) {
  uint32_t found = 0;
  for (int n = 0; n < 4; ++n) found |= k + n < width ? uint32_t{row[k + n]} << 8 * n : 0;
  return found;
}

// 127 * h to the nearest integer, in -127 .. 127; NaN counts as 0. Its low byte.
FASTSEQ_DEVICE uint32_t quantized(float h) {
  const float scaled = h * 127.0f, bounded = scaled < -127.0f ? -127.0f : scaled > 127.0f ? 127.0f : scaled;
  return static_cast<uint32_t>(h == h ? nearest(bounded) : 0) & 0xff;
}

struct Gates {
  float i, f, g, o;
};

constexpr float kLog2E = 1.44269504088896341f;
FASTSEQ_DEVICE float tanh_of(float x) { return multiplied_added(-2.0f, logistic(2.0f * kLog2E * x), 1.0f); }
// Of i and f: sigmoid(z / tau) is logistic(slope * z).
FASTSEQ_DEVICE float slope_of(const PersistShape& shape) { return -kLog2E * shape.inverse_tau; }
FASTSEQ_DEVICE float input_gate(float z, bool hard, float slope) {
  const float soft = logistic(slope * z), step = z > 0 ? 1.0f : 0.0f;
  return hard ? step : soft;
}

// Activated gates from pre-activations.
FASTSEQ_DEVICE Gates activated(Gates z, bool hard, float slope) {
  return {input_gate(z.i, hard, slope), input_gate(z.f, hard, slope), tanh_of(z.g), logistic(-kLog2E * z.o)};
}

// Gradients of the pre-activations, and of the cell before in dc.
FASTSEQ_DEVICE Gates cell_backward(Gates a, float c, float c_before, float dh, float& dc, const PersistShape& shape) {
  const float tanh_c = tanh_of(c);
  dc += dh * a.o * (1.0f - tanh_c * tanh_c);
  Gates d{dc * a.g, dc * c_before, dc * a.i, dh * tanh_c};
  dc *= a.f;
  const float scale = shape.hard ? 0.0f : shape.inverse_tau;
  d.i *= a.i * (1.0f - a.i) * scale, d.f *= a.f * (1.0f - a.f) * scale;
  d.g *= 1.0f - a.g * a.g, d.o *= a.o * (1.0f - a.o);
  return d;
}

}  // namespace fastseq::cuda
