// Scratch for one call, kept by its thread for the next: fresh pages cost more than many a step, as the system clears
// each one. Large ones come as huge pages, where the system has them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastseq::door {

constexpr size_t kHugePage = size_t(2) << 20;

// Asks for huge pages behind memory that nobody has touched yet.
inline void advise_huge(void* data, size_t bytes) {
#if defined(__linux__)
  if (bytes < 2 * kHugePage) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: failing changes nothing
#else
  (void)data, (void)bytes;
#endif
}

class Memory {
 public:
  ~Memory() { clear(); }
  void* at_least(size_t bytes) {
    if (bytes > size_) {
      clear();
      data_ = ::operator new(bytes, kAlign);
      advise_huge(data_, bytes);
      size_ = bytes;
    }
    return data_;
  }
  void clear() {
    ::operator delete(data_, kAlign);
    data_ = nullptr;
    size_ = 0;
  }
  size_t size() const { return size_; }
  bool lent = false;

 private:
  static constexpr std::align_val_t kAlign{64};
  void* data_ = nullptr;
  size_t size_ = 0;
};

// 64-byte aligned elements that live as long as this, with anything in them. FASTSEQ_POISON=1 fills them with NaN: what
// a kernel reads before it wrote shows up in tests.
template <class R>
class Scratch {
 public:
  explicit Scratch(size_t count) : memory_(kept().lent ? own_ : kept()) {
    data_ = static_cast<R*>(memory_.at_least(count * sizeof(R) + 64));
    memory_.lent = true;
    static const bool poison = std::getenv("FASTSEQ_POISON") != nullptr;
    if (poison) std::memset(static_cast<void*>(data_), 0xff, count * sizeof(R));
  }
  ~Scratch() {
    memory_.lent = false;
    if (memory_.size() > kKept) memory_.clear();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  R* data() const { return data_; }

 private:
  static constexpr size_t kKept = size_t(128) << 20;  // more than that is given back after each call
  static Memory& kept() {
    thread_local Memory memory;
    return memory;
  }
  Memory own_;  // for a call inside a call on one thread
  Memory& memory_;
  R* data_;
};

}  // namespace fastseq::door
