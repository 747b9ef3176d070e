// x as whole numbers: products of codes and x in bytes, summed exactly in 32 bits.
//
// Every 32 columns of x share a step, and each x is a whole number of steps, written as signed bytes (limbs):
//
//   x = step * (limb[0] + 256 * limb[1] + 65536 * limb[2])
//
//   three limbs   step is the power of two with 1.0079 * largest in [2**22, 2**23) steps. x is off by half a step at most, that
//                 is by 1.01 * 2**-23 of the largest of its block, and not at all if it has no digits below a step (a bfloat16
//                 within 2**-14 of the largest). The sums of a lane are exact and rounded to float32 once, where float
//                 arithmetic rounds every sum of two numbers by up to 2**-24 of it: float32's own accuracy, so this is `exact`.
//   one limb      step is the largest over 127, as llama.cpp does it: `fast`.
//
// Where 2**-126 is too large a step (numbers below 2**-104 alone) x is off by 2**-127. A block with an infinity is no number.
//
// A chunk is PER_LANE * LANES columns; a code is an unsigned byte, `lift` above its level. What x is kept as, for each chunk:
//
//   limbs   [PARTS][LIMBS][4 * LANES] bytes: byte b of part v belongs to column PARTS * b + v, as a byte of packed codes does
//   bias    [LANES] int32: minus lift times the sum of a lane's x, in steps; split like the sums (split_sums) twice of them
//   step    [LANES] floats, of each lane
#ifndef ANYBIT_GRID_LIMBS_H
#define ANYBIT_GRID_LIMBS_H

#include "grid_levels.h"

namespace {

static constexpr int64_t STEP_BLOCK = 32;  // columns of x that share a step

// Codes in a byte as it is packed; three bits are taken two at a time.
static constexpr int parts_of(int64_t bits) { return bits == 3 ? 2 : bits > 4 ? 1 : 8 / (int)bits; }

// Whether the largest level times the x of a lane might not fit into 32 bits, with three limbs: |level| * PER_LANE * 2**23.
static constexpr bool split_sums(int64_t bits, bool table, int limbs) { return limbs == 3 && (bits == 8 || table); }

static constexpr int64_t limb_chunk_bytes(int64_t bits, bool table, int limbs) {
  return (parts_of(bits) * limbs + 2 + split_sums(bits, table, limbs)) * 4 * LANES;
}
static int64_t limb_columns(const anybit_shape* s) { return ceil_div(s->columns, 32 * LANES) * 32 * LANES; }

// Floats of a row of x: its values, then the chunks.
static int64_t limb_size(const anybit_shape* s, int limbs) {
  const int64_t own = 4 * parts_of(s->bits) * LANES;
  return limb_columns(s) + limb_columns(s) / own * limb_chunk_bytes(s->bits, s->levels == ANYBIT_TABLE, limbs) / 4;
}

// Each lane's columns are of one group.
static bool limbs_fit(const anybit_shape* s) { return wide_group(s, 4 * parts_of(s->bits)); }

template <int WIDTH, bool TABLE, int LIMBS> struct ByLimbs {
  static constexpr int BITS = WIDTH, PARTS = parts_of(WIDTH);
  static constexpr bool SPLIT = split_sums(WIDTH, TABLE, LIMBS);
  static constexpr int64_t PER_LANE = 4 * PARTS, CHUNK_BYTES = limb_chunk_bytes(WIDTH, TABLE, LIMBS), VECTOR = 4 * LANES;
  struct Table {
    decltype(b_table(nullptr)) numbers;
    I flip;  // makes signed codes unsigned
  };
  static Table table(const Levels& levels) {
    return {b_table(levels.bytes), i_set(levels.is_signed ? 0x01010101u << (BITS - 1) : 0)};
  }
  static Unit unit(const anybit_shape*, const Levels& levels) { return {0.0f, TABLE ? levels.unit : 1.0f}; }
  static const char* x(const anybit_shape* s, const float* values) { return (const char*)(values + limb_columns(s)); }

  static ALWAYS_INLINE I chunk(const uint8_t* p) {
    if constexpr (BITS == 3) return quads_load<6>(p);
    else if constexpr (BITS > 4) return quads_load<BITS>(p);
    else return i_load((const uint32_t*)p);
  }
  static ALWAYS_INLINE I bytes_of(const Table& table, I raw) {
    const I mask = i_set(0x01010101u * ((1u << BITS) - 1));
    if constexpr (TABLE) return b_take(table.numbers, i_and(raw, mask));
    else return i_field(raw, mask, table.flip);
  }
  static ALWAYS_INLINE I dot(I sum, I bytes, I x) { return BITS == 8 || TABLE ? i_dot8(sum, bytes, x) : i_dot7(sum, bytes, x); }

  template <int V, int R, int B>
  static ALWAYS_INLINE void part(const Table& table, const I* raw, const char* x, int64_t stride, I (*sum)[B][LIMBS]) {
    I own[B][LIMBS];
    UNROLLED for (int b = 0; b < B; b++)
      UNROLLED for (int k = 0; k < LIMBS; k++) own[b][k] = i_load((const uint32_t*)(x + b * stride + (V * LIMBS + k) * VECTOR));
    UNROLLED for (int r = 0; r < R; r++) {
      const I bytes = bytes_of(table, V == 0 ? raw[r] : i_right<V * BITS>(raw[r]));
      UNROLLED for (int b = 0; b < B; b++)
        UNROLLED for (int k = 0; k < LIMBS; k++) sum[r][b][k] = dot(sum[r][b][k], bytes, own[b][k]);
    }
    if constexpr (V + 1 < PARTS) part<V + 1, R, B>(table, raw, x, stride, sum);
  }

  template <int R, int B>
  static ALWAYS_INLINE void steps(const Table& table, const uint8_t* p, int64_t pitch, const char* x, int64_t stride, F (*acc)[B]) {
    constexpr int64_t BIAS = PARTS * LIMBS * VECTOR;
    I raw[R], sum[R][B][LIMBS];
    UNROLLED for (int r = 0; r < R; r++) {
      raw[r] = chunk(p + r * pitch);
      UNROLLED for (int b = 0; b < B; b++)
        UNROLLED for (int k = 0; k < LIMBS; k++)
          sum[r][b][k] = k <= SPLIT ? i_load((const uint32_t*)(x + b * stride + BIAS + k * VECTOR)) : i_zero();
    }
    part<0, R, B>(table, raw, x, stride, sum);
    UNROLLED for (int b = 0; b < B; b++) {
      const F step = f_load((const float*)(x + b * stride + BIAS + (1 + SPLIT) * VECTOR));
      UNROLLED for (int r = 0; r < R; r++) {
        const I* own = sum[r][b];
        F found;
        if constexpr (LIMBS == 1) {
          found = f_of_integers(own[0]);
        } else {
          const I high = i_add(own[1], i_left<8>(own[2]));
          if constexpr (SPLIT) found = f_fma(f_of_integers(high), f_set(256.0f), f_of_integers(own[0]));
          else found = f_of_integers(i_add(own[0], i_left<8>(high)));
        }
        acc[r][b] = f_fma(found, step, acc[r][b]);
      }
    }
  }
};

// --- x ------------------------------------------------------------------------------------------------------------------------

// The step of a block whose largest number has these bits, and one over it.
template <int LIMBS> static inline float step_of(uint32_t largest, float* inverse) {
  if constexpr (LIMBS == 1) {
    const float step = float_of_bits(largest) / 127.0f;
    *inverse = step > 0 ? 1.0f / step : 0.0f;
    return step;
  }
  *inverse = 0.0f;
  if (largest >= 0x7F800000u) return float_of_bits(0x7FC00000u);
  const uint32_t exponent = bits_of_float(float_of_bits(largest) * 1.0079f) >> 23;
  const uint32_t step = exponent > 22 ? exponent - 22 : 1;
  *inverse = float_of_bits((254 - step) << 23);
  return float_of_bits(step << 23);
}

// The limbs of a chunk, `values` of which are in steps; each plus 128.
template <int PARTS, int LIMBS> static void write_limbs(const int32_t* steps, uint8_t* out) {
  constexpr int64_t COLUMNS = 4 * PARTS * LANES;
  constexpr int32_t MIDDLE = LIMBS == 3 ? 0x808080 : 0x80;
  for (int k = 0; k < LIMBS; k++) {
    alignas(64) uint8_t limb[COLUMNS];
    for (int64_t i = 0; i < COLUMNS; i++) limb[i] = (uint8_t)((uint32_t)(steps[i] + MIDDLE) >> (8 * k)) ^ 0x80;
    for (int v = 0; v < PARTS; v++) {
      uint8_t* own = out + (v * LIMBS + k) * 4 * LANES;
      for (int64_t b = 0; b < 4 * LANES; b++) {
        if constexpr (PARTS == 1) own[b] = limb[b];
        else if constexpr (PARTS == 2) own[b] = (uint8_t)(((const uint16_t*)limb)[b] >> (8 * v));
        else if constexpr (PARTS == 4) own[b] = (uint8_t)(((const uint32_t*)limb)[b] >> (8 * v));
        else own[b] = (uint8_t)(((const uint64_t*)limb)[b] >> (8 * v));
      }
    }
  }
}

template <int PARTS, int LIMBS> static void take_chunks(const anybit_shape* s, int32_t lift, bool split, float* values) {
  constexpr int64_t PER_LANE = 4 * PARTS, COLUMNS = PER_LANE * LANES;
  const int64_t columns = limb_columns(s);
  memset(values + padded_columns(s), 0, (size_t)(columns - padded_columns(s)) * sizeof(float));
  uint8_t* out = (uint8_t*)(values + columns);
  for (int64_t start = 0; start < columns; start += COLUMNS) {
    alignas(64) int32_t steps[COLUMNS];
    float step[COLUMNS / STEP_BLOCK];
    for (int64_t block = 0; block < COLUMNS / STEP_BLOCK; block++) {
      float* x = values + start + block * STEP_BLOCK;
      uint32_t largest = 0;  // the bits of a size are in the order of sizes
      for (int i = 0; i < STEP_BLOCK; i++) {
        const uint32_t size = bits_of_float(x[i]) & 0x7FFFFFFFu;
        largest = size > largest ? size : largest;
      }
      float inverse;
      step[block] = step_of<LIMBS>(largest, &inverse);
      for (int i = 0; i < STEP_BLOCK; i++) {
        const float exact = x[i] * inverse, nearest = exact + (exact < 0 ? -0.5f : 0.5f);
        const float kept = LIMBS == 3 ? nearest : nearest > 127.0f ? 127.0f : nearest < -127.0f ? -127.0f : nearest;
        steps[block * STEP_BLOCK + i] = (int32_t)(kept == kept ? kept : 0.0f);
      }
      if constexpr (LIMBS == 1)  // sums of x are of what is left of it
        for (int i = 0; i < STEP_BLOCK; i++) x[i] = (float)steps[block * STEP_BLOCK + i] * step[block];
    }
    write_limbs<PARTS, LIMBS>(steps, out);
    out += PARTS * LIMBS * 4 * LANES;
    int32_t bias[2][LANES];
    for (int64_t lane = 0; lane < LANES; lane++) {
      int32_t all = 0, low = 0;
      for (int64_t i = lane * PER_LANE; i < (lane + 1) * PER_LANE; i++) {
        all += steps[i];
        low += (int8_t)(uint8_t)steps[i];
      }
      bias[0][lane] = -lift * (split ? low : all);
      bias[1][lane] = -lift * ((all - low) / 256);
    }
    memcpy(out, bias, (split ? 2 : 1) * sizeof bias[0]);
    out += (split ? 2 : 1) * sizeof bias[0];
    for (int64_t lane = 0; lane < LANES; lane++, out += 4) memcpy(out, &step[lane * PER_LANE / STEP_BLOCK], 4);
  }
}

template <int LIMBS> static void take_limbs(const anybit_shape* s, const anybit_tensors* t, float* values) {
  const bool table = s->levels == ANYBIT_TABLE;
  const int32_t lift = table ? (int32_t)read_levels(s, t).lift : 1 << (s->bits - 1);
  const bool split = split_sums(s->bits, table, LIMBS);
  switch (parts_of(s->bits)) {
    case 1: return take_chunks<1, LIMBS>(s, lift, split, values);
    case 2: return take_chunks<2, LIMBS>(s, lift, split, values);
    case 4: return take_chunks<4, LIMBS>(s, lift, split, values);
    default: return take_chunks<8, LIMBS>(s, lift, split, values);
  }
}

}  // namespace

#endif
