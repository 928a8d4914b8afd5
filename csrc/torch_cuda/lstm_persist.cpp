#include "cuda/lstm_persist.h"

#include <tuple>

#include "torch_cuda/view.h"

namespace fastseq::torch_door {
namespace {

using Tensors = std::vector<Tensor>;
using Optionals = std::vector<Optional>;

// The sizes of a call, and its tensors on their way to pointers.
class Call {
 public:
  // `data` is x_gates or gates: [T, B, 4*H], or [N, 4*H] with offsets.
  Call(const char* op, const char* data_name, const Tensors& data, const Tensors& c0, const Optional& lengths,
       const Optional& offsets, double tau, bool hard, int64_t tile, bool int8 = false)
      : op_(op), given_(op), count_(static_cast<int>(data.size())), packed_(offsets.has_value()), tile_(tile) {
    if (count_ != 1 && count_ != 2) door::fail(op, data_name, " must list 1 or 2 directions, got ", count_);
    same_count("c0", c0.size());
    const door::Array first = array_of(op, data_name, data[0]), state = array_of(op, "c0", c0[0]);
    low_ = first.type;
    if (low_ != door::Type::bf16 && low_ != door::Type::f16) {
      door::fail(op, data_name, " must be bfloat16 or float16, got ", door::name_of(low_));
    }
    door::expect_dims(op, data_name, first, packed_ ? "[N, 4*H] with offsets" : "[T, B, 4*H]", packed_ ? 2 : 3);
    door::expect_dims(op, "c0", state, "[B, H]", 2);
    N_ = first.size[0];
    shape.T = packed_ ? offsets->numel() : N_;
    shape.B = packed_ ? state.size[0] : first.size[1];
    shape.H = state.size[1];
    if (shape.T < 1 || shape.B < 1 || shape.H < 1) {
      door::fail(op, "T, B and H must be at least 1, got ", shape.T, ", ", shape.B, " and ", shape.H);
    }
    if (!(tau > 0)) door::fail(op, "tau must be greater than 0, got ", tau);
    shape.inverse_tau = static_cast<float>(1 / tau);
    shape.hard = hard;
    shape.bfloat16 = low_ == door::Type::bf16;
    shape.int8 = int8;
    check_tile();
    if (packed_ && !lengths) door::fail(op, "lengths must be given with offsets");
    const auto integers = [&](const char* name, const Optional& tensor, const char* meaning, int64_t size) {
      if (!tensor) return static_cast<const int64_t*>(nullptr);
      return static_cast<const int64_t*>(given_.in(name, *tensor, door::Type::i64, meaning, {size}));
    };
    shape.lengths = integers("lengths", lengths, "[B]", shape.B);
    shape.offsets = integers("offsets", offsets, "[T]", shape.T);
  }

  int count() const { return count_; }
  int tile() const { return static_cast<int>(tile_); }

  void same_count(const char* name, size_t count, bool may_be_none = false) const {
    if (static_cast<int>(count) != count_ && !(may_be_none && count == 0)) {
      door::fail(op_, name, " must list ", count_, " directions", may_be_none ? " or none" : "", ", got ", count);
    }
  }

  const void* weight(const Tensors& weight_hh, int n) {
    const door::Type type = shape.int8 ? door::Type::i8 : low_;
    return given_.in(named("weight_hh", n), weight_hh[n], type, "[4*H, H]", {4 * shape.H, shape.H});
  }
  const float* scale(const Tensors& scales, int n) {
    return static_cast<const float*>(given_.in(named("scale", n), scales[n], door::Type::f32, "[4*H]", {4 * shape.H}));
  }
  const void* state(const char* name, const Tensor& tensor, int n) {
    return given_.in(named(name, n), tensor, low_, "[B, H]", {shape.B, shape.H});
  }
  const float* cell(const char* name, const Tensor& tensor, int n) {
    return static_cast<const float*>(given_.in(named(name, n), tensor, door::Type::f32, "[B, H]", {shape.B, shape.H}));
  }
  // One row of `width` per element: h, c or gates, or a gradient of these.
  const void* elements(const char* name, const Tensor& tensor, int n, bool wide, door::Type type) {
    const int64_t width = wide ? 4 * shape.H : shape.H;
    if (packed_) return given_.in(named(name, n), tensor, type, wide ? "[N, 4*H]" : "[N, H]", {N_, width});
    return given_.in(named(name, n), tensor, type, wide ? "[T, B, 4*H]" : "[T, B, H]", {shape.T, shape.B, width});
  }
  door::Type low() const { return low_; }
  int32_t device() const { return given_.device(); }

  cuda::PersistShape shape{};

 private:
  std::string named(const char* name, int n) const {
    return count_ == 1 ? name : std::string(name) + "[" + std::to_string(n) + "]";
  }
  void check_tile() const {
    const int tiles = cuda::persist_tiles();
    if (tile_ < 0 || tile_ >= tiles) door::fail(op_, "tile must lie in 0 .. ", tiles - 1, ", got ", tile_);
    const cuda::PersistTile of = cuda::persist_tile(tile());
    const int64_t depth = shape.int8 ? of.int8_depth : of.depth;
    if (shape.H > depth) {
      door::fail(op_, "H must be at most ", depth, " with tile ", tile_, shape.int8 ? " and int8 weights" : "",
                 ", got ", shape.H);
    }
  }

  const char* op_;
  Given given_;
  int count_;
  bool packed_;
  int64_t tile_, N_ = 0;
  door::Type low_ = door::Type::other;
};

template <class T>
T* writable(const void* data) {
  return static_cast<T*>(const_cast<void*>(data));
}

const Tensor* maybe(const Tensors& list, int n) { return list.empty() ? nullptr : &list[n]; }

void lstm_persist_forward(Tensors x_gates, Tensors weight_hh, Tensors scale, Tensors h0, Tensors c0, Optional lengths,
                          Optional offsets, double tau, bool hard, bool reverse, int64_t tile, Tensors h, Tensors c,
                          Tensors gates, Tensors h_n, Tensors c_n) {
  const char* const op = "lstm_persist_forward";
  Call call(op, "x_gates", x_gates, c0, lengths, offsets, tau, hard, tile, !scale.empty());
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
    d.weight_hh = call.weight(weight_hh, n);
    d.scale = scale.empty() ? nullptr : call.scale(scale, n);
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
  const Tensor room = scratch(x_gates[0], cuda::persist_forward_scratch(call.shape, call.tile(), call.count()));
  const char* const error =
      cuda::persist_forward(call.shape, directions, call.count(), call.tile(), room.mutable_data_ptr(), here.stream());
  if (error != nullptr) door::fail(op, error);
}

void lstm_persist_backward(Optionals dh, Optionals dh_n, Optionals dc_n, Tensors gates, Tensors c, Tensors weight_hh,
                           Tensors c0, Optional lengths, Optional offsets, double tau, bool hard, bool reverse,
                           int64_t tile, Tensors dx_gates, Tensors dh0, Tensors dc0) {
  const char* const op = "lstm_persist_backward";
  Call call(op, "gates", gates, c0, lengths, offsets, tau, hard, tile);
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
    d.weight_hh = call.weight(weight_hh, n);
    d.c0 = call.cell("c0", c0[n], n);
    d.dx_gates = writable<void>(call.elements("dx_gates", dx_gates[n], n, true, call.low()));
    d.dh0 = writable<void>(call.state("dh0", dh0[n], n));
    d.dc0 = writable<float>(call.cell("dc0", dc0[n], n));
    d.reverse = reverse != (n == 1);
  }
  const OnDevice here(op, call.device());
  const Tensor room = scratch(gates[0], cuda::persist_backward_scratch(call.shape, call.tile(), call.count()));
  const char* const error =
      cuda::persist_backward(call.shape, directions, call.count(), call.tile(), room.mutable_data_ptr(), here.stream());
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
