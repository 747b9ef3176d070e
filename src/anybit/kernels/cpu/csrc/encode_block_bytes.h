// The bytes inside GGUF's blocks <-> fields in canonical packing, block by block: the pictures are in methods/_gguf_blocks.py.
// Codes are handled eight at a time, a byte each, in words.
#ifndef ANYBIT_ENCODE_BLOCK_BYTES_H
#define ANYBIT_ENCODE_BLOCK_BYTES_H

#include "encode.h"
#include "encode_packing.h"

namespace {

// Numbers and bytes of one block, and bytes of each of its fields.
struct BlockShape {
  int elements, bytes, q, sc, mn, d, m, fours;
};
constexpr BlockShape BLOCK_SHAPES[] = {
    {32, 18, 16, 0, 0, 2, 0, 0},       // Q4_0
    {32, 20, 16, 0, 0, 2, 2, 0},       // Q4_1
    {32, 22, 20, 0, 0, 2, 0, 0},       // Q5_0
    {32, 24, 20, 0, 0, 2, 2, 0},       // Q5_1
    {32, 34, 32, 0, 0, 2, 0, 0},       // Q8_0
    {256, 84, 64, 8, 8, 2, 2, 0},      // Q2_K
    {256, 110, 96, 12, 0, 2, 0, 0},    // Q3_K
    {256, 144, 128, 6, 6, 2, 2, 0},    // Q4_K
    {256, 176, 160, 6, 6, 2, 2, 0},    // Q5_K
    {256, 210, 192, 16, 0, 2, 0, 0},   // Q6_K
    {32, 18, 16, 0, 0, 2, 0, 0},       // IQ4_NL
    {256, 136, 128, 6, 0, 2, 0, 0},    // IQ4_XS
    {32, 17, 16, 0, 0, 1, 0, 0},       // MXFP4
    {256, 54, 48, 0, 0, 2, 0, 4},      // TQ1_0
    {256, 66, 64, 0, 0, 2, 0, 0},      // TQ2_0
};

// One block's fields, or the places they go to.
struct Block {
  uint8_t *q, *sc, *mn, *d, *m, *fours;
};

constexpr uint64_t ONES = 0x0101010101010101ull, THREES = 3 * ONES, LOW = 15 * ONES;

inline uint64_t word_at(const uint8_t* p) {
  uint64_t word;
  memcpy(&word, p, 8);
  return word;
}
inline void put_word(uint8_t* p, uint64_t word) { memcpy(p, &word, 8); }

// `count` words of eight codes, one a byte <-> their stream
template <int BITS> inline void codes_in(const uint8_t* stream, int count, uint8_t flip, uint64_t* words) {
  for (int i = 0; i < count; i++) words[i] = spread<BITS>(few_bytes<BITS>(stream + i * BITS)) ^ flip * ONES;
}
template <int BITS> inline void codes_out(const uint64_t* words, int count, uint8_t flip, uint8_t* stream) {
  for (int i = 0; i < count; i++) put_bytes<BITS>(squeezed<BITS>(words[i] ^ flip * ONES), stream + i * BITS);
}

// Four bytes each, one of `even`, one of `odd` ..., and the bytes at even places of a word.
inline uint64_t alternating(uint32_t even, uint32_t odd) {
#ifdef __BMI2__
  return _pdep_u64(even, 0x00FF00FF00FF00FFull) | _pdep_u64(odd, 0xFF00FF00FF00FF00ull);
#else
  uint64_t one = even, two = odd;
  one = (one | one << 16) & 0x0000FFFF0000FFFFull, two = (two | two << 16) & 0x0000FFFF0000FFFFull;
  one = (one | one << 8) & 0x00FF00FF00FF00FFull, two = (two | two << 8) & 0x00FF00FF00FF00FFull;
  return one | two << 8;
#endif
}
inline uint64_t every_other(uint64_t word) {
#ifdef __BMI2__
  return _pext_u64(word, 0x00FF00FF00FF00FFull);
#else
  word &= 0x00FF00FF00FF00FFull;
  word = (word | word >> 8) & 0x0000FFFF0000FFFFull;
  return (word | word >> 16) & 0xFFFFFFFFull;
#endif
}

// 2 n nibbles in order <-> n bytes: lo = element j, hi = element n + j
inline void into_halves(const uint8_t* nibbles, int n, uint8_t flip, uint8_t* out) {
  for (int j = 0; j < n / 2; j += 8) {
    const uint64_t low = word_at(nibbles + j) ^ flip * ONES, high = word_at(nibbles + n / 2 + j) ^ flip * ONES;
    const uint64_t even = (low & LOW) | (high & LOW) << 4, odd = (low >> 4 & LOW) | (high & ~LOW);
    put_word(out + 2 * j, alternating((uint32_t)even, (uint32_t)odd));
    put_word(out + 2 * j + 8, alternating((uint32_t)(even >> 32), (uint32_t)(odd >> 32)));
  }
}
inline void from_halves(const uint8_t* halves, int n, uint8_t flip, uint8_t* out) {
  for (int j = 0; j < n / 2; j += 8) {
    const uint64_t one = word_at(halves + 2 * j), two = word_at(halves + 2 * j + 8);
    const uint64_t even = every_other(one) | every_other(two) << 32;
    const uint64_t odd = every_other(one >> 8) | every_other(two >> 8) << 32;
    put_word(out + j, ((even & LOW) | (odd & LOW) << 4) ^ flip * ONES);
    put_word(out + n / 2 + j, ((even >> 4 & LOW) | (odd & ~LOW)) ^ flip * ONES);
  }
}

// Two bits of 256 codes, from bit `place` on: e = 128 h + 32 s + l is bits 2 s of byte 32 h + l.
inline void into_quarters(const uint64_t* words, int place, uint8_t* out) {
  for (int h = 0; h < 2; h++)
    for (int k = 0; k < 4; k++) {
      uint64_t found = 0;
      for (int s = 0; s < 4; s++) found |= (words[16 * h + 4 * s + k] >> place & THREES) << (2 * s);
      put_word(out + 32 * h + 8 * k, found);
    }
}
inline void from_quarters(const uint8_t* bytes, int place, uint64_t* words) {
  for (int h = 0; h < 2; h++)
    for (int k = 0; k < 4; k++) {
      const uint64_t found = word_at(bytes + 32 * h + 8 * k);
      for (int s = 0; s < 4; s++) words[16 * h + 4 * s + k] |= (found >> (2 * s) & THREES) << place;
    }
}
// Bit `place` of 256 codes: e is bit e / 32 of byte e % 32.
inline void into_bits(const uint64_t* words, int place, uint8_t* out) {
  for (int k = 0; k < 4; k++) {
    uint64_t found = 0;
    for (int s = 0; s < 8; s++) found |= (words[4 * s + k] >> place & ONES) << s;
    put_word(out + 8 * k, found);
  }
}
inline void from_bits(const uint8_t* bytes, int place, uint64_t* words) {
  for (int k = 0; k < 4; k++) {
    const uint64_t found = word_at(bytes + 8 * k);
    for (int s = 0; s < 8; s++) words[4 * s + k] |= (found >> s & ONES) << place;
  }
}
// Low nibbles of 256 codes: of 2 n codes the first n in lo, the others in hi.
inline void into_nibbles(const uint64_t* words, int n, uint8_t* out) {
  for (int part = 0; part < 128 / n; part++)
    for (int k = 0; k < n / 8; k++) {
      const uint64_t* own = words + part * n / 4 + k;
      put_word(out + n * part + 8 * k, (own[0] & LOW) | (own[n / 8] & LOW) << 4);
    }
}
inline void from_nibbles(const uint8_t* bytes, int n, uint64_t* words) {
  for (int part = 0; part < 128 / n; part++)
    for (int k = 0; k < n / 8; k++) {
      const uint64_t found = word_at(bytes + n * part + 8 * k);
      words[part * n / 4 + k] |= found & LOW;
      words[part * n / 4 + n / 8 + k] |= found >> 4 & LOW;
    }
}

inline void into_six_bit_pairs(const Block& f, uint8_t* b) {
  uint64_t scales, minimums;
  codes_in<6>(f.sc, 1, 0, &scales);
  codes_in<6>(f.mn, 1, 0, &minimums);
  const uint64_t tops = 0x30303030ull;  // bits 4 and 5 of the last four go to the top of the first four
  const uint64_t first = (scales & 0xFFFFFFFF) | (scales >> 32 & tops) << 2;
  const uint64_t second = (minimums & 0xFFFFFFFF) | (minimums >> 32 & tops) << 2;
  const uint64_t third = (scales >> 32 & LOW) | (minimums >> 32 & LOW) << 4;
  put_word(b, first | second << 32);
  memcpy(b + 8, &third, 4);
}
inline void from_six_bit_pairs(const uint8_t* b, const Block& f) {
  const uint64_t both = word_at(b), sixes = 63 * ONES, tops = 0xC0C0C0C0ull;
  uint32_t third;
  memcpy(&third, b + 8, 4);
  const uint64_t scales = (both & sixes & 0xFFFFFFFF) | (uint64_t)((third & (uint32_t)LOW) | (both & tops) >> 2) << 32;
  const uint64_t minimums = (both >> 32 & sixes) | (uint64_t)((third >> 4 & (uint32_t)LOW) | (both >> 32 & tops) >> 2) << 32;
  codes_out<6>(&scales, 1, 0, f.sc);
  codes_out<6>(&minimums, 1, 0, f.mn);
}

// 32 codes of five bits: bit 4 apart, the rest in halves.
inline void into_five_bits(const uint8_t* field, uint8_t flip, uint8_t* high, uint8_t* halves) {
  uint64_t w[4];
  codes_in<5>(field, 4, flip, w);
  for (int k = 0; k < 4; k++) high[k] = (uint8_t)squeezed<1>(w[k] >> 4);
  put_word(halves, (w[0] & LOW) | (w[2] & LOW) << 4);
  put_word(halves + 8, (w[1] & LOW) | (w[3] & LOW) << 4);
}
inline void from_five_bits(const uint8_t* high, const uint8_t* halves, uint8_t flip, uint8_t* field) {
  const uint64_t one = word_at(halves), two = word_at(halves + 8);
  uint64_t w[4] = {one & LOW, two & LOW, one >> 4 & LOW, two >> 4 & LOW};
  for (int k = 0; k < 4; k++) w[k] |= spread<1>(high[k]) << 4;
  codes_out<5>(w, 4, flip, field);
}

template <int TYPE> inline void block_written(const Block& f, uint8_t* b) {
  uint64_t w[32] = {0}, s[2];
  switch (TYPE) {
    case ANYBIT_Q4_0:
    case ANYBIT_IQ4_NL:
      memcpy(b, f.d, 2);
      return into_halves(f.q, 16, TYPE == ANYBIT_Q4_0 ? 0x88 : 0, b + 2);
    case ANYBIT_Q4_1:
      memcpy(b, f.d, 2);
      memcpy(b + 2, f.m, 2);
      return into_halves(f.q, 16, 0, b + 4);
    case ANYBIT_Q5_0:
      memcpy(b, f.d, 2);
      return into_five_bits(f.q, 16, b + 2, b + 6);
    case ANYBIT_Q5_1:
      memcpy(b, f.d, 2);
      memcpy(b + 2, f.m, 2);
      return into_five_bits(f.q, 0, b + 4, b + 8);
    case ANYBIT_Q8_0:
      memcpy(b, f.d, 2);
      memcpy(b + 2, f.q, 32);
      return;
    case ANYBIT_MXFP4:
      b[0] = f.d[0];
      return into_halves(f.q, 16, 0, b + 1);
    case ANYBIT_Q2_K:
      codes_in<4>(f.sc, 2, 0, s);
      codes_in<4>(f.mn, 2, 0, w);
      put_word(b, s[0] | w[0] << 4);
      put_word(b + 8, s[1] | w[1] << 4);
      codes_in<2>(f.q, 32, 0, w);
      into_quarters(w, 0, b + 16);
      memcpy(b + 80, f.d, 2);
      memcpy(b + 82, f.m, 2);
      return;
    case ANYBIT_Q3_K: {
      codes_in<3>(f.q, 32, 4, w);
      into_bits(w, 2, b);
      into_quarters(w, 0, b + 32);
      codes_in<6>(f.sc, 2, 32, s);
      put_word(b + 96, (s[0] & LOW) | (s[1] & LOW) << 4);
      uint64_t tops = (s[0] >> 4 & THREES) | (s[1] >> 4 & THREES) << 4;  // of 0..3 and 8..11, then of 4..7 and 12..15
      tops |= tops >> 32 << 2;
      memcpy(b + 104, &tops, 4);
      memcpy(b + 108, f.d, 2);
      return;
    }
    case ANYBIT_Q4_K:
      memcpy(b, f.d, 2);
      memcpy(b + 2, f.m, 2);
      into_six_bit_pairs(f, b + 4);
      for (int part = 0; part < 4; part++) into_halves(f.q + 32 * part, 32, 0, b + 16 + 32 * part);
      return;
    case ANYBIT_Q5_K:
      memcpy(b, f.d, 2);
      memcpy(b + 2, f.m, 2);
      into_six_bit_pairs(f, b + 4);
      codes_in<5>(f.q, 32, 0, w);
      into_bits(w, 4, b + 16);
      into_nibbles(w, 32, b + 48);
      return;
    case ANYBIT_Q6_K:
      codes_in<6>(f.q, 32, 32, w);
      into_nibbles(w, 64, b);
      into_quarters(w, 4, b + 128);
      memcpy(b + 192, f.sc, 16);
      memcpy(b + 208, f.d, 2);
      return;
    case ANYBIT_IQ4_XS: {
      memcpy(b, f.d, 2);
      codes_in<6>(f.sc, 1, 32, s);
      const uint64_t high = squeezed<2>(s[0] >> 4), low = squeezed<4>(s[0]);
      memcpy(b + 2, &high, 2);
      memcpy(b + 4, &low, 4);
      for (int part = 0; part < 8; part++) into_halves(f.q + 16 * part, 16, 0, b + 8 + 16 * part);
      return;
    }
    case ANYBIT_TQ1_0:
      memcpy(b, f.q, 48);
      memcpy(b + 48, f.fours, 4);
      memcpy(b + 52, f.d, 2);
      return;
    default:
      codes_in<2>(f.q, 32, 0, w);
      into_quarters(w, 0, b);
      memcpy(b + 64, f.d, 2);
  }
}

template <int TYPE> inline void block_read(const uint8_t* b, const Block& f) {
  uint64_t w[32] = {0}, s[2] = {0};
  switch (TYPE) {
    case ANYBIT_Q4_0:
    case ANYBIT_IQ4_NL:
      memcpy(f.d, b, 2);
      return from_halves(b + 2, 16, TYPE == ANYBIT_Q4_0 ? 0x88 : 0, f.q);
    case ANYBIT_Q4_1:
      memcpy(f.d, b, 2);
      memcpy(f.m, b + 2, 2);
      return from_halves(b + 4, 16, 0, f.q);
    case ANYBIT_Q5_0:
      memcpy(f.d, b, 2);
      return from_five_bits(b + 2, b + 6, 16, f.q);
    case ANYBIT_Q5_1:
      memcpy(f.d, b, 2);
      memcpy(f.m, b + 2, 2);
      return from_five_bits(b + 4, b + 8, 0, f.q);
    case ANYBIT_Q8_0:
      memcpy(f.d, b, 2);
      memcpy(f.q, b + 2, 32);
      return;
    case ANYBIT_MXFP4:
      f.d[0] = b[0];
      return from_halves(b + 1, 16, 0, f.q);
    case ANYBIT_Q2_K:
      for (int k = 0; k < 2; k++) {
        const uint64_t both = word_at(b + 8 * k), low = both & LOW, high = both >> 4 & LOW;
        codes_out<4>(&low, 1, 0, f.sc + 4 * k);
        codes_out<4>(&high, 1, 0, f.mn + 4 * k);
      }
      from_quarters(b + 16, 0, w);
      codes_out<2>(w, 32, 0, f.q);
      memcpy(f.d, b + 80, 2);
      memcpy(f.m, b + 82, 2);
      return;
    case ANYBIT_Q3_K: {
      from_bits(b, 2, w);
      from_quarters(b + 32, 0, w);
      codes_out<3>(w, 32, 4, f.q);
      uint32_t tops;
      memcpy(&tops, b + 104, 4);
      const uint64_t low = word_at(b + 96), own = tops, sixth = own | own >> 2 << 32;
      s[0] = (low & LOW) | (sixth & THREES) << 4;
      s[1] = (low >> 4 & LOW) | (sixth >> 4 & THREES) << 4;
      codes_out<6>(s, 2, 32, f.sc);
      memcpy(f.d, b + 108, 2);
      return;
    }
    case ANYBIT_Q4_K:
      memcpy(f.d, b, 2);
      memcpy(f.m, b + 2, 2);
      from_six_bit_pairs(b + 4, f);
      for (int part = 0; part < 4; part++) from_halves(b + 16 + 32 * part, 32, 0, f.q + 32 * part);
      return;
    case ANYBIT_Q5_K:
      memcpy(f.d, b, 2);
      memcpy(f.m, b + 2, 2);
      from_six_bit_pairs(b + 4, f);
      from_bits(b + 16, 4, w);
      from_nibbles(b + 48, 32, w);
      codes_out<5>(w, 32, 0, f.q);
      return;
    case ANYBIT_Q6_K:
      from_nibbles(b, 64, w);
      from_quarters(b + 128, 4, w);
      codes_out<6>(w, 32, 32, f.q);
      memcpy(f.sc, b + 192, 16);
      memcpy(f.d, b + 208, 2);
      return;
    case ANYBIT_IQ4_XS: {
      uint64_t high = 0, low = 0;
      memcpy(f.d, b, 2);
      memcpy(&high, b + 2, 2);
      memcpy(&low, b + 4, 4);
      s[0] = spread<4>(low) | spread<2>(high) << 4;
      codes_out<6>(s, 1, 32, f.sc);
      for (int part = 0; part < 8; part++) from_halves(b + 8 + 16 * part, 16, 0, f.q + 16 * part);
      return;
    }
    case ANYBIT_TQ1_0:
      memcpy(f.q, b, 48);
      memcpy(f.fours, b + 48, 4);
      memcpy(f.d, b + 52, 2);
      return;
    default:
      from_quarters(b, 0, w);
      codes_out<2>(w, 32, 0, f.q);
      memcpy(f.d, b + 64, 2);
  }
}

template <int TYPE, bool INTO> void convert_blocks(const anybit_blocks* job, int64_t first, int64_t last) {
  constexpr BlockShape shape = BLOCK_SHAPES[TYPE];
  const anybit_fields& own = job->fields;
  for (int64_t i = first; i < last; i++) {
    const Block fields = {own.q + i * shape.q, own.sc + i * shape.sc, own.mn + i * shape.mn,
                          own.d + i * shape.d, own.m + i * shape.m,   own.fours + i * shape.fours};
    uint8_t* bytes = job->blocks + i * shape.bytes;
    if (INTO) block_written<TYPE>(fields, bytes);
    else block_read<TYPE>(bytes, fields);
  }
}

template <bool INTO> inline void convert_all(const anybit_blocks* job, int64_t first, int64_t last) {
  switch (job->type) {
#define ANYBIT_TYPE(name) case name: return convert_blocks<name, INTO>(job, first, last);
    ANYBIT_TYPE(ANYBIT_Q4_0) ANYBIT_TYPE(ANYBIT_Q4_1) ANYBIT_TYPE(ANYBIT_Q5_0) ANYBIT_TYPE(ANYBIT_Q5_1)
    ANYBIT_TYPE(ANYBIT_Q8_0) ANYBIT_TYPE(ANYBIT_Q2_K) ANYBIT_TYPE(ANYBIT_Q3_K) ANYBIT_TYPE(ANYBIT_Q4_K)
    ANYBIT_TYPE(ANYBIT_Q5_K) ANYBIT_TYPE(ANYBIT_Q6_K) ANYBIT_TYPE(ANYBIT_IQ4_NL) ANYBIT_TYPE(ANYBIT_IQ4_XS)
    ANYBIT_TYPE(ANYBIT_MXFP4) ANYBIT_TYPE(ANYBIT_TQ1_0) ANYBIT_TYPE(ANYBIT_TQ2_0)
#undef ANYBIT_TYPE
  }
}

void encode_into_blocks(void* data, int64_t first, int64_t last) {
  convert_all<true>(static_cast<const anybit_blocks*>(data), first, last);
}

void encode_from_blocks(void* data, int64_t first, int64_t last) {
  convert_all<false>(static_cast<const anybit_blocks*>(data), first, last);
}

}  // namespace

#endif
