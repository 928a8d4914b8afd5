// LSTM layers and directions over the packed core. Two directions run side by side where there are two threads: they
// need no barrier.
#include "core/lstm_packed.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "deploy/layer.h"
#include "deploy/weights.h"

namespace fastseq::deploy {
namespace {

struct Direction {
  Matrix ih, hh;
  std::optional<Matrix> hr;
  std::vector<float> bias, h_start, c_start;  // empty: none
};

struct Lane {
  core::LstmPacked call;
  Buffer* memory;
};

void run_lane(const Lane& lane, const core::Team& team) {
  uint8_t* const scratch =
      lane.memory->get<uint8_t>(static_cast<int64_t>(core::lstm_packed_scratch(lane.call, team.most)));
  core::lstm_packed(lane.call, scratch, team);
}

void lane_body(const void* context, int rank, int size, core::Barrier&) {
  const auto* const lanes = static_cast<const Lane*>(context);
  for (int n = rank; n < 2; n += size) run_lane(lanes[n], {1, core::run_alone});
}

class Lstm : public Layer {
 public:
  Lstm(const Description& d, const std::vector<Shape>& inputs)
      : H_(d.size("hidden_size", 1, kMostSize)),
        P_(d.size("proj_size", 0, kMostSize, 0)),
        directions_(d.flag("bidirectional", false) ? 2 : 1),
        reverse_(d.flag("reverse", false)),
        tau_(d.real("tau", 1.0)),
        hard_(d.flag("hard", false)) {
    const int64_t I = d.size("input_size", 1, kMostSize), layers = d.size("num_layers", 1, 1024, 1);
    const int64_t group = d.size("group", 0, kMostSize, 0);
    d.expect(inputs, false, I);
    if (!(tau_ > 0) || !std::isfinite(tau_)) d.wrong("tau must be greater than 0");
    if (reverse_ && directions_ == 2) d.wrong("reverse is for one direction");
    for (int64_t l = 0; l < layers; ++l) {
      for (int n = 0; n < directions_; ++n) {
        const std::string end = "_l" + std::to_string(l) + (n || reverse_ ? "_reverse" : "");
        read(d, end, l ? directions_ * out_size() : I, group);
      }
    }
  }
  Shape shape() const override { return {false, directions_ * out_size()}; }
  int64_t state_size() const override { return static_cast<int64_t>(parts_.size()) * (out_size() + H_); }
  void begin(float* state) const override {
    std::memset(state, 0, static_cast<size_t>(state_size()) * sizeof(float));
    for (size_t n = 0; n < parts_.size(); ++n) {
      float* const at = state + static_cast<int64_t>(n) * (out_size() + H_);
      std::copy(parts_[n].h_start.begin(), parts_[n].h_start.end(), at);
      std::copy(parts_[n].c_start.begin(), parts_[n].c_start.end(), at + out_size());
    }
  }
  const char* looks_ahead() const override {
    return directions_ == 2 || reverse_ ? "its reverse direction begins at the end" : nullptr;
  }
  void run(const Run& run, const std::vector<const Data*>& inputs, Output& out) const override;

 private:
  int64_t out_size() const { return P_ ? P_ : H_; }
  void read(const Description& d, const std::string& end, int64_t I, int64_t group) {
    const auto name = [&](const char* kind) { return d.name + '.' + kind + end; };
    Direction part;
    part.ih = Matrix::read(d.file, name("weight_ih"), 4 * H_, I, {4, false, group});
    part.hh = Matrix::read(d.file, name("weight_hh"), 4 * H_, out_size(), {4, P_ == 0, group});
    if (P_) part.hr = Matrix::read(d.file, name("weight_hr"), P_, H_, {1, true, group});
    if (part.hr && part.hr->packed().gate[0].rank) d.wrong("weight_hr must be whole, not two factors");
    part.bias = read_optional(d.file, name("bias"), {4 * H_});
    part.h_start = read_optional(d.file, name("h_start"), {out_size()});
    part.c_start = read_optional(d.file, name("c_start"), {H_});
    parts_.push_back(std::move(part));
  }
  core::LstmPacked call_of(const Direction& part, const Data& in, const float* x, float* states, float* h,
                           bool reverse) const;
  void load_state(const Run& run, size_t part, int64_t B, float* states) const;
  void keep_state(const Run& run, size_t part, int64_t B, const float* states) const;

  int64_t H_, P_;
  int directions_;
  bool reverse_;  // the only direction
  double tau_;
  bool hard_;
  std::vector<Direction> parts_;  // by layer and direction
};

// states: h0, c0, h_n, c_n of all rows.
core::LstmPacked Lstm::call_of(const Direction& part, const Data& in, const float* x, float* states, float* h,
                               bool reverse) const {
  const int64_t P = out_size(), B = in.B;
  float* const h0 = states;
  float* const c0 = h0 + B * P;
  float* const h_n = c0 + B * H_;
  float* const c_n = h_n + B * P;
  core::LstmPacked call{};
  call.forward.args = {in.T,       B,       in.T * B, H_,      P,       nullptr, nullptr, h0,     c0,
                       in.lengths, nullptr, nullptr,  nullptr, nullptr, tau_,    hard_,   reverse};
  call.forward.h = h;
  call.forward.h_n = h_n;
  call.forward.c_n = c_n;
  call.weight_hh = &part.hh.packed();
  call.weight_hr = part.hr ? &part.hr->packed() : nullptr;
  call.weight_ih = &part.ih.packed();
  call.x = x;
  call.bias = part.bias.empty() ? nullptr : part.bias.data();
  return call;
}

void Lstm::load_state(const Run& run, size_t part, int64_t B, float* states) const {
  const int64_t P = out_size(), at = state_offset + static_cast<int64_t>(part) * (P + H_);
  for (int64_t b = 0; b < B; ++b) {
    std::copy_n(run.state[b] + at, P, states + b * P);
    std::copy_n(run.state[b] + at + P, H_, states + B * P + b * H_);
  }
}

void Lstm::keep_state(const Run& run, size_t part, int64_t B, const float* states) const {
  const int64_t P = out_size(), at = state_offset + static_cast<int64_t>(part) * (P + H_);
  const float* const last = states + B * (P + H_);
  for (int64_t b = 0; b < B; ++b) {
    std::copy_n(last + b * P, P, run.state[b] + at);
    std::copy_n(last + B * P + b * H_, H_, run.state[b] + at + P);
  }
}

void Lstm::run(const Run& run, const std::vector<const Data*>& inputs, Output& out) const {
  const Data& in = *inputs[0];
  const int64_t P = out_size(), B = in.B, N = in.T * B, width = directions_ * P;
  const int64_t layers = static_cast<int64_t>(parts_.size()) / directions_;
  float* const y = out.floats(in.T, B, width);
  const float* x = in.floats;
  for (int64_t l = 0; l < layers; ++l) {
    float* const to = l + 1 == layers ? y : run.scratch[l & 1].get<float>(N * width);
    Lane lanes[2];
    float* states[2] = {};
    for (int n = 0; n < directions_; ++n) {
      const size_t part = static_cast<size_t>(l * directions_ + n);
      states[n] = run.scratch[2 + n].get<float>(2 * B * (P + H_));
      load_state(run, part, B, states[n]);
      float* const h = directions_ == 1 ? to : run.scratch[4 + n].get<float>(N * P);
      lanes[n] = {call_of(parts_[part], in, x, states[n], h, n == 1 || reverse_), &run.scratch[6 + n]};
    }
    if (directions_ == 1) {
      run_lane(lanes[0], run.team);
    } else {
      const double work = double(N) * 4.0 * double(H_) * double(P + parts_[0].ih.packed().K);
      run.team.run(core::team_size(work, std::min(run.team.most, 2)), lane_body, lanes);
      for (int64_t e = 0; e < N; ++e) {
        std::copy_n(lanes[0].call.forward.h + e * P, P, to + e * width);
        std::copy_n(lanes[1].call.forward.h + e * P, P, to + e * width + P);
      }
    }
    for (int n = 0; n < directions_; ++n) keep_state(run, static_cast<size_t>(l * directions_ + n), B, states[n]);
    x = to;
  }
}

}  // namespace

std::unique_ptr<Layer> make_lstm(const Description& d, const std::vector<Shape>& inputs) {
  return std::make_unique<Lstm>(d, inputs);
}

}  // namespace fastseq::deploy
