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
  Pieces pieces;
  void (*task)(void*, int64_t, int64_t);
  void* data;
};

void take_pieces(void* data) {
  Work* work = static_cast<Work*>(data);
  for (int64_t first, last; work->pieces.take(&first, &last);) work->task(work->data, first, last);
}

// Workers that sleep between products. One product at a time; a second caller works alone.
class Pool {
 public:
  bool run(void (*task)(void*), void* data, int64_t threads) {
    std::unique_lock<std::mutex> busy(one_caller_, std::try_to_lock);
    if (!busy.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int64_t>(workers_) < threads - 1) {
        std::thread([this, number = workers_] { serve(number); }).detach();
        workers_++;
      }
      task_ = task;
      data_ = data;
      wanted_ = threads - 1;
      running_ = wanted_;
      round_++;
    }
    wake_.notify_all();
    task(data);
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
      void (*task)(void*) = task_;
      void* data = data_;
      lock.unlock();
      task(data);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex one_caller_, mutex_;
  std::condition_variable wake_, done_;
  void (*task_)(void*) = nullptr;
  void* data_ = nullptr;
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

bool Pieces::take(int64_t* first, int64_t* last) {
  const int64_t least = (count / (64 * threads) / grain + 1) * grain;
  int64_t start = next.load(std::memory_order_relaxed), size;
  do {
    if (start >= count) return false;
    size = (count - start) / (2 * threads);
    size = size < least ? least : size / grain * grain;
  } while (!next.compare_exchange_weak(start, start + size, std::memory_order_relaxed));
  *first = start;
  *last = start + size < count ? start + size : count;
  return true;
}

void anybit_together(int64_t threads, void (*task)(void*), void* data) {
  if (threads <= 1) task(data);
  else if (GompParallel parallel = gomp_parallel) parallel(task, data, static_cast<unsigned>(threads), 0);
  else if (!pool()->run(task, data, threads)) task(data);
}

void anybit_parallel(int64_t count, int64_t grain, int64_t threads, void (*task)(void*, int64_t, int64_t), void* data) {
  const int64_t useful = (count + grain - 1) / grain;
  if (threads > useful) threads = useful;
  if (threads <= 1) {
    task(data, 0, count);
    return;
  }
  Work work{{count, grain, threads, {0}}, task, data};
  anybit_together(threads, take_pieces, &work);
}
