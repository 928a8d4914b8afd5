// What rows, codes and indices of the quantizers' kernels are.
#pragma once

#include "cuda/vq_number.h"
#include "torch_cuda/view.h"

namespace fastseq::torch_door {

inline cuda::Number number_of(const char* op, const char* name, const Tensor& tensor) {
  const door::Type type = type_of(tensor);
  if (type == door::Type::f32) return cuda::Number::f32;
  if (type == door::Type::bf16) return cuda::Number::bf16;
  if (type == door::Type::f16) return cuda::Number::f16;
  door::fail(op, name, " must be float32, bfloat16 or float16, got ", door::name_of(type));
}

inline int bits_of(const char* op, const Tensor& index) {
  const ScalarType type = index.scalar_type();
  if (type != ScalarType::Short && type != ScalarType::Int && type != ScalarType::Long) {
    door::fail(op, "index must be int16, int32 or int64, got ", door::name_of(type_of(index)));
  }
  return 8 * static_cast<int>(index.element_size());
}

}  // namespace fastseq::torch_door
