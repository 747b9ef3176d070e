// Threads for a product: torch's own, so that there is never a second pool that spins against it.
#ifndef ANYBIT_THREADS_H
#define ANYBIT_THREADS_H

#include <stdint.h>

// Calls task(data, first, last) for pieces of 0 .. count, each a multiple of `grain` long except the last, on up to
// `threads` threads; returns when all are done.
void anybit_parallel(int64_t count, int64_t grain, int64_t threads, void (*task)(void*, int64_t, int64_t), void* data);

#endif
