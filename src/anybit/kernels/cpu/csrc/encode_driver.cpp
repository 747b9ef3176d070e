// The functions Python calls to encode: the variant's encoder, shared among torch's threads.
#include "encode_variant.h"
//
#include <string.h>

#include "threads.h"

#ifdef _WIN32
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

// Slowest first; a level without encoders of its own takes the last one before it.
const Encoders* const KNOWN[] = {
    &anybit_encoders_scalar,
#ifdef ANYBIT_WITH_AVX2
    &anybit_encoders_avx2,
#endif
#ifdef ANYBIT_WITH_AVX512
    &anybit_encoders_avx512,
#endif
};

const Encoders* current = &anybit_encoders_scalar;

}  // namespace

void anybit_use_encoders(const char* level) {
  for (const Encoders* encoders : KNOWN)  // "avx512vbmi" begins with "avx512"
    if (strncmp(level, encoders->name, strlen(encoders->name)) == 0) current = encoders;
}

// The level that the encoders of the current one were compiled for.
EXPORT const char* anybit_encoders(void) { return current->name; }

// Does `job` (encode.h) for 0 .. count, in pieces of `grain`, on up to `threads` threads; 0 if there is no such encoder.
EXPORT int64_t anybit_encode(int64_t what, void* job, int64_t count, int64_t grain, int64_t threads) {
  if (what < 0 || what >= ANYBIT_ENCODERS) return 0;
  anybit_parallel(count, grain, threads, current->encode[what], job);
  return 1;
}
