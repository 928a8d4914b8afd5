// Rows that are given piece by piece, each with a state of its own.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "deploy/model.h"

namespace fastseq::deploy {

class Stream {
 public:
  explicit Stream(std::shared_ptr<const Model> model);

  const std::shared_ptr<const Model>& model() const { return model_; }
  void reset();
  // The state, of model()->state_size() floats; loading checks that they are finite.
  void save(float* out);
  void load(const float* from);
  // The next T steps: x [T, C], floats or integers as the model's input is.
  void step(int64_t T, const void* x, int threads, Output& output);
  // One or more steps of many streams of one model at once: x [T, n, C].
  static void step(Stream* const* streams, int64_t n, int64_t T, const void* x, int threads, Output& output);

 private:
  // Keeps a stream from being used by two threads at once: an Error, not a wait.
  class Use {
   public:
    explicit Use(Stream& stream);
    ~Use();
    Use(const Use&) = delete;

   private:
    Stream& stream_;
  };

  std::shared_ptr<const Model> model_;
  std::vector<float> state_;
  std::unique_ptr<Workspace> workspace_;  // made with the first step
  std::atomic<bool> used_{false};
};

}  // namespace fastseq::deploy
