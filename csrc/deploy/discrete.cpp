// Layers whose results are integers: codes of a residual quantizer, labels by Viterbi's algorithm.
#include <algorithm>
#include <limits>

#include "core/vq.h"
#include "core/vq_residual.h"
#include "deploy/layer.h"
#include "deploy/weights.h"

namespace fastseq::deploy {
namespace {

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
    for (int64_t l = 0; l < L_; ++l) levels_.push_back({K_, codebooks_.data() + l * K_ * D_, nullptr, nullptr});
  }
  Shape shape() const override { return codes_ ? Shape{true, L_} : Shape{false, D_}; }
  void run(const Run& run, const std::vector<const Data*>& inputs, Output& out) const override {
    const Data& in = *inputs[0];
    const int64_t N = in.T * in.B;
    int64_t* const index = run.scratch[3].get<int64_t>(N * L_);
    float* const vectors = codes_ ? run.scratch[2].get<float>(N * D_) : out.floats(in.T, in.B, D_);
    if (cosine_) {  // codes are of length 1, and the length of x changes nothing
      const core::VqNearest<float> call{
          {1, N, K_, D_, in.floats, codebooks_.data(), nullptr, true}, 1, 64, index, nullptr, nullptr, vectors};
      const auto bytes = static_cast<int64_t>(core::vq_nearest_scratch(call, run.team.most));
      core::vq_nearest(call, run.scratch[0].get<char>(bytes), run.team);
    } else {
      const core::VqResidual<float> call{N,       D_,      L_,      in.floats, levels_.data(),
                                         nullptr, nullptr, vectors, index,     run.scratch[4].get<float>(N * L_)};
      const auto bytes = static_cast<int64_t>(core::vq_residual_scratch(call, run.team.most));
      core::vq_residual(call, run.scratch[0].get<char>(bytes), run.team);
    }
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
  // The first of equal scores wins; a NaN never does.
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
        float most = kLeast;
        for (int64_t from = 0; from < K_; ++from) {
          const float found = score[from] + transitions_[static_cast<size_t>(from * K_ + to)];
          if (found > most) most = found, best = from;
        }
        next[to] = most + scores(t)[to];
        came_from[t * K_ + to] = static_cast<int32_t>(best);
      }
      std::copy_n(next, K_, score);
    }
    for (int64_t k = 0; k < K_; ++k) score[k] += end_[static_cast<size_t>(k)];
    int32_t label = 0;
    float most = kLeast;
    for (int64_t k = 0; k < K_; ++k) {
      if (score[k] > most) most = score[k], label = static_cast<int32_t>(k);
    }
    for (int64_t t = T - 1; t >= 0; --t) {
      y[t * in.B + b] = label;
      if (t) label = came_from[t * K_ + label];
    }
  }

  static constexpr float kLeast = -std::numeric_limits<float>::infinity();
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
