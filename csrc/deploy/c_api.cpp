#include <memory>
#include <new>
#include <string>

#include "core/isa.h"
#include "fastseq.h"
#include "deploy/stream.h"

using fastseq::deploy::fail;
using fastseq::deploy::Input;
using fastseq::deploy::Model;
using fastseq::deploy::Stream;
using fastseq::deploy::Workspace;

struct fastseq_model {
  std::shared_ptr<const Model> model;
};
struct fastseq_stream {
  Stream stream;
};

namespace {

thread_local std::string last_error;

// What `call` returns, or `otherwise` with the reason kept. Nothing is thrown across the border to C.
template <class R, class Call>
R guarded(R otherwise, Call call) noexcept {
  try {
    return call();
  } catch (const std::bad_alloc&) {
    last_error = "out of memory";
  } catch (const std::exception& error) {
    last_error = error.what();
  } catch (...) {
    last_error = "an unknown error";
  }
  return otherwise;
}

void check(bool good, const char* what) {
  if (!good) fail(what);
  if (const char* const error = fastseq::core::choice().error) fail(error);
}

// Results in memory of the caller's.
class Given : public fastseq::deploy::Output {
 public:
  Given(void* y, int64_t capacity) : y_(y), capacity_(capacity) {}
  float* floats(int64_t T, int64_t B, int64_t C) override { return static_cast<float*>(room(T, B, C)); }
  int32_t* integers(int64_t T, int64_t B, int64_t C) override { return static_cast<int32_t*>(room(T, B, C)); }
  int64_t* lengths(int64_t B) override {
    lengths_.resize(static_cast<size_t>(B));
    return lengths_.data();
  }
  int64_t steps = 0;

 private:
  void* room(int64_t T, int64_t B, int64_t C) {
    if (T * B * C > capacity_) fail("y holds ", capacity_, " numbers, the results take ", T * B * C);
    if (T * B * C > 0 && !y_) fail("y is NULL");
    steps = T;
    return y_;
  }
  void* y_;
  int64_t capacity_;
  std::vector<int64_t> lengths_;
};

void check_sizes(int64_t T, int64_t B, const void* x, int threads) {
  constexpr int64_t kMost = int64_t(1) << 31;
  if (T < 0 || B < 0 || T > kMost || B > kMost) fail("T and B must be 0 .. 2**31, got ", T, " and ", B);
  if (T * B > 0 && !x) fail("x is NULL");
  if (threads < 1) fail("threads must be at least 1, got ", threads);
}

}  // namespace

const char* fastseq_error(void) { return last_error.c_str(); }
const char* fastseq_isa(void) { return fastseq::core::kernels().name; }

fastseq_model* fastseq_model_load(const char* path) {
  return guarded<fastseq_model*>(nullptr, [&] {
    check(path, "path is NULL");
    return new fastseq_model{Model::load(path)};
  });
}

fastseq_model* fastseq_model_parse(const void* bytes, size_t size) {
  return guarded<fastseq_model*>(nullptr, [&] {
    check(bytes, "bytes is NULL");
    return new fastseq_model{Model::parse(static_cast<const uint8_t*>(bytes), size)};
  });
}

void fastseq_model_free(fastseq_model* model) { delete model; }
int64_t fastseq_model_input_size(const fastseq_model* model) { return model->model->input().C; }
int64_t fastseq_model_output_size(const fastseq_model* model) { return model->model->output().C; }
int fastseq_model_input_is_index(const fastseq_model* model) { return model->model->input().index; }
int fastseq_model_output_is_index(const fastseq_model* model) { return model->model->output().index; }
int64_t fastseq_model_state_size(const fastseq_model* model) { return model->model->state_size(); }
const char* fastseq_model_description(const fastseq_model* model) { return model->model->description().c_str(); }

int64_t fastseq_model_run(const fastseq_model* model, int64_t T, int64_t B, const void* x, const int64_t* lengths,
                          int threads, void* y, int64_t capacity) {
  return guarded<int64_t>(-1, [&] {
    check(model, "model is NULL");
    check_sizes(T, B, x, threads);
    const Model& m = *model->model;
    const bool index = m.input().index;
    std::vector<float> state(static_cast<size_t>(m.state_size() * B));
    std::vector<float*> rows;
    for (int64_t b = 0; b < B; ++b) {
      rows.push_back(state.data() + b * m.state_size());
      m.begin(rows.back());
    }
    const Input input{T,
                      B,
                      index ? nullptr : static_cast<const float*>(x),
                      index ? static_cast<const int32_t*>(x) : nullptr,
                      lengths,
                      rows.data(),
                      false};
    Workspace workspace;
    Given given(y, capacity);
    m.run(input, threads, workspace, given);
    return given.steps;
  });
}

fastseq_stream* fastseq_stream_new(const fastseq_model* model) {
  return guarded<fastseq_stream*>(nullptr, [&] {
    check(model, "model is NULL");
    return new fastseq_stream{Stream(model->model)};
  });
}

void fastseq_stream_free(fastseq_stream* stream) { delete stream; }

int fastseq_stream_reset(fastseq_stream* stream) {
  return guarded(-1, [&] {
    check(stream, "stream is NULL");
    stream->stream.reset();
    return 0;
  });
}

int64_t fastseq_stream_step(fastseq_stream* stream, int64_t T, const void* x, void* y, int64_t capacity) {
  return fastseq_streams_step(&stream, 1, T, x, 1, y, capacity);
}

int64_t fastseq_streams_step(fastseq_stream* const* streams, int64_t n, int64_t T, const void* x, int threads, void* y,
                             int64_t capacity) {
  return guarded<int64_t>(-1, [&] {
    check(streams, "streams is NULL");
    check_sizes(T, n, x, threads);
    std::vector<Stream*> all;
    for (int64_t b = 0; b < n; ++b) {
      check(streams[b], "stream is NULL");
      all.push_back(&streams[b]->stream);
    }
    Given given(y, capacity);
    Stream::step(all.data(), n, T, x, threads, given);
    return given.steps;
  });
}

int fastseq_stream_save(fastseq_stream* stream, float* state) {
  return guarded(-1, [&] {
    check(stream && state, "stream or state is NULL");
    stream->stream.save(state);
    return 0;
  });
}

int fastseq_stream_load(fastseq_stream* stream, const float* state) {
  return guarded(-1, [&] {
    check(stream && state, "stream or state is NULL");
    stream->stream.load(state);
    return 0;
  });
}
