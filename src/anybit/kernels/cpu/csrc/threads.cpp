// Where GNU's (or a compatible) OpenMP runtime is loaded in the process - torch brings one on Linux - its GOMP_parallel is
// handed to us as a pointer: the same workers, the same waiting policy, no second runtime, nothing linked. Elsewhere a small
// pool of our own waits on a condition variable between products; it never spins.
#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#ifdef _WIN32
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#include <unistd.h>
#endif

namespace {

typedef void (*GompParallel)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<GompParallel> gomp_parallel{nullptr};

struct Work {
  int64_t count, piece;
  void (*task)(void*, int64_t, int64_t);
  void* data;
  std::atomic<int64_t> next;
};

void take_pieces(void* data) {
  Work* work = static_cast<Work*>(data);
  for (;;) {
    int64_t first = work->next.fetch_add(work->piece, std::memory_order_relaxed);
    if (first >= work->count) return;
    int64_t last = first + work->piece;
    work->task(work->data, first, last < work->count ? last : work->count);
  }
}

// Workers that sleep between products. One product at a time; a second caller works alone.
class Pool {
 public:
  bool run(Work* work, int64_t threads) {
    std::unique_lock<std::mutex> busy(one_caller_, std::try_to_lock);
    if (!busy.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int64_t>(workers_) < threads - 1) {
        std::thread([this, number = workers_] { serve(number); }).detach();
        workers_++;
      }
      work_ = work;
      wanted_ = threads - 1;
      running_ = wanted_;
      round_++;
    }
    wake_.notify_all();
    take_pieces(work);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    return true;
  }

 private:
  void serve(int64_t number) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return round_ != seen; });
      seen = round_;
      if (number >= wanted_) continue;
      Work* work = work_;
      lock.unlock();
      take_pieces(work);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex one_caller_, mutex_;
  std::condition_variable wake_, done_;
  Work* work_ = nullptr;
  int64_t workers_ = 0, wanted_ = 0, running_ = 0;
  uint64_t round_ = 0;
};

// A forked child has none of its parent's threads, so it gets a pool of its own. Pools live as long as the process.
Pool* pool() {
  static std::mutex mutex;
  static Pool* current = nullptr;
  std::lock_guard<std::mutex> lock(mutex);
#ifndef _WIN32
  static pid_t owner = 0;
  if (owner != getpid()) current = nullptr, owner = getpid();
#endif
  if (!current) current = new Pool;
  return current;
}

}  // namespace

// The runtime's GOMP_parallel, or null for a pool of our own.
EXPORT void anybit_use_gomp(void* function) { gomp_parallel = reinterpret_cast<GompParallel>(function); }

void anybit_parallel(int64_t count, int64_t grain, int64_t threads, void (*task)(void*, int64_t, int64_t), void* data) {
  // several pieces a thread: a neighbour on the machine may slow one thread down
  int64_t pieces = threads * 8, piece = (count + pieces - 1) / pieces;
  piece = (piece + grain - 1) / grain * grain;
  int64_t useful = (count + piece - 1) / piece;
  if (threads > useful) threads = useful;
  if (threads <= 1) {
    task(data, 0, count);
    return;
  }
  Work work{count, piece, task, data, {0}};
  if (GompParallel parallel = gomp_parallel) parallel(take_pieces, &work, static_cast<unsigned>(threads), 0);
  else if (!pool()->run(&work, threads)) take_pieces(&work);
}
