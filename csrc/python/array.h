// numpy arrays as the core sees them, and the results it writes.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "core/isa.h"
#include "core/parallel.h"
#include "door/array.h"
#include "door/scratch.h"
#include "deploy/pool.h"

namespace fastseq::python_door {

namespace py = pybind11;
using Optional = std::optional<py::array>;
using deploy::team;

inline door::Array view(const char* op, const char* name, const py::array& array) {
  door::Array out;
  out.data = array.data();
  out.type = py::isinstance<py::array_t<float>>(array)      ? door::Type::f32
             : py::isinstance<py::array_t<double>>(array)   ? door::Type::f64
             : py::isinstance<py::array_t<uint16_t>>(array) ? door::Type::bf16  // numpy has no such type
             : py::isinstance<py::array_t<int64_t>>(array)  ? door::Type::i64
             : py::isinstance<py::array_t<int32_t>>(array)  ? door::Type::i32
             : py::isinstance<py::array_t<int8_t>>(array)   ? door::Type::i8
             : py::isinstance<py::array_t<uint8_t>>(array)  ? door::Type::u8
             : py::isinstance<py::array_t<bool>>(array)     ? door::Type::boolean
             : array.dtype().char_() == 'e'                 ? door::Type::f16
                                                            : door::Type::other;
  out.bytes = array.itemsize();
  out.dims = static_cast<int>(array.ndim());
  if (out.dims > 4) door::fail(op, name, " has ", out.dims, " dimensions");
  for (int i = 0; i < out.dims; ++i) out.size[i] = array.shape(i);
  out.contiguous = (array.flags() & py::array::c_style) != 0;
  return out;
}

inline door::Array view(const char* op, const char* name, const Optional& array) {
  return array ? view(op, name, *array) : door::Array{};
}

inline std::vector<door::Array> view(const char* op, const char* name, const std::vector<py::array>& arrays) {
  std::vector<door::Array> found;
  for (const py::array& array : arrays) found.push_back(view(op, name, array));
  return found;
}

inline py::array empty(door::Type type, const std::vector<int64_t>& size) {
  return type == door::Type::f32 ? py::array(py::array_t<float>(size)) : py::array(py::array_t<double>(size));
}

template <class R>
R* pointer(py::array& array) {
  return static_cast<R*>(array.mutable_data());
}

inline void check_call(const char* op, int threads) {
  if (const char* const error = core::choice().error) door::fail(op, error);
  if (threads < 1) door::fail(op, "threads must be at least 1, got ", threads);
}

void bind_adt(py::module_& m);
void bind_ensemble_stats(py::module_& m);
void bind_gemm(py::module_& m);
void bind_lstm(py::module_& m);
void bind_lstm_lowrank(py::module_& m);
void bind_mimo(py::module_& m);
void bind_mimo_nll(py::module_& m);
void bind_packed(py::module_& m);
void bind_deploy(py::module_& m);
void bind_vq(py::module_& m);
void bind_vq_codes(py::module_& m);
void bind_vq_residual(py::module_& m);

}  // namespace fastseq::python_door
