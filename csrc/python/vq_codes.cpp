#include "door/vq_codes.h"

#include "python/array.h"

namespace fastseq::python_door {
namespace {

py::array vq_pack(const py::array& index, int64_t bits) {
  const door::Array v = view("vq_pack", "index", index);
  door::check_pack(v, bits);
  py::array_t<uint8_t> out({v.size[0], core::packed_bytes(v.size[1], static_cast<int>(bits))});
  core::vq_pack(v.as<int64_t>(), v.size[0], v.size[1], static_cast<int>(bits), out.mutable_data());
  return out;
}

py::array vq_unpack(const py::array& packed, int64_t bits, int64_t count) {
  const door::Array v = view("vq_unpack", "packed", packed);
  door::check_unpack(v, bits, count);
  py::array_t<int64_t> out({v.size[0], count});
  door::check_filling(core::vq_unpack(v.as<uint8_t>(), v.size[0], count, static_cast<int>(bits), out.mutable_data()));
  return out;
}

}  // namespace

void bind_vq_codes(py::module_& m) {
  using py::arg;
  m.def("vq_pack", &vq_pack, arg("index").noconvert(), arg("bits"));
  m.def("vq_unpack", &vq_unpack, arg("packed").noconvert(), arg("bits"), arg("count"));
}

}  // namespace fastseq::python_door
