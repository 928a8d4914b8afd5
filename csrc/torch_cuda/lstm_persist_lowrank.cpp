#include "cuda/lstm_persist_lowrank.h"

#include <tuple>

#include "torch_cuda/persist_call.h"

namespace fastseq::torch_door {
namespace {

void check_tile(const char* op, int64_t tile) {
  const int tiles = cuda::persist_lowrank_tiles();
  if (tile < 0 || tile >= tiles) door::fail(op, "tile must lie in 0 .. ", tiles - 1, ", got ", tile);
}

// The sizes of a call, whose factors are the tile's.
cuda::PersistLowRankShape shape_of(const char* op, const Call& call, const Tensor& up, const Tensor& down,
                                   int64_t tile) {
  const door::Array wide = array_of(op, "up", up), narrow = array_of(op, "down", down);
  door::expect_dims(op, "up", wide, "[4, H, r]", 3);
  door::expect_dims(op, "down", narrow, "[4, r, H] or [1, r, H]", 3);
  check_tile(op, tile);
  const cuda::PersistLowRankTile of = cuda::persist_lowrank_tile(static_cast<int>(tile));
  const cuda::PersistLowRankShape shape{call.shape, wide.size[2], narrow.size[0]};
  if (shape.rank < 1 || shape.rank > of.rank) {
    door::fail(op, "r must lie in 1 .. ", of.rank, " with tile ", tile, ", got ", shape.rank);
  }
  if (shape.downs != of.downs) {
    door::fail(op, "down must be [", of.downs, ", r, H] with tile ", tile, ", got ", door::shape(narrow.size, 3));
  }
  return shape;
}

template <class Direction>
void take_factors(Call& call, const cuda::PersistLowRankShape& shape, const Tensor& up, const Tensor& down,
                  Direction& d) {
  d.up = call.take("up", up, 0, call.low(), "[4, H, r]", {4, shape.H, shape.rank});
  d.down = call.take("down", down, 0, call.low(), shape.downs == 4 ? "[4, r, H]" : "[1, r, H]",
                     {shape.downs, shape.rank, shape.H});
}

// Starts the kernel on the stream of the tensors' device, with scratch.
template <class Start>
void start(const char* op, const Call& call, const cuda::PersistLowRankShape& shape, const Tensor& like, int tile,
           Start start) {
  const OnDevice here(op, call.device());
  const Tensor room = scratch(like, cuda::persist_lowrank_scratch(shape, tile));
  const char* const error = start(room.mutable_data_ptr(), here.stream());
  if (error != nullptr) door::fail(op, error);
}

void lstm_persist_lowrank_forward(Tensor x_gates, Tensor up, Tensor down, Tensor h0, Tensor c0, Optional lengths,
                                  Optional offsets, double tau, bool hard, bool reverse, int64_t tile, Tensor h,
                                  Optional c, Optional gates, Tensor h_n, Tensor c_n) {
  const char* const op = "lstm_persist_lowrank_forward";
  Call call(op, "x_gates", {x_gates}, {c0}, lengths, offsets, tau, hard);
  const cuda::PersistLowRankShape shape = shape_of(op, call, up, down, tile);
  cuda::PersistLowRankForward d{};
  d.x_gates = call.elements("x_gates", x_gates, 0, true, call.low());
  take_factors(call, shape, up, down, d);
  d.h0 = call.state("h0", h0, 0);
  d.c0 = call.cell("c0", c0, 0);
  d.h = writable<void>(call.elements("h", h, 0, false, call.low()));
  d.c = c ? writable<float>(call.elements("c", *c, 0, false, door::Type::f32)) : nullptr;
  d.gates = gates ? writable<void>(call.elements("gates", *gates, 0, true, call.low())) : nullptr;
  d.h_n = writable<void>(call.state("h_n", h_n, 0));
  d.c_n = writable<float>(call.cell("c_n", c_n, 0));
  d.reverse = reverse;
  const int at = static_cast<int>(tile);
  start(op, call, shape, x_gates, at,
        [&](void* room, void* stream) { return cuda::persist_lowrank_forward(shape, d, at, room, stream); });
}

void lstm_persist_lowrank_backward(Optional dh, Optional dh_n, Optional dc_n, Tensor gates, Tensor c, Tensor up,
                                   Tensor down, Tensor c0, Optional lengths, Optional offsets, double tau, bool hard,
                                   bool reverse, int64_t tile, Tensor dx_gates, Tensor dh0, Tensor dc0) {
  const char* const op = "lstm_persist_lowrank_backward";
  Call call(op, "gates", {gates}, {c0}, lengths, offsets, tau, hard);
  const cuda::PersistLowRankShape shape = shape_of(op, call, up, down, tile);
  cuda::PersistLowRankBackward d{};
  d.dh = dh ? call.elements("dh", *dh, 0, false, call.low()) : nullptr;
  d.dh_n = dh_n ? call.state("dh_n", *dh_n, 0) : nullptr;
  d.dc_n = dc_n ? call.cell("dc_n", *dc_n, 0) : nullptr;
  d.gates = call.elements("gates", gates, 0, true, call.low());
  d.c = static_cast<const float*>(call.elements("c", c, 0, false, door::Type::f32));
  take_factors(call, shape, up, down, d);
  d.c0 = call.cell("c0", c0, 0);
  d.dx_gates = writable<void>(call.elements("dx_gates", dx_gates, 0, true, call.low()));
  d.dh0 = writable<void>(call.state("dh0", dh0, 0));
  d.dc0 = writable<float>(call.cell("dc0", dc0, 0));
  d.reverse = reverse;
  const int at = static_cast<int>(tile);
  start(op, call, shape, gates, at,
        [&](void* room, void* stream) { return cuda::persist_lowrank_backward(shape, d, at, room, stream); });
}

std::vector<int64_t> lstm_persist_lowrank_tiles() {
  std::vector<int64_t> found;
  for (int n = 0; n < cuda::persist_lowrank_tiles(); ++n) {
    const cuda::PersistLowRankTile tile = cuda::persist_lowrank_tile(n);
    found.insert(found.end(), {tile.units, tile.rows, tile.rank, tile.downs, tile.threads});
  }
  return found;
}

// Blocks of threads that a call needs at a time, and how many the device can hold.
std::tuple<int64_t, int64_t> lstm_persist_lowrank_room(int64_t device, int64_t B, int64_t H, bool bfloat16,
                                                       int64_t tile, bool backward) {
  check_tile("lstm_persist_lowrank_room", tile);
  const int at = static_cast<int>(tile);
  const cuda::PersistLowRankShape shape{{1, B, H, nullptr, nullptr, 1.0f, false, bfloat16, false}, 1, 1};
  const torch::stable::accelerator::DeviceGuard here(static_cast<int32_t>(device));
  return {cuda::persist_lowrank_blocks(shape, at),
          backward ? cuda::persist_lowrank_backward_room(shape, at) : cuda::persist_lowrank_forward_room(shape, at)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseq, CUDA, m) {
  m.impl("lstm_persist_lowrank_forward", TORCH_BOX(&lstm_persist_lowrank_forward));
  m.impl("lstm_persist_lowrank_backward", TORCH_BOX(&lstm_persist_lowrank_backward));
}

STABLE_TORCH_LIBRARY_IMPL(fastseq, CompositeExplicitAutograd, m) {
  m.impl("lstm_persist_lowrank_tiles", TORCH_BOX(&lstm_persist_lowrank_tiles));
  m.impl("lstm_persist_lowrank_room", TORCH_BOX(&lstm_persist_lowrank_room));
}

}  // namespace fastseq::torch_door
