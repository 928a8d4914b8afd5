// A model out of a file: immutable and safe to use from several threads, each with its own workspace and states.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "deploy/layer.h"

namespace fastseq::deploy {

// Memory of one run at a time, kept for the next.
struct Workspace {
  struct Slot {
    Data data;
    Buffer values;
    std::vector<int64_t> lengths;
  };
  std::vector<Slot> slots;  // one for each layer
  std::vector<Buffer> scratch = std::vector<Buffer>(kScratch);
};

struct Input {
  int64_t T, B;
  const float* floats;      // [T, B, C], or null
  const int32_t* integers;  // [T, B], or null
  const int64_t* lengths;   // [B] 0 .. T, or null
  float* const* state;      // [B], each of state_size floats; become those after the last step
  bool carried;             // the states come from an earlier call, or this is not the end
};

class Model {
 public:
  static std::shared_ptr<const Model> load(const std::string& path);
  static std::shared_ptr<const Model> parse(const uint8_t* bytes, size_t size);

  const Shape& input() const { return input_; }
  const Shape& output() const { return layers_.back().shape; }
  int64_t state_size() const { return state_size_; }
  void begin(float* state) const;
  // Empty, or why rows cannot be given in pieces.
  const std::string& looks_ahead() const { return looks_ahead_; }
  // JSON: layers, tensors, sizes.
  const std::string& description() const { return description_; }

  // Throws Error where an index, a length or a state does not fit.
  void run(const Input& input, int threads, Workspace& workspace, Output& output) const;

 private:
  struct Entry {
    std::unique_ptr<Layer> layer;
    Shape shape;  // of its results
  };
  explicit Model(const File& file);
  void add(const Json& json, const File& file);
  void describe(const File& file, const Json& json);

  Shape input_;
  std::vector<Entry> layers_;
  int64_t state_size_ = 0;
  std::string looks_ahead_, description_;
};

}  // namespace fastseq::deploy
