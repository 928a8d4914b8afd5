#include "deploy/pool.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace fastseq::deploy {
namespace {

class Pool {
 public:
  void run(int size, core::Team::Body body, const void* context) {
    const std::lock_guard<std::mutex> turn(turn_);
    core::Barrier barrier(size);
    while (static_cast<int>(workers_.size()) < size - 1) {
      const int rank = static_cast<int>(workers_.size()) + 1;
      workers_.emplace_back([this, rank, born = job_] { work(rank, born); }).detach();
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      body_ = body;
      context_ = context;
      size_ = size;
      barrier_ = &barrier;
      left_ = size - 1;
      ++job_;
    }
    wake_.notify_all();
    body(context, 0, size, barrier);
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, [this] { return left_ == 0; });
  }

 private:
  void work(int rank, uint64_t born) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (uint64_t seen = born;;) {
      wake_.wait(lock, [&] { return job_ != seen; });
      seen = job_;
      if (rank >= size_) continue;
      const auto body = body_;
      const void* const context = context_;
      const int size = size_;
      core::Barrier& barrier = *barrier_;
      lock.unlock();
      body(context, rank, size, barrier);
      lock.lock();
      if (--left_ == 0) finished_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, finished_;
  std::vector<std::thread> workers_;
  core::Team::Body body_ = nullptr;
  const void* context_ = nullptr;
  core::Barrier* barrier_ = nullptr;
  int size_ = 0, left_ = 0;
  uint64_t job_ = 0;
};

// The pool of this process. A forked child has none of its parent's threads, and perhaps its locks taken for ever: it
// leaves the parent's pool alone and makes its own. Workers are never joined: they may sleep when the process ends.
Pool& pool() {
  struct Owned {
    pid_t owner;
    Pool pool;
  };
  static std::atomic<Owned*> current{nullptr};
  Owned* found = current.load(std::memory_order_acquire);
  while (found == nullptr || found->owner != getpid()) {
    Owned* const fresh = new Owned{getpid(), {}};
    if (current.compare_exchange_strong(found, fresh, std::memory_order_acq_rel)) return fresh->pool;
    delete fresh;
  }
  return found->pool;
}

void run_pool(int size, core::Team::Body body, const void* context) {
  if (size == 1) return core::run_alone(1, body, context);
  pool().run(size, body, context);
}

}  // namespace

core::Team team(int threads) { return {threads, run_pool}; }

}  // namespace fastseq::deploy
