#include "cuda/lstm_persist.h"

#include <tuple>

#include "torch_cuda/persist_call.h"

namespace fastseq::torch_door {
namespace {

// The tile of a call, if it is deep enough.
int tile_of(const char* op, const Call& call, int64_t tile) {
  const int tiles = cuda::persist_tiles();
  if (tile < 0 || tile >= tiles) door::fail(op, "tile must lie in 0 .. ", tiles - 1, ", got ", tile);
  const cuda::PersistTile of = cuda::persist_tile(static_cast<int>(tile));
  const int64_t depth = call.shape.int8 ? of.int8_depth : of.depth, H = call.shape.H;
  if (H > depth) {
    door::fail(op, "H must be at most ", depth, " with tile ", tile, call.shape.int8 ? " and int8 weights" : "",
               ", got ", H);
  }
  return static_cast<int>(tile);
}

const void* weight(Call& call, const Tensors& weight_hh, int n) {
  const int64_t H = call.shape.H;
  const door::Type type = call.shape.int8 ? door::Type::i8 : call.low();
  return call.take("weight_hh", weight_hh[n], n, type, "[4*H, H]", {4 * H, H});
}

void lstm_persist_forward(Tensors x_gates, Tensors weight_hh, Tensors scale, Tensors h0, Tensors c0, Optional lengths,
                          Optional offsets, double tau, bool hard, bool reverse, int64_t tile, Tensors h, Tensors c,
                          Tensors gates, Tensors h_n, Tensors c_n) {
  const char* const op = "lstm_persist_forward";
  Call call(op, "x_gates", x_gates, c0, lengths, offsets, tau, hard);
  call.shape.int8 = !scale.empty();
  const int at = tile_of(op, call, tile);
  call.same_count("weight_hh", weight_hh.size());
  call.same_count("scale", scale.size(), true);
  call.same_count("h0", h0.size());
  call.same_count("h", h.size());
  call.same_count("c", c.size(), true);
  call.same_count("gates", gates.size(), true);
  call.same_count("h_n", h_n.size());
  call.same_count("c_n", c_n.size());
  cuda::PersistForward directions[2] = {};
  for (int n = 0; n < call.count(); ++n) {
    cuda::PersistForward& d = directions[n];
    const Tensor *const kept_c = maybe(c, n), *const kept_gates = maybe(gates, n);
    d.x_gates = call.elements("x_gates", x_gates[n], n, true, call.low());
    d.weight_hh = weight(call, weight_hh, n);
    d.scale =
        scale.empty()
            ? nullptr
            : static_cast<const float*>(call.take("scale", scale[n], n, door::Type::f32, "[4*H]", {4 * call.shape.H}));
    d.h0 = call.state("h0", h0[n], n);
    d.c0 = call.cell("c0", c0[n], n);
    d.h = writable<void>(call.elements("h", h[n], n, false, call.low()));
    d.c = kept_c ? writable<float>(call.elements("c", *kept_c, n, false, door::Type::f32)) : nullptr;
    d.gates = kept_gates ? writable<void>(call.elements("gates", *kept_gates, n, true, call.low())) : nullptr;
    d.h_n = writable<void>(call.state("h_n", h_n[n], n));
    d.c_n = writable<float>(call.cell("c_n", c_n[n], n));
    d.reverse = reverse != (n == 1);
  }
  const OnDevice here(op, call.device());
  const Tensor room = scratch(x_gates[0], cuda::persist_forward_scratch(call.shape, at, call.count()));
  const char* const error =
      cuda::persist_forward(call.shape, directions, call.count(), at, room.mutable_data_ptr(), here.stream());
  if (error != nullptr) door::fail(op, error);
}

void lstm_persist_backward(Optionals dh, Optionals dh_n, Optionals dc_n, Tensors gates, Tensors c, Tensors weight_hh,
                           Tensors c0, Optional lengths, Optional offsets, double tau, bool hard, bool reverse,
                           int64_t tile, Tensors dx_gates, Tensors dh0, Tensors dc0) {
  const char* const op = "lstm_persist_backward";
  Call call(op, "gates", gates, c0, lengths, offsets, tau, hard);
  const int at = tile_of(op, call, tile);
  call.same_count("dh", dh.size());
  call.same_count("dh_n", dh_n.size());
  call.same_count("dc_n", dc_n.size());
  call.same_count("c", c.size());
  call.same_count("weight_hh", weight_hh.size());
  call.same_count("dx_gates", dx_gates.size());
  call.same_count("dh0", dh0.size());
  call.same_count("dc0", dc0.size());
  cuda::PersistBackward directions[2] = {};
  for (int n = 0; n < call.count(); ++n) {
    cuda::PersistBackward& d = directions[n];
    d.dh = dh[n] ? call.elements("dh", *dh[n], n, false, call.low()) : nullptr;
    d.dh_n = dh_n[n] ? call.state("dh_n", *dh_n[n], n) : nullptr;
    d.dc_n = dc_n[n] ? call.cell("dc_n", *dc_n[n], n) : nullptr;
    d.gates = call.elements("gates", gates[n], n, true, call.low());
    d.c = static_cast<const float*>(call.elements("c", c[n], n, false, door::Type::f32));
    d.weight_hh = weight(call, weight_hh, n);
    d.c0 = call.cell("c0", c0[n], n);
    d.dx_gates = writable<void>(call.elements("dx_gates", dx_gates[n], n, true, call.low()));
    d.dh0 = writable<void>(call.state("dh0", dh0[n], n));
    d.dc0 = writable<float>(call.cell("dc0", dc0[n], n));
    d.reverse = reverse != (n == 1);
  }
  const OnDevice here(op, call.device());
  const Tensor room = scratch(gates[0], cuda::persist_backward_scratch(call.shape, at, call.count()));
  const char* const error =
      cuda::persist_backward(call.shape, directions, call.count(), at, room.mutable_data_ptr(), here.stream());
  if (error != nullptr) door::fail(op, error);
}

std::vector<int64_t> lstm_persist_tiles() {
  std::vector<int64_t> found;
  for (int n = 0; n < cuda::persist_tiles(); ++n) {
    const cuda::PersistTile tile = cuda::persist_tile(n);
    found.insert(found.end(), {tile.units, tile.rows, tile.depth, tile.threads, tile.cluster, tile.int8_depth});
  }
  return found;
}

// Blocks of threads that a call needs at a time, and how many the device can hold.
std::tuple<int64_t, int64_t> lstm_persist_room(int64_t device, int64_t T, int64_t B, int64_t H, bool lengths,
                                               bool packed, bool hard, bool bfloat16, bool int8, int64_t tile,
                                               int64_t directions, bool backward) {
  const char* const op = "lstm_persist_room";
  const int tiles = cuda::persist_tiles(), at = static_cast<int>(tile);
  if (tile < 0 || tile >= tiles) door::fail(op, "tile must lie in 0 .. ", tiles - 1, ", got ", tile);
  const int64_t somewhere = 0;  // what matters is whether they are given
  const int64_t *const rows = lengths || packed ? &somewhere : nullptr, *const elements = packed ? &somewhere : nullptr;
  const cuda::PersistShape shape{T, B, H, rows, elements, 1.0f, hard, bfloat16, int8};
  const torch::stable::accelerator::DeviceGuard here(static_cast<int32_t>(device));
  return {cuda::persist_blocks(shape, at, static_cast<int>(directions)),
          backward ? cuda::persist_backward_room(shape, at) : cuda::persist_forward_room(shape, at)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseq, CUDA, m) {
  m.impl("lstm_persist_forward", TORCH_BOX(&lstm_persist_forward));
  m.impl("lstm_persist_backward", TORCH_BOX(&lstm_persist_backward));
}

STABLE_TORCH_LIBRARY_IMPL(fastseq, CompositeExplicitAutograd, m) {
  m.impl("lstm_persist_tiles", TORCH_BOX(&lstm_persist_tiles));
  m.impl("lstm_persist_room", TORCH_BOX(&lstm_persist_room));
}

}  // namespace fastseq::torch_door
