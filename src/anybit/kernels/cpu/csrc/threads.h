// Threads for a product: torch's own, so that there is never a second pool that spins against it.
#ifndef ANYBIT_THREADS_H
#define ANYBIT_THREADS_H

#include <stdint.h>

#include <atomic>

// 0 .. count in pieces that whoever is free takes: large ones first, since the first rows of a piece are not fetched ahead, and
// small ones at the end, so that nobody waits long for the last. A neighbour on the machine may slow one thread down.
struct Pieces {
  int64_t count, grain, threads;  // every piece is a multiple of `grain` long except the last
  std::atomic<int64_t> next;
  bool take(int64_t* first, int64_t* last);
};

// Calls task(data) on up to `threads` threads at once, the caller's among them; returns when all are done.
void anybit_together(int64_t threads, void (*task)(void*), void* data);

// Calls task(data, first, last) for pieces of 0 .. count, each a multiple of `grain` long except the last, on up to
// `threads` threads; returns when all are done.
void anybit_parallel(int64_t count, int64_t grain, int64_t threads, void (*task)(void*, int64_t, int64_t), void* data);

#endif
