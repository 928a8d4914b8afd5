// Tensors as arrays, torch's allocator for results and scratch, and torch's threads behind the core's team.
#pragma once

#include <omp.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <vector>

#include "core/isa.h"
#include "core/parallel.h"
#include "door/array.h"
#include "door/scratch.h"
#include "torch/tensor.h"

namespace fastseq::torch_door {

inline door::Array view(const char* op, const char* name, const Tensor& tensor) {
  if (!tensor.is_cpu()) door::fail(op, name, " must be on cpu");
  return array_of(op, name, tensor);
}

inline door::Array view(const char* op, const char* name, const Optional& tensor) {
  return tensor ? view(op, name, *tensor) : door::Array{};
}

inline std::vector<door::Array> view(const char* op, const char* name, const std::vector<Tensor>& tensors) {
  std::vector<door::Array> found;
  for (const Tensor& tensor : tensors) found.push_back(view(op, name, tensor));
  return found;
}

inline Tensor empty(const Tensor& like, std::vector<int64_t> size) {
  Tensor out = torch::stable::new_empty(like, size);
  door::advise_huge(out.mutable_data_ptr(), out.numel() * out.element_size());
  return out;
}

// One OpenMP region for a whole call, on the pool that torch's own operators keep warm. A pool of our own would compete
// with their threads, which spin for a while after each operator.
inline void run_team(int size, core::Team::Body body, const void* context) {
  if (size == 1) return core::run_alone(1, body, context);
  core::Barrier barrier(size);
  std::atomic<bool> whole{true};
#pragma omp parallel num_threads(size)
  {
    if (omp_get_num_threads() == size) {
      body(context, omp_get_thread_num(), size, barrier);
    } else if (omp_get_thread_num() == 0) {
      whole = false;  // fewer threads than asked for: the barrier would wait for ever
    }
  }
  if (!whole) core::run_alone(1, body, context);
}

inline core::Team team() {
  const int most = omp_in_parallel() ? 1 : static_cast<int>(torch::stable::get_num_threads());
  return {most, run_team};
}

inline void check_isa(const char* op) {
  if (const char* const error = core::choice().error) door::fail(op, error);
}

}  // namespace fastseq::torch_door
