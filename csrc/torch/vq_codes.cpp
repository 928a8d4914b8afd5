#include "door/vq_codes.h"

#include "torch/view.h"

namespace fastseq::torch_door {
namespace {

Tensor vq_pack(Tensor index, int64_t bits) {
  const door::Array v = view("vq_pack", "index", index);
  door::check_pack(v, bits);
  const int64_t lines = v.size[0], count = v.size[1];
  Tensor out = torch::stable::new_empty(
      index, std::vector<int64_t>{lines, core::packed_bytes(count, static_cast<int>(bits))}, ScalarType::Byte);
  core::vq_pack(v.as<int64_t>(), lines, count, static_cast<int>(bits), pointer<uint8_t>(out));
  return out;
}

Tensor vq_unpack(Tensor packed, int64_t bits, int64_t count) {
  const door::Array v = view("vq_unpack", "packed", packed);
  door::check_unpack(v, bits, count);
  Tensor out = torch::stable::new_empty(packed, std::vector<int64_t>{v.size[0], count}, ScalarType::Long);
  door::check_filling(
      core::vq_unpack(v.as<uint8_t>(), v.size[0], count, static_cast<int>(bits), pointer<int64_t>(out)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTSEQ_OPERATORS, CPU, m) {
  m.impl("vq_pack", TORCH_BOX(&vq_pack));
  m.impl("vq_unpack", TORCH_BOX(&vq_unpack));
}

}  // namespace fastseq::torch_door
