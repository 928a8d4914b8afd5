// Layers without weights: functions of each number, of each step, and of several layers.
#include <algorithm>
#include <cmath>

#include "deploy/layer.h"

namespace fastseq::deploy {
namespace {

class Pointwise : public Layer {
 public:
  using Function = void (*)(const float* x, int64_t C, float* y);  // of one step of one row
  Pointwise(const Description& d, const std::vector<Shape>& inputs, Function function) : function_(function) {
    if (inputs.size() == 1) shape_ = inputs[0];
    d.expect(inputs, false, shape_.C);
  }
  Shape shape() const override { return shape_; }
  void run(const Run&, const std::vector<const Data*>& inputs, Output& out) const override {
    const Data& in = *inputs[0];
    float* const y = out.floats(in.T, in.B, shape_.C);
    for (int64_t e = 0; e < in.T * in.B; ++e) function_(in.floats + e * shape_.C, shape_.C, y + e * shape_.C);
  }

 private:
  Shape shape_;
  Function function_;
};

template <float Each(float)>
void each(const float* x, int64_t C, float* y) {
  for (int64_t n = 0; n < C; ++n) y[n] = Each(x[n]);
}
float positive(float x) { return x > 0 || x != x ? x : 0.0f; }
float hyperbolic(float x) { return std::tanh(x); }
float logistic(float x) { return 1.0f / (1.0f + std::exp(-x)); }

void softmax(const float* x, int64_t C, float* y) {
  const float most = *std::max_element(x, x + C);
  float sum = 0;
  for (int64_t n = 0; n < C; ++n) sum += y[n] = std::exp(x[n] - most);
  for (int64_t n = 0; n < C; ++n) y[n] /= sum;
}

// As torch's argmax: the first of equals, and a NaN before every number.
int64_t largest(const float* x, int64_t C) {
  int64_t best = 0;
  for (int64_t n = 1; n < C; ++n) {
    if (x[n] > x[best] || (x[n] != x[n] && x[best] == x[best])) best = n;
  }
  return best;
}

// The mean over members of their softmax, then the share of pairs of members whose largest logits differ in place.
class Ensemble : public Layer {
 public:
  Ensemble(const Description& d, const std::vector<Shape>& inputs) : M_(d.size("members", 1, kMostSize)) {
    const int64_t C = inputs.size() == 1 ? inputs[0].C : 0;
    d.expect(inputs, false, C);
    if (C % M_) {
      d.wrong("its input of " + std::to_string(C) + " channels must hold as many for each of " + std::to_string(M_) +
              " members");
    }
    K_ = C / M_;
  }
  Shape shape() const override { return {false, K_ + 1}; }
  void run(const Run& run, const std::vector<const Data*>& inputs, Output& out) const override {
    const Data& in = *inputs[0];
    float* const y = out.floats(in.T, in.B, K_ + 1);
    float* const member = run.scratch[0].get<float>(K_);
    int64_t* const votes = run.scratch[1].get<int64_t>(K_);
    for (int64_t e = 0; e < in.T * in.B; ++e) step(in.floats + e * M_ * K_, member, votes, y + e * (K_ + 1));
  }

 private:
  void step(const float* logits, float* member, int64_t* votes, float* y) const {
    std::fill_n(y, K_, 0.0f);
    std::fill_n(votes, K_, 0);
    for (int64_t m = 0; m < M_; ++m, logits += K_) {
      softmax(logits, K_, member);
      for (int64_t k = 0; k < K_; ++k) y[k] += member[k];
      ++votes[largest(logits, K_)];
    }
    const int64_t pairs = M_ * (M_ - 1);  // each counted twice
    int64_t differ = pairs;
    for (int64_t k = 0; k < K_; ++k) {
      y[k] /= static_cast<float>(M_);
      differ -= votes[k] * (votes[k] - 1);
    }
    y[K_] = pairs ? static_cast<float>(differ) / static_cast<float>(pairs) : 0.0f;
  }

  int64_t M_, K_;
};

// Sum, or all channels side by side.
class Joined : public Layer {
 public:
  Joined(const Description& d, const std::vector<Shape>& inputs, bool add) : add_(add) {
    if (inputs.empty()) d.wrong("it takes at least one input");
    for (const Shape& shape : inputs) {
      if (shape.index) d.wrong("it takes floats, got integers");
      if (add && shape.C != inputs[0].C) d.wrong("its inputs must be of one width");
      C_ = add ? shape.C : C_ + shape.C;
    }
    if (C_ > kMostSize) d.wrong("its result is wider than " + std::to_string(kMostSize));
  }
  Shape shape() const override { return {false, C_}; }
  void run(const Run&, const std::vector<const Data*>& inputs, Output& out) const override {
    const Data& first = *inputs[0];
    for (const Data* in : inputs) {
      if (in->T != first.T) fail("layer '", name, "': its inputs have ", first.T, " and ", in->T, " steps");
    }
    float* const y = out.floats(first.T, first.B, C_);
    for (int64_t e = 0; e < first.T * first.B; ++e) {
      float* to = y + e * C_;
      if (add_) std::fill_n(to, C_, 0.0f);
      for (const Data* in : inputs) {
        const int64_t C = in->shape.C;
        const float* const from = in->floats + e * C;
        for (int64_t n = 0; n < C; ++n) to[n] = add_ ? to[n] + from[n] : from[n];
        if (!add_) to += C;
      }
    }
  }

 private:
  bool add_;
  int64_t C_ = 0;
};

}  // namespace

std::unique_ptr<Layer> make_relu(const Description& d, const std::vector<Shape>& inputs) {
  return std::make_unique<Pointwise>(d, inputs, each<positive>);
}
std::unique_ptr<Layer> make_tanh(const Description& d, const std::vector<Shape>& inputs) {
  return std::make_unique<Pointwise>(d, inputs, each<hyperbolic>);
}
std::unique_ptr<Layer> make_sigmoid(const Description& d, const std::vector<Shape>& inputs) {
  return std::make_unique<Pointwise>(d, inputs, each<logistic>);
}
std::unique_ptr<Layer> make_softmax(const Description& d, const std::vector<Shape>& inputs) {
  return std::make_unique<Pointwise>(d, inputs, softmax);
}
std::unique_ptr<Layer> make_ensemble(const Description& d, const std::vector<Shape>& inputs) {
  return std::make_unique<Ensemble>(d, inputs);
}
std::unique_ptr<Layer> make_add(const Description& d, const std::vector<Shape>& inputs) {
  return std::make_unique<Joined>(d, inputs, true);
}
std::unique_ptr<Layer> make_concat(const Description& d, const std::vector<Shape>& inputs) {
  return std::make_unique<Joined>(d, inputs, false);
}

}  // namespace fastseq::deploy
