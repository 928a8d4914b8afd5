#include "deploy/stream.h"

#include <cstring>
#include <optional>

#include "python/array.h"

namespace fastseq::python_door {
namespace {

using deploy::fail;
using deploy::Model;
using deploy::Stream;
using Shared = std::shared_ptr<const Model>;

// Results as a numpy array. Small ones lie in kept memory until Python may be asked for an array; large ones are
// written into the array itself.
class Results : public deploy::Output {
 public:
  float* floats(int64_t T, int64_t B, int64_t C) override { return static_cast<float*>(room(T, B, C, 4, false)); }
  int32_t* integers(int64_t T, int64_t B, int64_t C) override { return static_cast<int32_t*>(room(T, B, C, 4, true)); }
  int64_t* lengths(int64_t B) override {
    lengths_.resize(static_cast<size_t>(B));
    return lengths_.data();
  }
  // [T, B, C] without the dimensions that were not asked for.
  py::array take(bool batch, bool time, bool channels) {
    std::vector<py::ssize_t> shape;
    if (time) shape.push_back(T_);
    if (batch) shape.push_back(B_);
    if (channels) shape.push_back(C_);
    if (array_) return array_->reshape(shape);
    py::array out = index_ ? py::array(py::array_t<int32_t>(shape)) : py::array(py::array_t<float>(shape));
    if (out.nbytes()) std::memcpy(out.mutable_data(), small_.get<char>(0), static_cast<size_t>(out.nbytes()));
    return out;
  }
  int64_t steps() const { return T_; }

 private:
  void* room(int64_t T, int64_t B, int64_t C, int64_t size, bool index) {
    constexpr int64_t kSmall = 128 * 1024;
    T_ = T, B_ = B, C_ = C, index_ = index;
    array_.reset();
    if (T * B * C * size <= kSmall) return small_.get<char>(T * B * C * size);
    const py::gil_scoped_acquire acquire;
    array_ = index ? py::array(py::array_t<int32_t>({T, B, C})) : py::array(py::array_t<float>({T, B, C}));
    return array_->mutable_data();
  }
  int64_t T_ = 0, B_ = 0, C_ = 0;
  bool index_ = false;
  std::optional<py::array> array_;
  static thread_local deploy::Buffer small_;
  std::vector<int64_t> lengths_;
};
thread_local deploy::Buffer Results::small_;

// x as the model takes it: [T, B, C] floats or [T, B] int32, or without B.
struct Steps {
  int64_t T, B;
  const void* data;
  bool channels;   // false: a single step without T
  py::array kept;  // where x had to be copied: strided, or of int64
};

py::array narrowed(const py::array& x) {
  const py::array_t<int64_t, py::array::c_style> wide(x);
  py::array_t<int32_t> out(std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()));
  for (py::ssize_t n = 0; n < x.size(); ++n) {
    const int64_t value = wide.data()[n];
    if (value != static_cast<int32_t>(value)) fail("x must lie within 32 bits, got ", value);
    out.mutable_data()[n] = static_cast<int32_t>(value);
  }
  return out;
}

Steps steps_of(const Model& model, const py::array& given, bool batch) {
  const bool index = model.input().index;
  const char* const meaning = batch ? index ? "[T, B]" : "[T, B, C]" : index ? "[T]" : "[T, C]";
  const int dims = (batch ? 2 : 1) + (index ? 0 : 1);
  const bool single = given.ndim() == dims - 1;
  if (given.ndim() != dims && !single) fail("x must be ", meaning, ", got ", given.ndim(), " dimensions");
  const bool wide = index && py::isinstance<py::array_t<int64_t>>(given);
  const bool typed = index ? py::isinstance<py::array_t<int32_t>>(given) : py::isinstance<py::array_t<float>>(given);
  if (!typed && !wide) {
    fail("x must be ", index ? "int32 or int64" : "float32", ", got ", std::string(py::str(given.dtype())));
  }
  if (!index && given.shape(given.ndim() - 1) != model.input().C) {
    fail("x must be ", meaning, " with C = ", model.input().C, ", got C = ", given.shape(given.ndim() - 1));
  }
  const bool plain = given.flags() & py::array::c_style;
  const py::array x = wide ? narrowed(given) : plain ? given : py::array::ensure(given, py::array::c_style);
  const int first = single ? 0 : 1;
  return {single ? 1 : x.shape(0), batch ? x.shape(first) : 1, x.data(), !single, x};
}

void check_threads(int threads) {
  if (threads < 1) fail("threads must be at least 1, got ", threads);
  if (const char* const error = core::choice().error) fail(error);
}

bool labels(const Model& model) { return model.output().index && model.output().C == 1; }

py::array step(Stream& stream, const py::array& x, int threads) {
  check_threads(threads);
  const Steps s = steps_of(*stream.model(), x, false);
  Results results;
  {
    const py::gil_scoped_release release;
    stream.step(s.T, s.data, threads, results);
  }
  return results.take(false, s.channels || results.steps() != 1, !labels(*stream.model()));
}

py::array step_batch(const Shared& model, const std::vector<Stream*>& streams, const py::array& x, int threads) {
  check_threads(threads);
  for (const Stream* stream : streams) {
    if (!stream || stream->model() != model) fail("streams must be of this model");
  }
  const Steps s = steps_of(*model, x, true);
  if (s.B != static_cast<int64_t>(streams.size()))
    fail("x must have a row for each of ", streams.size(), " streams, got ", s.B);
  Results results;
  {
    const py::gil_scoped_release release;
    Stream::step(streams.data(), s.B, s.T, s.data, threads, results);
  }
  return results.take(true, s.channels || results.steps() != 1, !labels(*model));
}

// Workspaces of runs, kept by their threads.
deploy::Workspace& workspace() {
  static thread_local deploy::Workspace kept;
  return kept;
}

py::tuple run(const Shared& model, const py::array& x, const std::optional<py::array>& lengths,
              const std::optional<py::array>& state, int threads) {
  check_threads(threads);
  const Steps s = steps_of(*model, x, true);
  if (!s.channels) fail("x must be ", model->input().index ? "[T, B]" : "[T, B, C]", ", got a single step");
  const int64_t S = model->state_size();
  const int64_t* length = nullptr;
  if (lengths) {
    if (!py::isinstance<py::array_t<int64_t>>(*lengths) || lengths->ndim() != 1 || lengths->shape(0) != s.B) {
      fail("lengths must be int64 [B] = [", s.B, "]");
    }
    length = static_cast<const int64_t*>(py::array_t<int64_t, py::array::c_style>(*lengths).data());
  }
  py::array_t<float> out({s.B, S});
  std::vector<float*> rows;
  for (int64_t b = 0; b < s.B; ++b) rows.push_back(out.mutable_data() + b * S);
  if (state) {
    const bool fits = py::isinstance<py::array_t<float>>(*state) && state->ndim() == 2 && state->shape(0) == s.B &&
                      state->shape(1) == S && (state->flags() & py::array::c_style);
    if (!fits) fail("state must be contiguous float32 [B, ", S, "] = [", s.B, ", ", S, "], as run returned it");
    std::memcpy(out.mutable_data(), state->data(), static_cast<size_t>(out.nbytes()));
  } else {
    for (float* row : rows) model->begin(row);
  }
  const bool index = model->input().index, whole = !model->looks_ahead().empty();
  Results results;
  {
    const py::gil_scoped_release release;
    const deploy::Input input{s.T,
                              s.B,
                              index ? nullptr : static_cast<const float*>(s.data),
                              index ? static_cast<const int32_t*>(s.data) : nullptr,
                              length,
                              rows.data(),
                              state.has_value()};
    model->run(input, threads, workspace(), results);
  }
  return py::make_tuple(results.take(true, true, !labels(*model)), whole ? py::object(py::none()) : py::object(out));
}

py::array_t<float> save(Stream& stream) {
  py::array_t<float> out(stream.model()->state_size());
  stream.save(out.mutable_data());
  return out;
}

void load(Stream& stream, const py::array& state) {
  const int64_t S = stream.model()->state_size();
  if (!py::isinstance<py::array_t<float>>(state) || state.ndim() != 1 || state.shape(0) != S ||
      !(state.flags() & py::array::c_style)) {
    fail("state must be contiguous float32 [", S, "], as save returned it");
  }
  stream.load(static_cast<const float*>(state.data()));
}

// What help() says. Types stand in _core.pyi.
constexpr const char* kModel = "A model out of a file: never changes, for any number of threads.";
constexpr const char* kLoad = "A model out of a file; FileError where it cannot be read, ModelError for its content.";
constexpr const char* kParse = "The same, of the bytes of a file.";
constexpr const char* kRun =
    R"(x [T, B, C] float32, or indices [T, B], to y [T, B, C'] and the state [B, state_size] after the last step.

lengths: valid steps of each row; results beyond them are zeros, indices -1. state: of an earlier call. A model
that looks ahead has no state.)";
constexpr const char* kStream = "A new client, at the start.";
constexpr const char* kStepBatch = "x [T, n, C] or [n, C]: the next steps of n streams, each as it would be alone.";
constexpr const char* kDescription = "The JSON text in the file.";
constexpr const char* kLooksAhead = "Why the model cannot run piece by piece, or an empty text.";
constexpr const char* kStateSize = "Numbers in the state of a row.";
constexpr const char* kInputSize = "C of the input; of indices, how many there are.";
constexpr const char* kOutputSize = "C of the output; 1 of labels.";
constexpr const char* kInputIsIndex = "The input is indices.";
constexpr const char* kOutputIsIndex = "The output is indices.";
constexpr const char* kClient =
    "One client of a model: what it was given so far stands in its state. Not for two threads at once.";
constexpr const char* kStep =
    "The next steps, x [T, C] (indices [T]), or one step without T. Strided x and int64 indices are copied.";
constexpr const char* kReset = "Back to the start.";
constexpr const char* kSave = "The state, [state_size].";
constexpr const char* kRestore = "Go on from a state as save gave it.";

}  // namespace

void bind_deploy(py::module_& m) {
  using py::arg;
  py::register_exception<deploy::Error>(m, "ModelError", PyExc_ValueError).doc() =
      "A model's file, or what a model is given, is not as it must be.";
  py::register_exception<deploy::FileError>(m, "FileError", PyExc_OSError).doc() =  // after what it is derived from
      "A model's file cannot be read.";
  py::class_<Stream>(m, "Stream", kClient)
      .def("step", &step, kStep, arg("x").noconvert(), py::kw_only(), arg("threads") = 1)
      .def("reset", &Stream::reset, kReset)
      .def("save", &save, kSave)
      .def("load", &load, kRestore, arg("state").noconvert());
  py::class_<Model, std::shared_ptr<Model>>(m, "Model", kModel)
      .def_static(
          "load", [](const std::string& path) { return std::const_pointer_cast<Model>(Model::load(path)); }, kLoad,
          arg("path"))
      .def_static(
          "parse",
          [](const py::bytes& bytes) {
            const std::string_view view = bytes;
            const auto* const data = reinterpret_cast<const uint8_t*>(view.data());
            return std::const_pointer_cast<Model>(Model::parse(data, view.size()));
          },
          kParse, arg("bytes"))
      .def(
          "run",
          [](const std::shared_ptr<Model>& model, const py::array& x, const std::optional<py::array>& lengths,
             const std::optional<py::array>& state, int threads) { return run(model, x, lengths, state, threads); },
          kRun, arg("x").noconvert(), arg("lengths") = py::none(), arg("state") = py::none(), py::kw_only(),
          arg("threads") = 1)
      .def(
          "stream", [](const std::shared_ptr<Model>& model) { return std::make_unique<Stream>(model); }, kStream)
      .def(
          "step_batch",
          [](const std::shared_ptr<Model>& model, const std::vector<Stream*>& streams, const py::array& x,
             int threads) { return step_batch(model, streams, x, threads); },
          kStepBatch, arg("streams"), arg("x").noconvert(), py::kw_only(), arg("threads") = 1)
      .def_property_readonly("description", &Model::description, kDescription)
      .def_property_readonly("looks_ahead", &Model::looks_ahead, kLooksAhead)
      .def_property_readonly("state_size", &Model::state_size, kStateSize)
      .def_property_readonly(
          "input_size", [](const Model& m) { return m.input().C; }, kInputSize)
      .def_property_readonly(
          "output_size", [](const Model& m) { return m.output().C; }, kOutputSize)
      .def_property_readonly(
          "input_is_index", [](const Model& m) { return m.input().index; }, kInputIsIndex)
      .def_property_readonly("output_is_index", [](const Model& m) { return m.output().index; }, kOutputIsIndex);
}

}  // namespace fastseq::python_door
