#include "deploy/model.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "deploy/pool.h"

namespace fastseq::deploy {
namespace {

constexpr const char* kFormat = "fastseq 1";
constexpr size_t kMostLayers = 1000;

struct Type {
  const char* name;
  Make make;
  const char* width;  // the field with the channels of its input; empty: it takes any
};
constexpr Type kTypes[] = {
    {"embedding", make_embedding, ""}, {"linear", make_linear, "in"},     {"conv1d", make_conv1d, "in"},
    {"relu", make_relu, ""},           {"tanh", make_tanh, ""},           {"sigmoid", make_sigmoid, ""},
    {"softmax", make_softmax, ""},     {"ensemble", make_ensemble, ""},   {"add", make_add, ""},
    {"concat", make_concat, ""},       {"lstm", make_lstm, "input_size"}, {"residual_vq", make_residual_vq, "dim"},
    {"crf", make_crf, "labels"},
};

const Type& type_of(const std::string& layer, const std::string& name) {
  std::string known;
  for (const Type& type : kTypes) {
    if (name == type.name) return type;
    known += std::string(known.empty() ? "" : ", ") + type.name;
  }
  fail("layer '", layer, "': type must be one of ", known, ", got '", name, "'");
}

// Results of a layer inside the model.
class Inside : public Output {
 public:
  Inside(Workspace::Slot& slot, const Shape& shape) : slot_(slot) {
    slot.data = {0, 0, shape, nullptr, nullptr, nullptr};
  }
  float* floats(int64_t T, int64_t B, int64_t C) override {
    float* const out = slot_.values.get<float>(T * B * C);
    slot_.data.T = T, slot_.data.B = B, slot_.data.floats = out;
    return out;
  }
  int32_t* integers(int64_t T, int64_t B, int64_t C) override {
    int32_t* const out = slot_.values.get<int32_t>(T * B * C);
    slot_.data.T = T, slot_.data.B = B, slot_.data.integers = out;
    return out;
  }
  int64_t* lengths(int64_t B) override {
    slot_.lengths.resize(static_cast<size_t>(B));
    slot_.data.lengths = slot_.lengths.data();
    return slot_.lengths.data();
  }

 private:
  Workspace::Slot& slot_;
};

// Results of the last layer, which go to the caller; what lies beyond a row's length is cleared there.
class Last : public Output {
 public:
  explicit Last(Output& to, const int64_t* lengths) : to_(to), lengths_(lengths) {}
  float* floats(int64_t T, int64_t B, int64_t C) override {
    set(T, B, C);
    return floats_ = to_.floats(T, B, C);
  }
  int32_t* integers(int64_t T, int64_t B, int64_t C) override {
    set(T, B, C);
    return integers_ = to_.integers(T, B, C);
  }
  int64_t* lengths(int64_t B) override {
    int64_t* const out = to_.lengths(B);
    lengths_ = out;
    return out;
  }
  void clear() const {
    for (int64_t b = 0; lengths_ && b < B_; ++b) {
      for (int64_t t = lengths_[b]; t < T_; ++t) {
        if (floats_) std::fill_n(floats_ + (t * B_ + b) * C_, C_, 0.0f);
        if (integers_) std::fill_n(integers_ + (t * B_ + b) * C_, C_, -1);
      }
    }
  }

 private:
  void set(int64_t T, int64_t B, int64_t C) { T_ = T, B_ = B, C_ = C; }
  Output& to_;
  const int64_t* lengths_;
  int64_t T_ = 0, B_ = 0, C_ = 0;
  float* floats_ = nullptr;
  int32_t* integers_ = nullptr;
};

}  // namespace

std::shared_ptr<const Model> Model::parse(const uint8_t* bytes, size_t size) {
  const File file = File::parse(bytes, size);
  return std::shared_ptr<const Model>(new Model(file));
}

std::shared_ptr<const Model> Model::load(const std::string& path) {
  try {
    const File file = File::read(path);
    return std::shared_ptr<const Model>(new Model(file));
  } catch (const FileError&) {
    throw;
  } catch (const Error& error) {
    fail(path, ": ", error.what());
  }
}

Model::Model(const File& file) {
  const auto& metadata = file.metadata();
  const auto format = metadata.find("format");
  if (format == metadata.end()) fail("not a fastseq model: its metadata name no format");
  if (format->second != kFormat) fail("its format is '", format->second, "', this version reads '", kFormat, "'");
  const auto text = metadata.find("model");
  if (text == metadata.end()) fail("not a fastseq model: its metadata hold no model");
  const Json json = Json::parse(text->second, "model");
  const Json* const layers = json.find("layers");
  if (!layers || layers->kind != Json::Kind::list || layers->list.empty() || layers->list.size() > kMostLayers) {
    fail("model: layers must be a list of 1 .. ", kMostLayers, " objects");
  }
  for (const Json& layer : layers->list) add(layer, file);
  describe(file, json);
}

void Model::add(const Json& json, const File& file) {
  const auto number = layers_.size();
  if (json.kind != Json::Kind::object) fail("layer ", number, " must be an object, got ", json.kind_name());
  const Json *const named = json.find("name"), *const typed = json.find("type"), *const from = json.find("from");
  if (!named || named->kind != Json::Kind::text || named->text.empty() || named->text == "input") {
    fail("layer ", number, ": name must be a string, and not 'input'");
  }
  const std::string& name = named->text;
  for (const auto& entry : layers_) {
    if (entry.layer->name == name) fail("layer '", name, "' stands there twice");
  }
  if (!typed || typed->kind != Json::Kind::text) fail("layer '", name, "': type must be a string");
  const Type& type = type_of(name, typed->text);
  std::vector<int> sources{static_cast<int>(number) - 1};
  if (from) {
    if (from->kind != Json::Kind::list || from->list.size() > kMostLayers)
      fail("layer '", name, "': from must be a list");
    sources.clear();
    for (const Json& source : from->list) {
      int found = source.text == "input" ? -1 : -2;
      for (size_t n = 0; n < layers_.size(); ++n) {
        if (layers_[n].layer->name == source.text) found = static_cast<int>(n);
      }
      if (found == -2) fail("layer '", name, "': from names ", source.dump(), ", which is no earlier layer");
      sources.push_back(found);
    }
  }
  const Description description(json, file, name);
  std::vector<Shape> shapes;
  for (const int source : sources) {
    if (source == -1) {
      const Shape needed = type.make == make_embedding ? Shape{true, 1}
                           : *type.width               ? Shape{false, description.size(type.width, 1, kMostSize)}
                                                       : Shape{};
      if (input_.C == 0) input_ = needed;
      if (input_.C == 0) fail("layer '", name, "' cannot be the first to read the input: its width is not known");
    }
    shapes.push_back(source == -1 ? input_ : layers_[static_cast<size_t>(source)].shape);
  }
  Entry entry;
  entry.layer = type.make(description, shapes);
  entry.layer->name = name;
  entry.layer->from = sources;
  entry.layer->state_offset = state_size_;
  entry.shape = entry.layer->shape();
  state_size_ += entry.layer->state_size();
  if (const char* const why = entry.layer->looks_ahead(); why && looks_ahead_.empty()) {
    looks_ahead_ = "layer '" + name + "': " + why;
  }
  layers_.push_back(std::move(entry));
}

void Model::describe(const File& file, const Json& json) {
  const auto shape = [](const Shape& s) {
    return s.index ? std::string("{\"index\": true, \"size\": ") + std::to_string(s.C) + "}"
                   : std::string("{\"index\": false, \"size\": ") + std::to_string(s.C) + "}";
  };
  std::string tensors;
  int64_t bytes = 0;
  for (const auto& [name, t] : file.tensors()) {
    Json key;
    key.kind = Json::Kind::text;
    key.text = name;
    std::string sizes;
    for (const int64_t n : t.shape) sizes += (sizes.empty() ? "" : ", ") + std::to_string(n);
    tensors += std::string(tensors.empty() ? "" : ", ") + key.dump() + ": {\"dtype\": \"" + name_of(t.dtype) +
               "\", \"shape\": [" + sizes + "]}";
    bytes += t.count() * size_of(t.dtype);
  }
  description_ = "{\"model\": " + json.dump() + ", \"tensors\": {" + tensors +
                 "}, \"bytes\": " + std::to_string(bytes) + ", \"input\": " + shape(input_) +
                 ", \"output\": " + shape(output()) + ", \"state_size\": " + std::to_string(state_size_) + "}";
}

void Model::begin(float* state) const {
  for (const auto& entry : layers_) entry.layer->begin(state + entry.layer->state_offset);
}

void Model::run(const Input& input, int threads, Workspace& workspace, Output& output) const {
  if (input.carried && !looks_ahead_.empty()) fail("this model cannot run piece by piece: ", looks_ahead_);
  for (int64_t b = 0; input.lengths && b < input.B; ++b) {
    if (input.lengths[b] < 0 || input.lengths[b] > input.T) {
      fail("lengths must lie in 0 .. T = ", input.T, ", got lengths[", b, "] = ", input.lengths[b]);
    }
  }
  workspace.slots.resize(layers_.size());
  const Data given{input.T, input.B, input_, input.floats, input.integers, input.lengths};
  const Run run{team(threads), workspace.scratch, input.state, input.carried};
  std::vector<const Data*> inputs;
  for (size_t n = 0; n < layers_.size(); ++n) {
    const Layer& layer = *layers_[n].layer;
    inputs.clear();
    for (const int source : layer.from) {
      inputs.push_back(source == -1 ? &given : &workspace.slots[static_cast<size_t>(source)].data);
    }
    Inside inside(workspace.slots[n], layers_[n].shape);
    const int64_t* const lengths = inputs[0]->lengths;
    if (n + 1 < layers_.size()) {
      workspace.slots[n].data.lengths = lengths;
      layer.run(run, inputs, inside);
    } else {
      Last last(output, lengths);
      layer.run(run, inputs, last);
      last.clear();
    }
  }
}

}  // namespace fastseq::deploy
