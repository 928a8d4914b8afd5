#include "cuda/vq_lookup.h"

#include "torch_cuda/vq_number.h"

namespace fastseq::torch_door {
namespace {

void check_sizes(const char* op, int64_t G, int64_t N, int64_t D, int64_t levels) {
  if (G < 1 || N < 1 || D < 1) door::fail(op, "G, N and D must be at least 1, got ", G, ", ", N, " and ", D);
  if (D > cuda::kVqMostD) door::fail(op, "D must be at most ", cuda::kVqMostD, ", got ", D);
  if (levels < 1 || levels > cuda::kVqMostLevels) {
    door::fail(op, "codebooks must list 1 to ", cuda::kVqMostLevels, " levels, got ", levels);
  }
}

void check_codes(const char* op, int64_t K) {
  if (K < 1 || K > INT32_MAX) door::fail(op, "a codebook must have 1 to 2**31 - 1 codes, got ", K);
}

void vq_lookup(Tensor x, std::vector<Tensor> codebooks, Optional mask, Optional levels, bool dot, int64_t parts,
               Tensor index, Optional distance, Optional score, Optional quantized) {
  const char* const op = "vq_lookup";
  using door::Type;
  Given given(op);
  cuda::VqLookup call{};
  const door::Array rows = array_of(op, "x", x);
  call.row = number_of(op, "x", x);
  door::expect_dims(op, "x", rows, "[G, N, D]", 3);
  const int64_t G = call.G = rows.size[0], N = call.N = rows.size[1], D = call.D = rows.size[2];
  const int64_t M = static_cast<int64_t>(codebooks.size());
  check_sizes(op, G, N, D, M);
  call.levels = static_cast<int>(M);
  call.x = given.in("x", x, rows.type, "[G, N, D]", {G, N, D});
  call.code = number_of(op, "codebooks[0]", codebooks[0]);
  for (int m = 0; m < M; ++m) {
    const std::string name = "codebooks[" + std::to_string(m) + "]";
    const door::Array codes = array_of(op, name.c_str(), codebooks[m]);
    door::expect_dims(op, name.c_str(), codes, "[G, K, D]", 3);
    const int64_t K = codes.size[1];
    call.level[m] = {K, given.in(name, codebooks[m], type_of(codebooks[0]), "[G, K, D]", {G, K, D})};
    check_codes(op, K);
  }
  if (parts < 1 || parts > cuda::kVqMostParts) {
    door::fail(op, "parts must lie in 1 .. ", cuda::kVqMostParts, ", got ", parts);
  }
  const auto in = [&](const char* name, const Optional& tensor, Type type, const char* meaning,
                      std::initializer_list<int64_t> size) {
    return tensor ? const_cast<void*>(given.in(name, *tensor, type, meaning, size)) : nullptr;
  };
  call.mask = static_cast<const bool*>(in("mask", mask, Type::boolean, "[G, N]", {G, N}));
  call.depth = static_cast<const int64_t*>(in("levels", levels, Type::i64, "[N]", {N}));
  call.dot = dot;
  call.bits = bits_of(op, index);
  call.index = in("index", index, type_of(index), "[G, N, M]", {G, N, M});
  call.distance = static_cast<float*>(in("distance", distance, Type::f32, "[G, M, N]", {G, M, N}));
  call.score = static_cast<float*>(in("score", score, Type::f32, "[G, M, N]", {G, M, N}));
  call.quantized = in("quantized", quantized, rows.type, "[G, N, D]", {G, N, D});
  const OnDevice here(op, given.device());
  const Tensor room = scratch(x, cuda::vq_lookup_scratch(call, static_cast<int>(parts)));
  const char* const error = cuda::vq_lookup(call, static_cast<int>(parts), room.mutable_data_ptr(), here.stream());
  if (error != nullptr) door::fail(op, error);
}

// Of a call with levels of these sizes: parts of the codes, 0 where the device has no room.
int64_t vq_lookup_parts(int64_t device, int64_t G, int64_t N, int64_t D, std::vector<int64_t> sizes) {
  const char* const op = "vq_lookup_parts";
  check_sizes(op, G, N, D, static_cast<int64_t>(sizes.size()));
  cuda::VqLookup call{};
  call.G = G, call.N = N, call.D = D, call.levels = static_cast<int>(sizes.size());
  for (size_t m = 0; m < sizes.size(); ++m) check_codes(op, call.level[m].K = sizes[m]);
  const torch::stable::accelerator::DeviceGuard here(static_cast<int32_t>(device));
  return cuda::vq_lookup_parts(call);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseq, CUDA, m) { m.impl("vq_lookup", TORCH_BOX(&vq_lookup)); }

STABLE_TORCH_LIBRARY_IMPL(fastseq, CompositeExplicitAutograd, m) {
  m.impl("vq_lookup_parts", TORCH_BOX(&vq_lookup_parts));
}

}  // namespace fastseq::torch_door
