// Layers whose results are integers: codes of a residual quantizer, labels by Viterbi's algorithm.
#include <algorithm>
#include <cmath>

#include "core/vq_residual.h"
#include "deploy/layer.h"
#include "deploy/weights.h"

namespace fastseq::deploy {
namespace {

void normalize(const float* x, int64_t D, float* y) {
  double square = 0;
  for (int64_t n = 0; n < D; ++n) square += double(x[n]) * x[n];
  const auto size = static_cast<float>(std::max(std::sqrt(square), 1e-12));
  for (int64_t n = 0; n < D; ++n) y[n] = x[n] / size;
}

class ResidualVq : public Layer {
 public:
  ResidualVq(const Description& d, const std::vector<Shape>& inputs)
      : D_(d.size("dim", 1, kMostSize)), K_(d.size("size", 1, int64_t(1) << 30)), L_(d.size("levels", 1, 1024, 1)) {
    d.expect(inputs, false, D_);
    const std::string metric = d.text("metric", "euclidean"), output = d.text("output", "codes");
    if (metric != "euclidean" && metric != "cosine") d.wrong("metric must be euclidean or cosine, got " + metric);
    if (output != "codes" && output != "vectors") d.wrong("output must be codes or vectors, got " + output);
    cosine_ = metric == "cosine";
    codes_ = output == "codes";
    if (cosine_ && L_ > 1) d.wrong("metric cosine is for one level");
    codebooks_ = read_floats(d.file, d.tensor("codebooks"), {L_, K_, D_});
    for (int64_t k = 0; cosine_ && k < K_; ++k)
      normalize(&codebooks_[static_cast<size_t>(k * D_)], D_, &codebooks_[static_cast<size_t>(k * D_)]);
    for (int64_t l = 0; l < L_; ++l) levels_.push_back({K_, codebooks_.data() + l * K_ * D_, nullptr, nullptr});
  }
  Shape shape() const override { return codes_ ? Shape{true, L_} : Shape{false, D_}; }
  void run(const Run& run, const std::vector<const Data*>& inputs, Output& out) const override {
    const Data& in = *inputs[0];
    const int64_t N = in.T * in.B;
    const float* x = in.floats;
    if (cosine_) {
      float* const unit = run.scratch[1].get<float>(N * D_);
      for (int64_t e = 0; e < N; ++e) normalize(x + e * D_, D_, unit + e * D_);
      x = unit;
    }
    int64_t* const index = run.scratch[3].get<int64_t>(N * L_);
    float* const vectors = codes_ ? run.scratch[2].get<float>(N * D_) : out.floats(in.T, in.B, D_);
    const core::VqResidual<float> call{N,       D_,      L_,      x,     levels_.data(),
                                       nullptr, nullptr, vectors, index, run.scratch[4].get<float>(N * L_)};
    void* const memory = run.scratch[0].get<char>(static_cast<int64_t>(core::vq_residual_scratch(call, run.team.most)));
    core::vq_residual(call, memory, run.team);
    if (!codes_) return;
    int32_t* const y = out.integers(in.T, in.B, L_);
    for (int64_t n = 0; n < N * L_; ++n) y[n] = static_cast<int32_t>(index[n]);
  }

 private:
  int64_t D_, K_, L_;
  bool cosine_, codes_;
  std::vector<float> codebooks_;
  std::vector<core::VqLevel<float>> levels_;
};

class Crf : public Layer {
 public:
  Crf(const Description& d, const std::vector<Shape>& inputs) : K_(d.size("labels", 1, kMostSize)) {
    d.expect(inputs, false, K_);
    transitions_ = read_floats(d.file, d.tensor("transitions"), {K_, K_});
    start_ = read_floats(d.file, d.tensor("start"), {K_});
    end_ = read_floats(d.file, d.tensor("end"), {K_});
  }
  Shape shape() const override { return {true, 1}; }
  const char* looks_ahead() const override { return "the best labels depend on all steps"; }
  void run(const Run& run, const std::vector<const Data*>& inputs, Output& out) const override {
    const Data& in = *inputs[0];
    int32_t* const y = out.integers(in.T, in.B, 1);
    for (int64_t b = 0; b < in.B; ++b) {
      for (int64_t t = in.length(b); t < in.T; ++t) y[t * in.B + b] = -1;
      if (in.length(b)) decode(run, in, b, y);
    }
  }

 private:
  // The first of equal scores wins.
  void decode(const Run& run, const Data& in, int64_t b, int32_t* y) const {
    const int64_t T = in.length(b);
    int32_t* const came_from = run.scratch[1].get<int32_t>(T * K_);
    float* const score = run.scratch[2].get<float>(2 * K_);
    float* const next = score + K_;
    const auto scores = [&](int64_t t) { return in.floats + (t * in.B + b) * K_; };
    for (int64_t k = 0; k < K_; ++k) score[k] = start_[static_cast<size_t>(k)] + scores(0)[k];
    for (int64_t t = 1; t < T; ++t) {
      for (int64_t to = 0; to < K_; ++to) {
        int64_t best = 0;
        float most = 0;
        for (int64_t from = 0; from < K_; ++from) {
          const float found = score[from] + transitions_[static_cast<size_t>(from * K_ + to)] + scores(t)[to];
          if (from == 0 || found > most) most = found, best = from;
        }
        next[to] = most;
        came_from[t * K_ + to] = static_cast<int32_t>(best);
      }
      std::copy_n(next, K_, score);
    }
    for (int64_t k = 0; k < K_; ++k) score[k] += end_[static_cast<size_t>(k)];
    auto label = static_cast<int32_t>(std::max_element(score, score + K_) - score);
    for (int64_t t = T - 1; t >= 0; --t) {
      y[t * in.B + b] = label;
      if (t) label = came_from[t * K_ + label];
    }
  }

  int64_t K_;
  std::vector<float> transitions_, start_, end_;
};

}  // namespace

std::unique_ptr<Layer> make_residual_vq(const Description& d, const std::vector<Shape>& inputs) {
  return std::make_unique<ResidualVq>(d, inputs);
}
std::unique_ptr<Layer> make_crf(const Description& d, const std::vector<Shape>& inputs) {
  return std::make_unique<Crf>(d, inputs);
}

}  // namespace fastseq::deploy
