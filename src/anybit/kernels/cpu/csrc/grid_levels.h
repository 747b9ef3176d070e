// Codes of a grid -> its weights, in natural order, each operation of the format rounded as it says.
#ifndef ANYBIT_GRID_LEVELS_H
#define ANYBIT_GRID_LEVELS_H

#include "grid_common.h"

namespace {

enum Source { BYTES_SIGNED = 8, BYTES_UNSIGNED = 9, BYTES_E4M3 = 10, BYTES_E5M2 = 11, TABLE_5 = 12, TABLE_6 = 13,
              TABLE_7 = 14, TABLE_8 = 15 };  // 1 .. 7: integers and small tables of that width

struct Levels {
  Lut lut;             // up to 4 bits: the numbers, repeated so that bits above the code do not matter
  const float* table;  // 5 .. 8 bits with a table
  bool is_signed;
  alignas(64) float numbers[16];  // what is in `lut`
  uint16_t halves[32];            // the same as bfloat16, twice
  uint8_t bytes[16];              // the same over `unit`, plus `lift`
  float unit, lift;
};

template <int SOURCE> static constexpr int bits_of_source() {
  return SOURCE < 8 ? SOURCE : SOURCE < 12 ? 8 : SOURCE - 7;
}

// Numbers of LANES codes from the byte p on; unsigned codes are centred.
template <int SOURCE> static inline F levels_at(const Levels& levels, const uint8_t* p) {
  constexpr int BITS = bits_of_source<SOURCE>();
  constexpr uint32_t MASK = (1u << BITS) - 1, HALF = 1u << (BITS - 1);
  uint32_t mask[LANES];
  if constexpr (SOURCE <= 4) return lut_take(levels.lut, codes_load<BITS>(p));
  if constexpr (SOURCE == BYTES_SIGNED) return f_load_i8(p);
  if constexpr (SOURCE == BYTES_UNSIGNED) return f_sub(f_load_u8(p), f_set(128.0f));
  if constexpr (SOURCE == BYTES_E4M3) return f_load_e4m3(p);
  if constexpr (SOURCE == BYTES_E5M2) return f_load_e5m2(p);
  for (int i = 0; i < LANES; i++) mask[i] = MASK;
  I codes = i_and(codes_load<BITS>(p), i_load(mask));
  if constexpr (SOURCE >= TABLE_5) return f_gather(levels.table, codes);
  // two's complement: flipping the top bit turns a signed code into the centred unsigned one
  if (levels.is_signed) codes = i_xor(codes, HALF);
  return f_sub(f_of_integers(codes), f_set((float)HALF));
}

static inline int source_of(const anybit_shape* s) {
  if (s->levels == ANYBIT_E4M3) return BYTES_E4M3;
  if (s->levels == ANYBIT_E5M2) return BYTES_E5M2;
  if (s->bits <= 4) return (int)s->bits;
  if (s->levels == ANYBIT_TABLE) return (int)s->bits + 7;
  if (s->bits < 8) return (int)s->bits;
  return s->levels == ANYBIT_SIGNED ? BYTES_SIGNED : BYTES_UNSIGNED;
}

static inline float size_of(float a) { return a < 0 ? -a : a; }

// The smallest number of a table, if all of 16 are that times a whole number up to 127 (E2M1, IQ4_NL); else 0.
static inline float step_of_table(const float* table) {
  float largest = 0, smallest = 0;
  for (int i = 0; i < 16; i++) {
    const float size = size_of(table[i]);
    if (size > largest) largest = size;
    if (size > 0 && (smallest == 0 || size < smallest)) smallest = size;
  }
  if (smallest == 0 || !(largest <= 127 * smallest)) return 0;
  for (int i = 0; i < 16; i++) {
    const float steps = (float)(int)(table[i] / smallest);
    if (steps * smallest != table[i]) return 0;
  }
  return smallest;
}

// A table in steps of `unit`: exactly if it has such steps, else rounded to 8 bits.
static inline void bytes_of_table(Levels* levels) {
  float largest = 0;
  for (int i = 0; i < 16; i++) largest = size_of(levels->numbers[i]) > largest ? size_of(levels->numbers[i]) : largest;
  const float step = step_of_table(levels->numbers);
  levels->unit = step > 0 ? step : largest > 0 ? largest / 127.0f : 1.0f;
  int bytes[16], lowest = 0;
  for (int i = 0; i < 16; i++) {
    const float steps = levels->numbers[i] / levels->unit;
    bytes[i] = steps >= -127 && steps <= 127 ? (int)(steps + (steps < 0 ? -0.5f : 0.5f)) : 0;  // else no number
    lowest = bytes[i] < lowest ? bytes[i] : lowest;
  }
  for (int i = 0; i < 16; i++) levels->bytes[i] = (uint8_t)(bytes[i] - lowest);
  levels->lift = (float)-lowest;
}

static inline Levels read_levels(const anybit_shape* s, const anybit_tensors* t) {
  Levels found = {{}, t->table, s->levels == ANYBIT_SIGNED, {0}, {0}, {0}, 1.0f, 0.0f};
  float* numbers = found.numbers;
  if (s->bits <= 4) {
    int count = 1 << s->bits, half = count / 2;
    for (int code = 0; code < 16; code++) {
      int own = code % count;
      numbers[code] = s->levels == ANYBIT_TABLE    ? t->table[own]
                      : s->levels == ANYBIT_SIGNED ? (float)(own < half ? own : own - count)
                                                   : (float)(own - half);
    }
  }
  found.lut = lut_load(numbers);
  for (int i = 0; i < 32; i++) found.halves[i] = bf16_of_float(numbers[i % 16]);
  if (s->levels == ANYBIT_TABLE && s->bits == 4) bytes_of_table(&found);
  return found;
}

// Bytes of a row from `column` on, at least 16 readable ones; copied to `spare` at the end of the tensor.
static inline const uint8_t* readable(const anybit_shape* s, const anybit_tensors* t, int64_t row, int64_t column,
                                      uint8_t* spare) {
  const uint8_t* p = t->codes + row * s->row_bytes + column * s->bits / 8;
  const uint8_t* end = t->codes + s->rows * s->row_bytes;
  if (p + 16 <= end) return p;
  memset(spare, 0, 16);
  memcpy(spare, p, (size_t)(end - p));
  return spare;
}

// `bytes` (at most 16) of a row from `column` on; zeros beyond the end of the row.
static NOINLINE void copy_codes(const anybit_shape* s, const anybit_tensors* t, int64_t row, int64_t column, int64_t bytes,
                                uint8_t* spare) {
  const int64_t at = column * s->bits / 8;
  memset(spare, 0, 16);
  memcpy(spare, t->codes + row * s->row_bytes + at, (size_t)least(bytes, s->row_bytes - at));
}

// Centred levels of columns start .. stop of a row; `start` is a multiple of LANES. Lanes beyond `stop` hold anything.
template <int SOURCE>
static void level_block(const anybit_shape* s, const anybit_tensors* t, const Levels& levels, int64_t row, int64_t start,
                        int64_t stop, float* out) {
  uint8_t spare[16];
  for (int64_t column = start; column < stop; column += LANES)
    f_store(out + column - start, levels_at<SOURCE>(levels, readable(s, t, row, column, spare)));
}

// Up to 4 bits, groups of whole vectors: a group has few different weights, so they are worked out once and looked up.
template <int BITS, int ROUND>
static void table_block(const anybit_shape* s, const anybit_tensors* t, const Levels& levels, int64_t row, int64_t start,
                        int64_t stop, float* out) {
  BlockParameters q;
  read_block<ROUND>(s, t, row, start, stop, &q);
  const F middle = f_set(centre(s));
  uint8_t spare[16];
  for (int64_t g = 0; start < stop; g++) {
    const int64_t end = s->group >= s->columns ? stop : least(stop, (q.first + g + 1) * s->group);
    float numbers[16];
    for (int i = 0; i < 16; i += LANES)
      f_store(numbers + i, weigh<ROUND>(q, f_load(levels.numbers + i), middle, f_set(q.zero[g]), f_set(q.scale[g]),
                                        f_set(q.offset[g])));
    const Lut lut = lut_load(numbers);
    for (; start < end; start += LANES, out += LANES)
      f_store(out, lut_take(lut, codes_load<BITS>(readable(s, t, row, start, spare))));
  }
}

typedef void (*LevelBlock)(const anybit_shape*, const anybit_tensors*, const Levels&, int64_t, int64_t, int64_t, float*);
typedef void (*WeighBlock)(const anybit_shape*, const anybit_tensors*, int64_t, int64_t, int64_t, float*);
static const LevelBlock LEVEL_BLOCKS[16] = {
    nullptr,          level_block<1>,  level_block<2>,  level_block<3>,  level_block<4>,  level_block<5>,
    level_block<6>,   level_block<7>,  level_block<8>,  level_block<9>,  level_block<10>, level_block<11>,
    level_block<12>,  level_block<13>, level_block<14>, level_block<15>};
template <int BITS> struct TableBlocks {
  static constexpr LevelBlock by_rounding[3] = {table_block<BITS, 0>, table_block<BITS, 1>, table_block<BITS, 2>};
};
static const LevelBlock* const TABLE_BLOCKS[5] = {nullptr, TableBlocks<1>::by_rounding, TableBlocks<2>::by_rounding,
                                                  TableBlocks<3>::by_rounding, TableBlocks<4>::by_rounding};
static const WeighBlock WEIGH_BLOCKS[3] = {weigh_block<0>, weigh_block<1>, weigh_block<2>};

}  // namespace

#include "grid_halves.h"

namespace {

// Weights of columns start .. stop, `out` with room for BLOCK floats; zeros up to the next multiple of LANES.
static void weights_of(const anybit_shape* s, const anybit_tensors* t, const Levels& levels, int64_t row, int64_t start,
                       int64_t stop, float* out) {
#ifdef ANYBIT_VBMI
  if (has_half_tables(s)) {
    (s->bits == 2 ? half_block<2> : half_block<3>)(s, t, row, start, stop, out);
  } else
#endif
  if (s->bits <= 4 && wide_group(s, LANES)) {
    TABLE_BLOCKS[s->bits][s->compute](s, t, levels, row, start, stop, out);
  } else {
    LEVEL_BLOCKS[source_of(s)](s, t, levels, row, start, stop, out);
    WEIGH_BLOCKS[s->compute](s, t, row, start, stop, out);
  }
  for (int64_t i = stop - start; i % LANES; i++) out[i] = 0;  // what was there may not even be a number
}

#ifdef ANYBIT_DOTS
// Weights of up to four bits as pairs of bfloat16, where the format rounds (else see grid_turned.h): those of a group are rounded
// once and looked up in pairs.
//
//   32 bits   low half: code 2 i, anything above   high half: code 2 i + 1, anything above     entries are repeated
template <int BITS, int ROUND>
static void pair_block(const anybit_shape* s, const anybit_tensors* t, const Levels& levels, int64_t row, int64_t start,
                       int64_t stop, uint32_t* out) {
  BlockParameters q;
  read_block<ROUND>(s, t, row, start, stop, &q);
  const F middle = f_set(centre(s)), numbers = f_load(levels.numbers);
  uint8_t spare[16];
  for (int64_t g = 0; start < stop; g++) {
    const int64_t end = s->group >= s->columns ? stop : least(stop, (q.first + g + 1) * s->group);
    const F weights = weigh<ROUND>(q, numbers, middle, f_set(q.zero[g]), f_set(q.scale[g]), f_set(q.offset[g]));
    const I table = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(weights));
    for (; start < end; start += 2 * LANES, out += LANES) {
      const I codes = codes_load<2 * BITS>(readable(s, t, row, start, spare));
      _mm512_storeu_si512(out, _mm512_permutexvar_epi16(i_or(codes, i_left<16 - BITS>(codes)), table));
    }
  }
}

typedef void (*PairBlock)(const anybit_shape*, const anybit_tensors*, const Levels&, int64_t, int64_t, int64_t, uint32_t*);
template <int BITS> struct PairBlocks {
  static constexpr PairBlock by_rounding[3] = {nullptr, pair_block<BITS, 1>, pair_block<BITS, 2>};
};
static const PairBlock* const PAIR_BLOCKS[5] = {nullptr, PairBlocks<1>::by_rounding, PairBlocks<2>::by_rounding,
                                                PairBlocks<3>::by_rounding, PairBlocks<4>::by_rounding};

// Weights of columns start .. stop as words of two bfloat16, whole vectors of them, if they can be had without being floats first.
static bool pairs_of(const anybit_shape* s, const anybit_tensors* t, const Levels& levels, int64_t row, int64_t start,
                     int64_t stop, uint32_t* out) {
  if (s->bits > 4 || !wide_group(s, 2 * LANES) || (stop - start) % 2) return false;
  PAIR_BLOCKS[s->bits][s->compute](s, t, levels, row, start, stop, out);
  return true;
}
#endif

}  // namespace

#endif
