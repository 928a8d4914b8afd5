#include "core/vq_codes.h"

namespace fastseq::core {

void vq_pack(const int64_t* codes, int64_t lines, int64_t count, int bits, uint8_t* packed) noexcept {
  for (int64_t line = 0; line < lines; ++line) {
    uint64_t waiting = 0;  // bits that no byte has taken yet
    int held = 0;
    for (int64_t i = 0; i < count; ++i) {
      waiting |= static_cast<uint64_t>(*codes++) << held;
      for (held += bits; held >= 8; held -= 8, waiting >>= 8) *packed++ = static_cast<uint8_t>(waiting);
    }
    if (held) *packed++ = static_cast<uint8_t>(waiting);
  }
}

int64_t vq_unpack(const uint8_t* packed, int64_t lines, int64_t count, int bits, int64_t* codes) noexcept {
  const uint64_t mask = (uint64_t(1) << bits) - 1;
  int64_t wrong = -1;
  for (int64_t line = 0; line < lines; ++line) {
    uint64_t waiting = 0;
    int held = 0;
    for (int64_t i = 0; i < count; ++i) {
      for (; held < bits; held += 8) waiting |= static_cast<uint64_t>(*packed++) << held;
      *codes++ = static_cast<int64_t>(waiting & mask);
      waiting >>= bits;
      held -= bits;
    }
    if (waiting && wrong < 0) wrong = line;
  }
  return wrong;
}

}  // namespace fastseq::core
