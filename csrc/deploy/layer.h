// One layer of a model: what it makes of the layers before it, and the state that it carries from call to call.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/parallel.h"
#include "deploy/file.h"

namespace fastseq::deploy {

// What flows between layers, step by step: [T, B, C] floats, or integers such as characters and codes.
struct Shape {
  bool index = false;
  int64_t C = 0;
};
struct Data {
  int64_t T = 0, B = 0;
  Shape shape;
  const float* floats = nullptr;
  const int32_t* integers = nullptr;
  const int64_t* lengths = nullptr;  // [B], or null: all T steps of every row

  int64_t length(int64_t b) const { return lengths ? lengths[b] : T; }
};

// 64-byte aligned memory that grows and is kept.
class Buffer {
 public:
  template <class T>
  T* get(int64_t count) {
    return static_cast<T*>(bytes(static_cast<size_t>(count) * sizeof(T)));
  }

 private:
  struct Free {
    void operator()(void* memory) const;
  };
  void* bytes(size_t size);
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

// Where a layer writes its results: asked once, as soon as their size is known.
class Output {
 public:
  virtual ~Output() = default;
  virtual float* floats(int64_t T, int64_t B, int64_t C) = 0;
  virtual int32_t* integers(int64_t T, int64_t B, int64_t C) = 0;
  // Number of results of each row; without this call as many as there are steps.
  virtual int64_t* lengths(int64_t B) = 0;
};

struct Run {
  core::Team team;
  std::vector<Buffer>& scratch;  // at least kScratch of them, for one layer at a time
  float* const* state;           // [B] the state of each row, of all layers
  bool carried;                  // it comes from an earlier call, or goes to a later one
};
constexpr size_t kScratch = 8;

class Layer {
 public:
  virtual ~Layer() = default;
  virtual Shape shape() const = 0;
  // Floats of state of a row, and what they are at its beginning.
  virtual int64_t state_size() const { return 0; }
  virtual void begin(float*) const {}
  // Null, or why a row cannot be given in pieces.
  virtual const char* looks_ahead() const { return nullptr; }
  virtual void run(const Run& run, const std::vector<const Data*>& inputs, Output& out) const = 0;

  std::string name;
  std::vector<int> from;  // numbers of the layers that it reads; -1: the input
  int64_t state_offset = 0;
};

// A layer as a file describes it.
class Description {
 public:
  Description(const Json& json, const File& file, const std::string& name) : json_(json), file(file), name(name) {}
  int64_t size(const char* field, int64_t least, int64_t most) const;
  int64_t size(const char* field, int64_t least, int64_t most, int64_t otherwise) const;
  double real(const char* field, double otherwise) const;
  bool flag(const char* field, bool otherwise) const;
  std::string text(const char* field, const char* otherwise) const;
  std::string tensor(const char* field) const { return name + '.' + field; }
  [[noreturn]] void wrong(const std::string& message) const;
  // The only input, of floats [C], or integers where `index`.
  void expect(const std::vector<Shape>& inputs, bool index, int64_t C) const;

 private:
  const Json& json_;

 public:
  const File& file;
  const std::string& name;
};

constexpr int64_t kMostSize = 65536;  // of everything but a vocabulary

using Make = std::unique_ptr<Layer> (*)(const Description&, const std::vector<Shape>& inputs);
std::unique_ptr<Layer> make_embedding(const Description&, const std::vector<Shape>&);
std::unique_ptr<Layer> make_linear(const Description&, const std::vector<Shape>&);
std::unique_ptr<Layer> make_conv1d(const Description&, const std::vector<Shape>&);
std::unique_ptr<Layer> make_relu(const Description&, const std::vector<Shape>&);
std::unique_ptr<Layer> make_tanh(const Description&, const std::vector<Shape>&);
std::unique_ptr<Layer> make_sigmoid(const Description&, const std::vector<Shape>&);
std::unique_ptr<Layer> make_softmax(const Description&, const std::vector<Shape>&);
std::unique_ptr<Layer> make_ensemble(const Description&, const std::vector<Shape>&);
std::unique_ptr<Layer> make_add(const Description&, const std::vector<Shape>&);
std::unique_ptr<Layer> make_concat(const Description&, const std::vector<Shape>&);
std::unique_ptr<Layer> make_lstm(const Description&, const std::vector<Shape>&);
std::unique_ptr<Layer> make_residual_vq(const Description&, const std::vector<Shape>&);
std::unique_ptr<Layer> make_crf(const Description&, const std::vector<Shape>&);

}  // namespace fastseq::deploy
