#include "deploy/stream.h"

#include <algorithm>
#include <cmath>
#include <deque>

namespace fastseq::deploy {

Stream::Use::Use(Stream& stream) : stream_(stream) {
  if (stream.used_.exchange(true, std::memory_order_acquire))
    fail("a stream is in use by another thread, or twice in one call");
}
Stream::Use::~Use() { stream_.used_.store(false, std::memory_order_release); }

Stream::Stream(std::shared_ptr<const Model> model) : model_(std::move(model)) {
  if (!model_->looks_ahead().empty()) fail("this model cannot run piece by piece: ", model_->looks_ahead());
  state_.resize(static_cast<size_t>(model_->state_size()));
  model_->begin(state_.data());
}

void Stream::reset() {
  const Use use(*this);
  model_->begin(state_.data());
}

void Stream::save(float* out) {
  const Use use(*this);
  std::copy(state_.begin(), state_.end(), out);
}

void Stream::load(const float* from) {
  const Use use(*this);
  for (size_t n = 0; n < state_.size(); ++n) {
    if (!std::isfinite(from[n])) fail("a state must be finite, got ", from[n], " at ", n);
  }
  std::copy_n(from, state_.size(), state_.begin());
}

void Stream::step(int64_t T, const void* x, int threads, Output& output) {
  Stream* const one = this;
  step(&one, 1, T, x, threads, output);
}

void Stream::step(Stream* const* streams, int64_t n, int64_t T, const void* x, int threads, Output& output) {
  if (n < 1) fail("there must be at least one stream");
  const Model& model = *streams[0]->model_;
  std::deque<Use> used;
  std::vector<float*> states;
  for (int64_t b = 0; b < n; ++b) {
    if (streams[b]->model_ != streams[0]->model_) fail("all streams must be of one model");
    used.emplace_back(*streams[b]);
    states.push_back(streams[b]->state_.data());
  }
  if (!streams[0]->workspace_) streams[0]->workspace_ = std::make_unique<Workspace>();
  const bool index = model.input().index;
  const Input input{T,
                    n,
                    index ? nullptr : static_cast<const float*>(x),
                    index ? static_cast<const int32_t*>(x) : nullptr,
                    nullptr,
                    states.data(),
                    true};
  model.run(input, threads, *streams[0]->workspace_, output);
}

}  // namespace fastseq::deploy
