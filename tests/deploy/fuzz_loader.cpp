// A target for libFuzzer: bytes as a model, which must load and run or say why not.
//
//   clang++ -std=c++20 -O1 -g -fsanitize=fuzzer,address,undefined -Icsrc -Ifastseq/deploy/include
//     tests/deploy/fuzz_loader.cpp csrc/deploy/*.cpp csrc/core/*.cpp -pthread -o fuzz && ./fuzz CORPUS
//
// without the csrc/core/isa_*.cpp that need flags; they are chosen by FASTSEQ_HAVE_..., scalar always runs.
#include <cstddef>
#include <cstdint>
#include <vector>

#include "fastseq.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fastseq_model* const model = fastseq_model_parse(data, size);
  if (!model) {
    if (!*fastseq_error()) __builtin_trap();
    return 0;
  }
  const int64_t C = fastseq_model_input_size(model), out = fastseq_model_output_size(model), T = 3, B = 2;
  if (C <= 256 && out <= 256) {
    const std::vector<float> x(static_cast<size_t>(T * B * C), 0.5f);
    const std::vector<int32_t> index(static_cast<size_t>(T * B * C), 0);
    const void* const from = fastseq_model_input_is_index(model) ? static_cast<const void*>(index.data()) : x.data();
    std::vector<float> y(static_cast<size_t>(2 * T * B * out));
    const int64_t lengths[] = {3, 1};
    fastseq_model_run(model, T, B, from, lengths, 1, y.data(), static_cast<int64_t>(y.size()));
    if (fastseq_stream* const stream = fastseq_stream_new(model)) {
      fastseq_stream_step(stream, 1, from, y.data(), static_cast<int64_t>(y.size()));
      fastseq_stream_free(stream);
    }
  }
  fastseq_model_free(model);
  return 0;
}
