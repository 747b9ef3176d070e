// What one instruction-set variant offers: an encoder is a task of anybit_parallel, its data the job.
#ifndef ANYBIT_ENCODE_VARIANT_H
#define ANYBIT_ENCODE_VARIANT_H

#include "encode.h"

struct Encoders {
  const char* name;
  void (*encode[ANYBIT_ENCODERS])(void* job, int64_t first, int64_t last);
};

extern const Encoders anybit_encoders_scalar;
extern const Encoders anybit_encoders_avx2;
extern const Encoders anybit_encoders_avx512;

// Called with the name of a level that runs here.
void anybit_use_encoders(const char* level);

#endif
