// Rows of numbers as float32, a tile at a time: converted and rounded once, in the first-level cache.
#ifndef ANYBIT_ENCODE_SOURCE_H
#define ANYBIT_ENCODE_SOURCE_H

#include "encode.h"
#include "lanes.h"

namespace {

constexpr int64_t TILE = 2048;  // numbers; a multiple of every block and of LANES * 32

inline F source_load(const void* data, int64_t kind, int64_t at) {
  if (kind == ANYBIT_F32) return f_load((const float*)data + at);
  Halves raw;
  memcpy(&raw, (const uint16_t*)data + at, sizeof raw);
  return kind == ANYBIT_BF16 ? float_of(i_shift_left(widened(raw), 16)) : f_of_f16(raw);
}

template <int KIND> inline void converted(const void* data, int64_t at, int64_t count, const int64_t* casts, float* out) {
  int64_t i = 0;
  if (casts[0] < 0) {
    for (; i + LANES <= count; i += LANES) f_store(out + i, source_load(data, KIND, at + i));
  } else {
    for (; i + LANES <= count; i += LANES)
      f_store(out + i, rounded(rounded(source_load(data, KIND, at + i), casts[0]), casts[1]));
  }
  if (i < count) {
    uint32_t rest[LANES] = {0};
    const int64_t bytes = KIND == ANYBIT_F32 ? 4 : 2;
    memcpy(rest, (const char*)data + (at + i) * bytes, (size_t)((count - i) * bytes));
    float last[LANES];
    f_store(last, rounded(rounded(source_load(rest, KIND, 0), casts[0]), casts[1]));
    memcpy(out + i, last, (size_t)(count - i) * sizeof(float));
  }
}

// Numbers first .. first + count of a row; `count` is at most TILE.
inline void take(const anybit_source* source, int64_t row, int64_t first, int64_t count, float* out) {
  const int64_t at = row * source->stride + first;
  switch (source->kind) {
    case ANYBIT_BF16: return converted<ANYBIT_BF16>(source->data, at, count, source->casts, out);
    case ANYBIT_F16: return converted<ANYBIT_F16>(source->data, at, count, source->casts, out);
    default: return converted<ANYBIT_F32>(source->data, at, count, source->casts, out);
  }
}

}  // namespace

#endif
