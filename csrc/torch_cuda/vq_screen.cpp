#include "cuda/vq_screen.h"

#include "torch_cuda/vq_number.h"

namespace fastseq::torch_door {
namespace {

cuda::Number piece_of(const char* op, const Tensor& pieces, int64_t products) {
  const cuda::Number found = number_of(op, "pieces", pieces);
  if (found == cuda::Number::bf16 || (found == cuda::Number::f16 && products == 1)) return found;
  door::fail(op, "pieces must be bfloat16, or float16 with one product, got ", door::name_of(type_of(pieces)));
}

// What is read together begins at a multiple of its size.
void check_aligned(const char* op, const char* name, const void* data, uintptr_t bytes) {
  if (reinterpret_cast<uintptr_t>(data) % bytes) {
    door::fail(op, name, " must begin at a multiple of ", bytes, " bytes");
  }
}

void vq_screen(Tensor x, Tensor codebook, Tensor starts, Tensor pieces, Tensor h, Tensor most, Optional centre,
               Optional mask, int64_t products, bool dot, double slack, Tensor index, Optional score, Tensor open,
               Tensor count) {
  const char* const op = "vq_screen";
  using door::Type;
  Given given(op);
  cuda::VqScreen call{};
  const door::Array rows = array_of(op, "x", x), codes = array_of(op, "codebook", codebook);
  const door::Array split = array_of(op, "pieces", pieces);
  call.row = number_of(op, "x", x), call.code = number_of(op, "codebook", codebook);
  door::expect_dims(op, "x", rows, "[G, N, D]", 3);
  door::expect_dims(op, "codebook", codes, "[G, K, D]", 3);
  door::expect_dims(op, "pieces", split, "[G, P, padded, width]", 4);
  if (products < 1 || products > 3) door::fail(op, "products must be 1, 2 or 3, got ", products);
  const int64_t G = call.G = rows.size[0], N = call.N = rows.size[1], D = call.D = rows.size[2];
  const int64_t K = call.K = codes.size[1], padded = call.padded = split.size[2], width = call.width = split.size[3];
  if (G < 1 || N < 1 || D < 1 || K < 1) {
    door::fail(op, "G, N, D and K must be at least 1, got ", G, ", ", N, ", ", D, " and ", K);
  }
  if (D > cuda::kScreenMostD) door::fail(op, "D must be at most ", cuda::kScreenMostD, ", got ", D);
  if (padded % cuda::kScreenCodes || padded < K || width != cuda::screen_width(D)) {
    door::fail(op, "pieces must have K rounded up to a multiple of ", cuda::kScreenCodes,
               " codes and D to 64, 128 or 256 columns, got ", padded, " and ", width);
  }
  call.products = static_cast<int>(products), call.piece = piece_of(op, pieces, products);
  if (call.row != call.piece && products < 3) {
    door::fail(op, "x must be ", door::name_of(split.type), " like pieces, got ", door::name_of(rows.type));
  }
  if (call.code != call.piece && products == 1) {
    door::fail(op, "codebook must be ", door::name_of(split.type), " like pieces, got ", door::name_of(codes.type));
  }
  if (call.row == cuda::Number::bf16 && products == 3) door::fail(op, "x must be float32 or float16, got bfloat16");
  const auto in = [&](const char* name, const Optional& tensor, Type type, const char* meaning,
                      std::initializer_list<int64_t> size) {
    return tensor ? const_cast<void*>(given.in(name, *tensor, type, meaning, size)) : nullptr;
  };
  const auto floats = [&](const char* name, const Optional& tensor, const char* meaning,
                          std::initializer_list<int64_t> size) {
    return static_cast<float*>(in(name, tensor, Type::f32, meaning, size));
  };
  if (products < 3 && D % 2) door::fail(op, "D must be even with one piece of the rows, got ", D);
  call.x = given.in("x", x, rows.type, "[G, N, D]", {G, N, D});
  call.codes = given.in("codebook", codebook, codes.type, "[G, K, D]", {G, K, D});
  call.starts = floats("starts", starts, "[G, K]", {G, K});
  const int64_t P = products == 1 ? 1 : 2;
  call.pieces = given.in("pieces", pieces, split.type, "[G, P, padded, width]", {G, P, padded, width});
  call.h = floats("h", h, "[G, padded]", {G, padded});
  call.most = floats("most", most, "[G, 5]", {G, 5});
  if (centre.has_value() != (products == 3)) door::fail(op, "centre must be given with three products, and only then");
  call.centre = floats("centre", centre, "[G, D]", {G, D});
  check_aligned(op, "pieces", call.pieces, 16), check_aligned(op, "h", call.h, 16);
  if (products < 3) check_aligned(op, "x", call.x, 4);
  call.mask = static_cast<const bool*>(in("mask", mask, Type::boolean, "[G, N]", {G, N}));
  call.dot = dot, call.slack = static_cast<float>(slack);
  call.bits = bits_of(op, index);
  call.index = in("index", index, type_of(index), "[G, N]", {G, N});
  call.score = floats("score", score, "[G, N]", {G, N});
  call.open = static_cast<int32_t*>(in("open", open, Type::i32, "[G, N]", {G, N}));
  call.count = static_cast<int32_t*>(in("count", count, Type::i32, "[G]", {G}));
  const OnDevice here(op, given.device());
  const char* const error = cuda::vq_screen(call, here.stream());
  if (error != nullptr) door::fail(op, error);
}

// Whether the device has room for a block of threads of such a call.
bool vq_screen_fits(int64_t device, int64_t products, int64_t D) {
  cuda::VqScreen call{};
  call.G = call.N = call.K = 1, call.D = D + D % 2, call.width = cuda::screen_width(D);
  call.products = static_cast<int>(products), call.piece = cuda::Number::bf16;
  const torch::stable::accelerator::DeviceGuard here(static_cast<int32_t>(device));
  return cuda::vq_screen_fits(call);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseq, CUDA, m) { m.impl("vq_screen", TORCH_BOX(&vq_screen)); }

STABLE_TORCH_LIBRARY_IMPL(fastseq, CompositeExplicitAutograd, m) {
  m.impl("vq_screen_fits", TORCH_BOX(&vq_screen_fits));
}

}  // namespace fastseq::torch_door
