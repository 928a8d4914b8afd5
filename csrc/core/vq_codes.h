// Codes as bits: code i takes bits [i * bits, (i + 1) * bits) of its line, the lowest first; the last byte of a line is
// filled up with zeros. 1 <= bits <= 32, codes lie in [0, 2^bits).
#pragma once

#include <cstdint>

namespace fastseq::core {

constexpr int64_t packed_bytes(int64_t count, int bits) { return (count * bits + 7) / 8; }

//   codes   [lines, count]                       in
//   packed  [lines, packed_bytes(count, bits)]   out
void vq_pack(const int64_t* codes, int64_t lines, int64_t count, int bits, uint8_t* packed) noexcept;
// The inverse. Returns the number of the first line whose filling is not zero, which no packing left so, or -1.
int64_t vq_unpack(const uint8_t* packed, int64_t lines, int64_t count, int bits, int64_t* codes) noexcept;

}  // namespace fastseq::core
