// One byte a code <-> the canonical stream: code j is bits [j * bits, (j + 1) * bits) of its row, lowest first.
#ifndef ANYBIT_ENCODE_PACKING_H
#define ANYBIT_ENCODE_PACKING_H

#include "encode.h"
#include "lanes.h"

namespace {

// Eight bytes <-> the low 8 * BITS bits of a word.
template <int BITS> inline uint64_t squeezed(uint64_t bytes) {
#ifdef __BMI2__
  return _pext_u64(bytes, 0x0101010101010101ull * ((1u << BITS) - 1));
#else
  // neighbours are pushed together, twice as many each time
  bytes &= 0x0101010101010101ull * ((1u << BITS) - 1);
  bytes = (bytes & 0x00FF00FF00FF00FFull) | (bytes & 0xFF00FF00FF00FF00ull) >> (8 - BITS);
  bytes = (bytes & 0x0000FFFF0000FFFFull) | (bytes & 0xFFFF0000FFFF0000ull) >> (16 - 2 * BITS);
  return (bytes & 0x00000000FFFFFFFFull) | bytes >> 32 << (4 * BITS);
#endif
}

template <int BITS> inline uint64_t spread(uint64_t stream) {
#ifdef __BMI2__
  return _pdep_u64(stream, 0x0101010101010101ull * ((1u << BITS) - 1));
#else
  constexpr uint64_t four = (1ull << 4 * BITS) - 1, two = (1ull << 2 * BITS) - 1, one = (1ull << BITS) - 1;
  stream = (stream & four) | (stream >> (4 * BITS) & four) << 32;
  stream = (stream & (two | two << 32)) | (stream >> (2 * BITS) & (two | two << 32)) << 16;
  constexpr uint64_t all = 0x0001000100010001ull * one;
  return (stream & all) | (stream >> BITS & all) << 8;
#endif
}

// The first N bytes at p, and back; no detour over memory that is written and read in pieces.
template <int N> inline uint64_t few_bytes(const uint8_t* p) {
  if (N == 3 || N == 5 || N == 6 || N == 7) {
    constexpr int head = N == 3 ? 2 : 4, rest = N - head > 0 ? N - head : 1;
    return few_bytes<head>(p) | few_bytes<rest>(p + head) << (8 * head);
  }
  uint8_t one;
  uint16_t two;
  uint32_t four;
  uint64_t eight;
  switch (N) {
    case 1: return memcpy(&one, p, 1), one;
    case 2: return memcpy(&two, p, 2), two;
    case 4: return memcpy(&four, p, 4), four;
    default: return memcpy(&eight, p, 8), eight;
  }
}
template <int N> inline void put_bytes(uint64_t word, uint8_t* p) {
  if (N == 3 || N == 5 || N == 6 || N == 7) {
    constexpr int head = N == 3 ? 2 : 4, rest = N - head > 0 ? N - head : 1;
    put_bytes<head>(word, p);
    put_bytes<rest>(word >> (8 * head), p + head);
    return;
  }
  const uint8_t one = (uint8_t)word;
  const uint16_t two = (uint16_t)word;
  const uint32_t four = (uint32_t)word;
  switch (N) {
    case 1: memcpy(p, &one, 1); return;
    case 2: memcpy(p, &two, 2); return;
    case 4: memcpy(p, &four, 4); return;
    default: memcpy(p, &word, 8);
  }
}

template <int BITS> inline void pack_row(const uint8_t* codes, int64_t count, uint8_t* to) {
  if (BITS == 8) {
    memcpy(to, codes, (size_t)count);
    return;
  }
  int64_t i = 0;
  uint64_t bytes, stream;
  for (; i + 8 <= count; i += 8, to += BITS) {
    memcpy(&bytes, codes + i, 8);
    put_bytes<BITS>(squeezed<BITS>(bytes), to);
  }
  if (i < count) {
    bytes = 0;
    memcpy(&bytes, codes + i, (size_t)(count - i));
    stream = squeezed<BITS>(bytes);
    memcpy(to, &stream, (size_t)(((count - i) * BITS + 7) / 8));
  }
}

// Codes skip .. skip + count of the stream at `from`; skip is below 8.
template <int BITS> inline void unpack_row(const uint8_t* from, int64_t skip, int64_t count, uint8_t* codes) {
  if (BITS == 8) {
    memcpy(codes, from + skip, (size_t)count);
    return;
  }
  const int64_t bytes = ((skip + count) * BITS + 7) / 8;
  for (int64_t done = -skip, at = 0; done < count; done += 8, at += BITS) {
    uint64_t stream = 0;
    const int64_t left = bytes - at;
    if (left >= BITS) stream = few_bytes<BITS>(from + at);
    else memcpy(&stream, from + at, (size_t)left);
    stream = spread<BITS>(stream);
    if (done >= 0 && done + 8 <= count) {
      memcpy(codes + done, &stream, 8);
      continue;
    }
    for (int64_t j = 0; j < 8; j++)
      if (done + j >= 0 && done + j < count) codes[done + j] = (uint8_t)(stream >> (8 * j));
  }
}

inline void pack_codes(int64_t bits, const uint8_t* codes, int64_t count, uint8_t* to) {
  switch (bits) {
    case 1: return pack_row<1>(codes, count, to);
    case 2: return pack_row<2>(codes, count, to);
    case 3: return pack_row<3>(codes, count, to);
    case 4: return pack_row<4>(codes, count, to);
    case 5: return pack_row<5>(codes, count, to);
    case 6: return pack_row<6>(codes, count, to);
    case 7: return pack_row<7>(codes, count, to);
    default: return pack_row<8>(codes, count, to);
  }
}

inline void unpack_codes(int64_t bits, const uint8_t* from, int64_t skip, int64_t count, uint8_t* codes) {
  switch (bits) {
    case 1: return unpack_row<1>(from, skip, count, codes);
    case 2: return unpack_row<2>(from, skip, count, codes);
    case 3: return unpack_row<3>(from, skip, count, codes);
    case 4: return unpack_row<4>(from, skip, count, codes);
    case 5: return unpack_row<5>(from, skip, count, codes);
    case 6: return unpack_row<6>(from, skip, count, codes);
    case 7: return unpack_row<7>(from, skip, count, codes);
    default: return unpack_row<8>(from, skip, count, codes);
  }
}

void encode_pack(void* data, int64_t first, int64_t last) {
  const anybit_packing* job = static_cast<const anybit_packing*>(data);
  for (int64_t row = first; row < last; row++)
    pack_codes(job->bits, job->from + row * job->from_stride, job->columns, job->to + row * job->to_stride);
}

void encode_unpack(void* data, int64_t first, int64_t last) {
  const anybit_packing* job = static_cast<const anybit_packing*>(data);
  for (int64_t row = first; row < last; row++)
    unpack_codes(job->bits, job->from + row * job->from_stride + job->start / 8 * job->bits, job->start % 8, job->columns,
                 job->to + row * job->to_stride);
}

}  // namespace

#endif
