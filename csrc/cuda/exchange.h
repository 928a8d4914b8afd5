// How blocks of threads hand each other numbers at every step without a barrier or a flag. Every place in memory is
// written and read at every second step, and one bit of each word of 32 tells one of these uses from the next: a reader
// polls the word itself until the bit is right. One trip through the second-level cache, where a flag beside the data
// needs two and a fence.
//
// Why nothing is lost: a block writes a place anew only two steps later. By then it has read what all others wrote one
// step later, and a block writes only after all of its threads have read what came before. Why nothing old is taken for
// new: places are zeros when a call begins and uses are stamped 1, 1, 0, 0, 1, 1, ..., so what is there before a use
// has the other stamp; and a place is always read by the same thread, which never sees an older value after a newer
// one. Words are relaxed atomics, and no data but them goes from block to block.
#pragma once

#include <cstdint>

#include "cuda/fragment.h"

namespace fastseq::cuda {

// Places for even and for odd steps.
FASTSEQ_BOTH constexpr int slot_of(int step) { return step & 1; }

// kBit is the one that carries the stamp.
template <uint32_t kBit>
struct Stamped {
  FASTSEQ_BOTH static constexpr uint32_t mark(int step) { return (step & 2) ? 0 : kBit; }
  FASTSEQ_BOTH static constexpr uint32_t write(uint32_t value, int step) { return (value & ~kBit) | mark(step); }
  // Zero where the word is of this step.
  FASTSEQ_BOTH static constexpr uint32_t stale(uint32_t word, int step) { return (word ^ mark(step)) & kBit; }
  FASTSEQ_BOTH static constexpr uint32_t read(uint32_t word) { return word & ~kBit; }
};

// Two 16-bit numbers that are below 2 in magnitude, as h is: the highest bit of the second's exponent is free.
using Pair = Stamped<1u << 30>;
// A float32 whose last bit is given up.
using Float = Stamped<1u>;

// A NaN as the second number would lose that bit, so then the first is made one: a product with either is NaN for all.
FASTSEQ_BOTH constexpr uint32_t safe_pair(uint32_t first, uint32_t second, uint32_t infinity) {
  return (second & 0x7fff) > infinity ? 0x7fff : first | second << 16;
}

}  // namespace fastseq::cuda
