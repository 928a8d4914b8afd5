// Checks of packed matrices and of what meets them, for both doors.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/lstm_packed.h"
#include "core/matrix.h"
#include "door/lstm.h"

namespace fastseq::door {

// What `pack_matrix` takes: for each gate its rows, whole or the upper factor, and its lower factor or an array without
// elements; the scales of integers; and how many columns share one, 0 for all.
struct MatrixParts {
  std::vector<Array> rows, rows_scale, down, down_scale;
  std::vector<int64_t> group, down_group;
  int64_t K;
  bool bounded;
};

inline core::PartSource part_source(const char* op, const std::string& name, const Array& values, const Array& scale,
                                    int64_t group, int64_t N, int64_t K) {
  using core::Storage;
  core::PartSource part{};
  part.group = group == K ? 0 : group;
  part.values = values.data;
  expect_dims(op, name.c_str(), values, "[N, K]", 2);
  switch (values.type) {
    case Type::f32:
      part.storage = Storage::f32;
      break;
    case Type::bf16:
      part.storage = Storage::bf16;
      break;
    case Type::i8:
      part.storage = Storage::int8;
      break;
    case Type::u8:
      part.storage = Storage::int4;
      break;
    default:
      fail(op, name, " must be float32, bfloat16, int8 or uint8 (4 bits), got ", name_of(values.type));
  }
  const bool nibbles = part.storage == Storage::int4;
  expect(op, name.c_str(), values, values.type, nibbles ? "[N, (K + 1) / 2]" : "[N, K]",
         {N, nibbles ? (K + 1) / 2 : K});
  if (!core::is_integer(part.storage)) return part;
  if (group < 0 || (part.group && (group % 8 || group > K))) {
    fail(op, "group must be 0, or a multiple of 8 up to the columns = ", K, ", got ", group);
  }
  const int64_t groups = part.group ? (K + group - 1) / group : 1;
  expect(op, (name + "_scale").c_str(), scale, Type::f32, "[N, groups]", {N, groups});
  part.scale = scale.as<float>();
  return part;
}

inline core::MatrixSource check_parts(const char* op, const MatrixParts& p) {
  const size_t gates = p.rows.size();
  if (gates != 1 && gates != 4) fail(op, "rows must be of 1 or 4 gates, got ", gates);
  for (const size_t n :
       {p.rows_scale.size(), p.down.size(), p.down_scale.size(), p.group.size(), p.down_group.size()}) {
    if (n != gates) fail(op, "rows, scales, down and groups must be lists of one length, got ", gates, " and ", n);
  }
  expect_dims(op, "rows", p.rows[0], "[N, K]", 2);
  const int64_t N = p.rows[0].size[0];
  core::MatrixSource s{};
  s.N = N * static_cast<int64_t>(gates);
  s.K = p.K;
  s.gates = static_cast<int>(gates);
  s.bounded = p.bounded;
  for (size_t g = 0; g < gates; ++g) {
    const Array& down = p.down[g];
    const int64_t rank = down.dims == 2 ? down.size[0] : 0;
    s.gate[g].rank = rank;
    s.gate[g].rows = part_source(op, "rows", p.rows[g], p.rows_scale[g], p.group[g], N, rank ? rank : p.K);
    if (rank) s.gate[g].down = part_source(op, "down", down, p.down_scale[g], p.down_group[g], rank, p.K);
  }
  if (const char* const fault = core::matrix_fault(s)) fail(op, fault);
  return s;
}

inline core::PackedMatrix open_packed(const char* op, const char* name, const Array& packed, int gates) {
  expect_dims(op, name, packed, "what pack_matrix returned", 1);
  expect(op, name, packed, Type::u8, "[bytes]", {packed.size[0]});
  core::PackedMatrix m;
  const bool aligned = reinterpret_cast<uintptr_t>(packed.data) % alignof(float) == 0;
  if (!aligned || !core::open_matrix(packed.as<uint8_t>(), static_cast<size_t>(packed.size[0]), &m)) {
    fail(op, name, " must be what pack_matrix returned, got ", packed.size[0], aligned ? " other" : " misaligned",
         " bytes");
  }
  if (gates && m.gates != gates) fail(op, name, " must be packed as ", gates, " gates, got ", m.gates);
  return m;
}

// M, the rows of x.
inline int64_t check_linear(const char* op, const core::PackedMatrix& w, const Array& x, const Array& bias) {
  expect_dims(op, "x", x, "[M, K]", 2);
  expect(op, "x", x, Type::f32, "[M, K]", {x.size[0], w.K});
  if (bias.given()) expect(op, "bias", bias, Type::f32, "[N]", {w.N});
  if (w.bounded) fail(op, "weight must be packed with bounded=False");
  return x.size[0];
}

inline void check_float(const char* op, const char* name, const Array& x, int64_t save) {
  if (x.type != Type::f32) fail(op, name, " must be float32, got ", name_of(x.type));
  if (save < 0 || save > 2) fail(op, "save must be 0, 1 or 2, got ", save);
}

struct PackedWeights {
  core::PackedMatrix hh, hr, ih;
};

// The input product of a layer: x [T, B, I] or [N, I] becomes the x_gates that check_lstm expects.
inline Array check_input(const char* op, const Array& x, const Array& weight_ih, const Array& bias, PackedWeights& w) {
  if (!weight_ih.given()) {
    if (bias.given()) fail(op, "bias must be None without weight_ih");
    return x;
  }
  w.ih = open_packed(op, "weight_ih", weight_ih, 4);
  if (w.ih.N != w.hh.N) fail(op, "weight_ih must have the rows of weight_hh = ", w.hh.N, ", got ", w.ih.N);
  if (w.ih.bounded) fail(op, "weight_ih must be packed with bounded=False");
  if (x.dims < 1 || x.size[x.dims - 1] != w.ih.K) {
    fail(op, "x must be [T, B, I], or [N, I] with batch_sizes, I = ", w.ih.K, ", got ", shape(x.size, x.dims));
  }
  if (bias.given()) expect(op, "bias", bias, Type::f32, "[4*H]", {w.ih.N});
  if (!x.contiguous) fail(op, "x must be contiguous");
  Array gates = x;
  gates.size[x.dims - 1] = w.hh.N;
  return gates;
}

// Fills in weight_hh and weight_hr of the state, so that check_lstm sees their sizes.
inline PackedWeights check_packed(const char* op, const Array& weight_hh, const Array& weight_hr, LstmState& s) {
  PackedWeights w{open_packed(op, "weight_hh", weight_hh, 4), {}, {}};
  s.weight_hh = Array{nullptr, Type::f32, 2, {w.hh.N, w.hh.K}, true};
  if (weight_hr.given()) {
    w.hr = open_packed(op, "weight_hr", weight_hr, 1);
    s.weight_hr = Array{nullptr, Type::f32, 2, {w.hr.N, w.hr.K}, true};
    if (w.hr.gate[0].rank) fail(op, "weight_hr must be packed whole, got factors");
    if (!w.hr.bounded) fail(op, "weight_hr must be packed with bounded=True");
  }
  if (w.hh.bounded == weight_hr.given()) {
    fail(op, "weight_hh must be packed with bounded=", weight_hr.given() ? "False beside" : "True without",
         " weight_hr");
  }
  return w;
}

}  // namespace fastseq::door
