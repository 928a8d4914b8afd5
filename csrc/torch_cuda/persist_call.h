// What the operators of all persistent recurrences share: the sizes of a call, checked, and its tensors as pointers.
#pragma once

#include "cuda/lstm_persist.h"
#include "torch_cuda/view.h"

namespace fastseq::torch_door {

using Tensors = std::vector<Tensor>;
using Optionals = std::vector<Optional>;

class Call {
 public:
  // `data` is x_gates or gates: [T, B, 4*H], or [N, 4*H] with offsets.
  Call(const char* op, const char* data_name, const Tensors& data, const Tensors& c0, const Optional& lengths,
       const Optional& offsets, double tau, bool hard)
      : op_(op), given_(op), count_(static_cast<int>(data.size())), packed_(offsets.has_value()) {
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
    if (packed_ && !lengths) door::fail(op, "lengths must be given with offsets");
    const auto integers = [&](const char* name, const Optional& tensor, const char* meaning, int64_t size) {
      if (!tensor) return static_cast<const int64_t*>(nullptr);
      return static_cast<const int64_t*>(given_.in(name, *tensor, door::Type::i64, meaning, {size}));
    };
    shape.lengths = integers("lengths", lengths, "[B]", shape.B);
    shape.offsets = integers("offsets", offsets, "[T]", shape.T);
  }

  int count() const { return count_; }

  void same_count(const char* name, size_t count, bool may_be_none = false) const {
    if (static_cast<int>(count) != count_ && !(may_be_none && count == 0)) {
      door::fail(op_, name, " must list ", count_, " directions", may_be_none ? " or none" : "", ", got ", count);
    }
  }

  const void* take(const char* name, const Tensor& tensor, int n, door::Type type, const char* meaning,
                   std::initializer_list<int64_t> size) {
    return given_.in(named(name, n), tensor, type, meaning, size);
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

  const char* op_;
  Given given_;
  int count_;
  bool packed_;
  int64_t N_ = 0;
  door::Type low_ = door::Type::other;
};

template <class T>
T* writable(const void* data) {
  return static_cast<T*>(const_cast<void*>(data));
}

inline const Tensor* maybe(const Tensors& list, int n) { return list.empty() ? nullptr : &list[n]; }

}  // namespace fastseq::torch_door
