// Tensors of one CUDA device as pointers, torch's current stream there, and its allocator for scratch. Loads in a torch
// without CUDA too, where no call gets further than its checks.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "torch/tensor.h"

// a torch without CUDA has none
extern "C" AOTI_TORCH_EXPORT __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                                     void** stream);

namespace fastseq::torch_door {

// What a call is given: each tensor is checked by itself when it is taken, and at last all for lying on one device.
class Given {
 public:
  explicit Given(const char* op) : op_(op) {}

  const void* in(const std::string& name, const Tensor& tensor, door::Type type, const char* meaning,
                 std::initializer_list<int64_t> size) {
    const door::Array array = array_of(op_, name.c_str(), tensor);
    door::expect(op_, name.c_str(), array, type, meaning, size);
    taken_.emplace_back(name, tensor);
    return array.data;
  }

  int32_t device() const {
    const auto& [first, leading] = taken_.front();
    for (const auto& [name, tensor] : taken_) {
      if (!tensor.is_cuda()) door::fail(op_, name, " must be on cuda");
      if (tensor.get_device_index() != leading.get_device_index()) {
        door::fail(op_, name, " must be on cuda:", leading.get_device_index(), " like ", first,
                   ", got cuda:", tensor.get_device_index());
      }
    }
    return leading.get_device_index();
  }

 private:
  const char* op_;
  std::vector<std::pair<std::string, Tensor>> taken_;
};

// The device that a call runs on, made the current one while this lives.
class OnDevice {
 public:
  OnDevice(const char* op, int32_t device) : guard_(device) {
    if (aoti_torch_get_current_cuda_stream == nullptr) door::fail(op, "this torch has no CUDA");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// Given back to torch's allocator when the tensor goes: later work of the same stream may have it, none earlier.
inline Tensor scratch(const Tensor& like, size_t bytes) {
  return torch::stable::new_empty(like, std::vector<int64_t>{static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

}  // namespace fastseq::torch_door
