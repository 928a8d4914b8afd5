// Layers that multiply by a matrix, and the embedding.
#include <algorithm>
#include <cstring>

#include "core/matrix.h"
#include "deploy/layer.h"
#include "deploy/weights.h"

namespace fastseq::deploy {
namespace {

constexpr int64_t kMostVocabulary = int64_t(1) << 31;

class Embedding : public Layer {
 public:
  Embedding(const Description& d, const std::vector<Shape>& inputs)
      : V_(d.size("size", 1, kMostVocabulary)),
        D_(d.size("dim", 1, kMostSize)),
        table_(Table::read(d.file, d.tensor("weight"), V_, D_, d.size("group", 0, kMostSize, 0))) {
    d.expect(inputs, true, 0);
  }
  Shape shape() const override { return {false, D_}; }
  void run(const Run&, const std::vector<const Data*>& inputs, Output& out) const override {
    const Data& in = *inputs[0];
    float* const y = out.floats(in.T, in.B, D_);
    for (int64_t e = 0; e < in.T * in.B; ++e) {
      const int64_t id = in.integers[e];
      const bool valid = e / in.B < in.length(e % in.B);
      if (valid && (id < 0 || id >= V_)) fail("layer '", name, "': x must lie in 0 .. ", V_ - 1, ", got ", id);
      if (valid) {
        table_.row(id, y + e * D_);
      } else {
        std::fill_n(y + e * D_, D_, 0.0f);
      }
    }
  }

 private:
  int64_t V_, D_;
  Table table_;
};

// y = x @ weight.T + bias over rows that lie one after the other.
struct Affine {
  Matrix weight;
  std::vector<float> bias;

  Affine(const Description& d, int64_t N, int64_t K)
      : weight(Matrix::read(d.file, d.tensor("weight"), N, K, {1, false, d.size("group", 0, kMostSize, 0)})),
        bias(read_optional(d.file, d.tensor("bias"), {N})) {}
  void run(const Run& run, int64_t rows, const float* x, float* y, Buffer& memory) const {
    constexpr int64_t kRows = 4096;  // at a time, to bound the memory for their integers
    const core::PackedMatrix& w = weight.packed();
    for (int64_t first = 0; first < rows; first += kRows) {
      const int64_t count = std::min(kRows, rows - first);
      const float* const plus = bias.empty() ? nullptr : bias.data();
      const core::LinearPacked call{count, x + first * w.K, w.K, plus, y + first * w.N, w.N};
      uint8_t* const scratch =
          memory.get<uint8_t>(static_cast<int64_t>(core::linear_packed_scratch(w, count, run.team.most)));
      core::linear_packed(w, call, scratch, run.team);
    }
  }
};

class Linear : public Layer {
 public:
  Linear(const Description& d, const std::vector<Shape>& inputs)
      : K_(d.size("in", 1, kMostSize)), N_(d.size("out", 1, kMostSize)), affine_(d, N_, K_) {
    d.expect(inputs, false, K_);
  }
  Shape shape() const override { return {false, N_}; }
  void run(const Run& run, const std::vector<const Data*>& inputs, Output& out) const override {
    const Data& in = *inputs[0];
    affine_.run(run, in.T * in.B, in.floats, out.floats(in.T, in.B, N_), run.scratch[0]);
  }

 private:
  int64_t K_, N_;
  Affine affine_;
};

// The state holds the steps that the next result still needs: how many, then the steps, the latest `window - 1` at
// most.
class Conv1d : public Layer {
 public:
  Conv1d(const Description& d, const std::vector<Shape>& inputs)
      : C_(d.size("in", 1, kMostSize)),
        N_(d.size("out", 1, kMostSize)),
        taps_(d.size("kernel", 1, kMostSize)),
        stride_(d.size("stride", 1, kMostSize, 1)),
        dilation_(d.size("dilation", 1, kMostSize, 1)),
        window_((taps_ - 1) * dilation_ + 1),
        left_(d.size("left", 0, kMostSize, 0)),
        right_(d.size("right", 0, kMostSize, 0)),
        affine_(d, N_, taps_ * C_) {
    d.expect(inputs, false, C_);
    if (stride_ > window_) d.wrong("stride must be at most its window of " + std::to_string(window_) + " steps");
    if (left_ >= window_ || right_ >= window_) {
      d.wrong("left and right must be below its window of " + std::to_string(window_) + " steps");
    }
  }
  Shape shape() const override { return {false, N_}; }
  int64_t state_size() const override { return 1 + (window_ - 1) * C_; }
  void begin(float* state) const override {
    std::fill_n(state, state_size(), 0.0f);
    state[0] = static_cast<float>(left_);
  }
  const char* looks_ahead() const override { return right_ ? "it needs steps that come after" : nullptr; }

  void run(const Run& run, const std::vector<const Data*>& inputs, Output& out) const override {
    const Data& in = *inputs[0];
    int64_t* const lengths = out.lengths(in.B);
    int64_t most = 0;
    for (int64_t b = 0; b < in.B; ++b) {
      const int64_t steps = held(run, b) + in.length(b) + right_;
      lengths[b] = steps < window_ ? 0 : (steps - window_) / stride_ + 1;
      most = std::max(most, lengths[b]);
    }
    float* const y = out.floats(most, in.B, N_);
    for (int64_t b = 0; b < in.B; ++b) row(run, in, b, lengths[b], most, y);
  }

 private:
  int64_t held(const Run& run, int64_t b) const {
    const float count = run.state[b][state_offset];
    if (!(count >= 0 && count <= static_cast<float>(window_ - 1)))
      fail("layer '", name, "': this is not a state of it");
    return static_cast<int64_t>(count);
  }
  // One row of the batch: its steps in a line, the windows out of them, the product, and what the next call needs.
  void row(const Run& run, const Data& in, int64_t b, int64_t results, int64_t most, float* y) const {
    float* const state = run.state[b] + state_offset;
    const int64_t before = held(run, b), T = in.length(b), steps = before + T + right_, width = taps_ * C_;
    float* const line = run.scratch[1].get<float>(steps * C_);
    std::copy_n(state + 1, before * C_, line);
    for (int64_t t = 0; t < T; ++t) std::copy_n(in.floats + (t * in.B + b) * C_, C_, line + (before + t) * C_);
    std::fill_n(line + (before + T) * C_, right_ * C_, 0.0f);
    float* const windows = run.scratch[2].get<float>(results * width);
    for (int64_t n = 0; n < results; ++n) {
      for (int64_t k = 0; k < taps_; ++k) {
        std::copy_n(line + (n * stride_ + k * dilation_) * C_, C_, windows + n * width + k * C_);
      }
    }
    float* const made = run.scratch[3].get<float>(results * N_);
    affine_.run(run, results, windows, made, run.scratch[0]);
    for (int64_t n = 0; n < most; ++n) {
      float* const to = y + (n * in.B + b) * N_;
      n < results ? void(std::copy_n(made + n * N_, N_, to)) : void(std::fill_n(to, N_, 0.0f));
    }
    const int64_t left = steps - right_ - results * stride_;
    state[0] = static_cast<float>(right_ ? 0 : left);
    std::fill_n(state + 1, (window_ - 1) * C_, 0.0f);
    if (!right_) std::copy_n(line + results * stride_ * C_, left * C_, state + 1);
  }

  int64_t C_, N_, taps_, stride_, dilation_, window_, left_, right_;
  Affine affine_;
};

}  // namespace

std::unique_ptr<Layer> make_embedding(const Description& d, const std::vector<Shape>& inputs) {
  return std::make_unique<Embedding>(d, inputs);
}
std::unique_ptr<Layer> make_linear(const Description& d, const std::vector<Shape>& inputs) {
  return std::make_unique<Linear>(d, inputs);
}
std::unique_ptr<Layer> make_conv1d(const Description& d, const std::vector<Shape>& inputs) {
  return std::make_unique<Conv1d>(d, inputs);
}

}  // namespace fastseq::deploy
