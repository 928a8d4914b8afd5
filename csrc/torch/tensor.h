// A torch tensor on any device as an array.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "door/array.h"

namespace fastseq::torch_door {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

inline door::Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return door::Type::f32;
    case ScalarType::Double:
      return door::Type::f64;
    case ScalarType::BFloat16:
      return door::Type::bf16;
    case ScalarType::Half:
      return door::Type::f16;
    case ScalarType::Long:
      return door::Type::i64;
    case ScalarType::Int:
      return door::Type::i32;
    case ScalarType::Char:
      return door::Type::i8;
    case ScalarType::Byte:
      return door::Type::u8;
    case ScalarType::Bool:
      return door::Type::boolean;
    default:
      return door::Type::other;
  }
}

inline door::Array array_of(const char* op, const char* name, const Tensor& tensor) {
  door::Array out;
  out.data = tensor.const_data_ptr();
  out.type = type_of(tensor);
  out.bytes = static_cast<int64_t>(tensor.element_size());
  out.dims = static_cast<int>(tensor.dim());
  if (out.dims > 4) door::fail(op, name, " has ", out.dims, " dimensions");
  for (int i = 0; i < out.dims; ++i) out.size[i] = tensor.size(i);
  out.contiguous = tensor.is_contiguous();
  return out;
}

template <class R>
R* pointer(const Tensor& tensor) {
  return static_cast<R*>(tensor.mutable_data_ptr());
}

}  // namespace fastseq::torch_door
