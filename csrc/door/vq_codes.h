// Checks of packed codes, for both doors.
#pragma once

#include "core/vq_codes.h"
#include "door/array.h"

namespace fastseq::door {

inline void check_bits(const char* op, int64_t bits) {
  if (bits < 1 || bits > 32) fail(op, "bits must lie in 1 .. 32, got ", bits);
}

inline void check_pack(const Array& index, int64_t bits) {
  const char* const op = "vq_pack";
  check_bits(op, bits);
  expect_dims(op, "index", index, "[L, N]", 2);
  expect(op, "index", index, Type::i64, "[L, N]", {index.size[0], index.size[1]});
  const auto* const k = index.as<int64_t>();
  for (int64_t i = 0; i < index.size[0] * index.size[1]; ++i) {
    if (k[i] < 0 || k[i] >> bits) {
      fail(op, "index must lie in 0 .. 2**bits - 1 = ", (int64_t(1) << bits) - 1, ", got ", k[i], " at ", i);
    }
  }
}

inline void check_unpack(const Array& packed, int64_t bits, int64_t count) {
  const char* const op = "vq_unpack";
  check_bits(op, bits);
  if (count < 0) fail(op, "count must not be negative, got ", count);
  expect_dims(op, "packed", packed, "[L, bytes]", 2);
  expect(op, "packed", packed, Type::u8, "[L, (N*bits + 7) / 8]",
         {packed.size[0], core::packed_bytes(count, static_cast<int>(bits))});
}

inline void check_filling(int64_t wrong) {
  if (wrong >= 0) fail("vq_unpack", "packed is corrupted: bits after the last code of line ", wrong, " are not zero");
}

}  // namespace fastseq::door
