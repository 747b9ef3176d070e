// Products with a Grid, written once over the vector types of a variant (vec_*.h must be included first).
//
// Two inner loops:
//
//   chunks   float32 arithmetic, up to 4 bits. A chunk is 8 * LANES codes; lane i holds codes 8 i .. 8 i + 7 of it, so a code
//            costs one shift, one look-up in a register and one multiply-add. x is laid out to match:
//
//              lane      0        1        2            x block k (k = 0..7):  x[k], x[8 + k], x[16 + k], ...
//              codes  0 ..  7   8 .. 15  16 .. 23
//
//            A group is a multiple of eight columns, so a lane has one scale; it multiplies the lane's sum of eight.
//
//   natural  everything else: LANES codes in order, made into numbers by the format's own arithmetic (each operation
//            rounded as `compute` says) or, in float32 with whole groups of lanes, summed first and scaled after.
//
// Codes of an unsigned width are centred (the level is code - 2**(bits - 1), the zero moves along), which keeps the part of
// the sum that a zero point cancels small.
#ifndef ANYBIT_GRID_KERNELS_H
#define ANYBIT_GRID_KERNELS_H

#if defined(__GNUC__) || defined(__clang__)
#define ALWAYS_INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
// Small loops over registers: an array that is indexed by a variable would live in memory.
#if defined(__clang__)
#define UNROLLED _Pragma("unroll")
#define UNROLLED16 _Pragma("unroll")
#else
#define UNROLLED _Pragma("GCC unroll 8")
#define UNROLLED16 _Pragma("GCC unroll 16")
#endif
#else
#define ALWAYS_INLINE inline
#define NOINLINE
#define UNROLLED
#define UNROLLED16
#endif

// Unnamed: the same names in another variant are other code, and the linker must never take one for the other.
namespace {

// A hint: the next rows of the weight, which begin another page. The address need not be readable.
static ALWAYS_INLINE void prefetch(const uint8_t* p) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(p, 0, 2);  // the second cache level: rows are often a page apart and would fight for one set of the first
#else
  (void)p;
#endif
}

static constexpr int CHUNK = 8 * LANES;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline bool in_chunks(const anybit_shape* s) {
  return s->bits <= 4 && s->compute == ANYBIT_F32 && (s->group % 8 == 0 || s->group >= s->columns);
}
static inline bool wide_group(const anybit_shape* s, int64_t unit) {
  return s->group % unit == 0 || s->group >= s->columns;
}
// natural order, float32, each group a whole number of vectors: sum first, scale after
static inline bool sums_first(const anybit_shape* s) {
  return s->compute == ANYBIT_F32 && s->bits > 4 && s->levels != ANYBIT_TABLE && wide_group(s, LANES);
}
static inline bool needs_sums(const anybit_shape* s) {
  return s->zero.kind != ANYBIT_ABSENT || s->offset.kind != ANYBIT_ABSENT || s->levels == ANYBIT_UNSIGNED;
}
static inline float centre(const anybit_shape* s) {
  return s->levels == ANYBIT_UNSIGNED ? (float)(1 << (s->bits - 1)) : 0.0f;
}

#ifdef ANYBIT_DOTS
// Terms of bfloat16 that a level is the sum of when a bfloat16 x is multiplied in pairs; 0: it is not done.
static inline int dot_terms(const anybit_shape* s, const anybit_tensors* t, const anybit_product* p) {
  if (p->x_kind != ANYBIT_BF16 || !in_chunks(s)) return 0;
  if (s->levels != ANYBIT_TABLE) return 1;
  for (int i = 0; i < 1 << s->bits; i++)
    if (float_of_bf16(bf16_of_float(t->table[i])) != t->table[i]) return s->bits == 4 ? 2 : 0;
  return 1;
}
#endif

// --- parameters ---------------------------------------------------------------------------------------------------------

struct Parameter {
  const anybit_parameter* p;
  const void* data;
  int64_t row;  // offset of this weight row's values
};

static inline Parameter parameter_at(const anybit_parameter* p, const void* data, int64_t row) {
  return {p, data, row / p->down * p->row_stride};
}

static inline float one(const Parameter& q, int64_t group) {
  return read_parameter(q.p, q.data, q.row + (q.p->width == 1 ? 0 : group));
}

// Values of the groups first + index[lane], index below LANES.
static NOINLINE F several(const Parameter& q, int64_t first, I index) {
  if (q.p->width == 1) return f_set(read_parameter(q.p, q.data, q.row));
  int64_t at = q.row + first;
  F found;
  if (first + LANES <= q.p->width) {
    switch (q.p->kind) {
      case ANYBIT_P_F32: found = f_load((const float*)q.data + at); break;
      case ANYBIT_P_BF16: found = f_load_bf16((const uint16_t*)q.data + at); break;
      case ANYBIT_P_F16: found = f_load_f16((const uint16_t*)q.data + at); break;
      case ANYBIT_P_U8: found = f_load_u8((const uint8_t*)q.data + at); break;
      case ANYBIT_P_I8: found = f_load_i8((const uint8_t*)q.data + at); break;
      default: {
        float some[LANES];
        for (int i = 0; i < LANES; i++) some[i] = read_parameter(q.p, q.data, at + i);
        return f_permute(f_load(some), index);
      }
    }
    if (q.p->negated) found = f_sub(f_zero(), found);
  } else {
    float some[LANES];  // filled up with the last one, which is safe to divide by
    const int64_t last = q.p->width - first - 1;
    for (int64_t i = 0; i < LANES; i++) some[i] = read_parameter(q.p, q.data, at + least(i, last));
    found = f_load(some);
  }
  return f_permute(found, index);
}

// `count` values of the groups from `first` on as float32, and LANES more that may be read: copies of the last.
static NOINLINE void run_of(const Parameter& q, int64_t first, int64_t count, float* out) {
  const int64_t at = q.row + first;
  int64_t i = 0;
  if (q.p->width == 1) {
    const F value = f_set(read_parameter(q.p, q.data, q.row));
    for (; i < count + LANES; i += LANES) f_store(out + i, value);
    return;
  }
  switch (q.p->kind) {
    case ANYBIT_P_F32: for (; i + LANES <= count; i += LANES) f_store(out + i, f_load((const float*)q.data + at + i)); break;
    case ANYBIT_P_BF16:
      for (; i + LANES <= count; i += LANES) f_store(out + i, f_load_bf16((const uint16_t*)q.data + at + i));
      break;
    case ANYBIT_P_F16:
      for (; i + LANES <= count; i += LANES) f_store(out + i, f_load_f16((const uint16_t*)q.data + at + i));
      break;
    case ANYBIT_P_U8: for (; i + LANES <= count; i += LANES) f_store(out + i, f_load_u8((const uint8_t*)q.data + at + i)); break;
    case ANYBIT_P_I8: for (; i + LANES <= count; i += LANES) f_store(out + i, f_load_i8((const uint8_t*)q.data + at + i)); break;
    case ANYBIT_P_E8M0: for (; i + LANES <= count; i += LANES) f_store(out + i, f_load_e8m0((const uint8_t*)q.data + at + i)); break;
  }
  if (q.p->negated)
    for (int64_t k = 0; k < i; k += LANES) f_store(out + k, f_sub(f_zero(), f_load(out + k)));
  for (; i < count; i++) out[i] = read_parameter(q.p, q.data, at + i);
  const F last = f_set(out[count - 1]);
  f_store(out + count, last);
}

// Groups of the lanes of the unit that starts at `column`, each lane `step` columns wide: first group and distances to it.
static inline int64_t groups_of_lanes(const anybit_shape* s, int64_t column, int64_t step, uint32_t* distance) {
  int64_t first = column / s->group;
  for (int64_t i = 0; i < LANES; i++) {
    int64_t inside = least(column + i * step, s->columns - 1);
    distance[i] = (uint32_t)(inside / s->group - first);
  }
  return first;
}

// --- levels in natural order ----------------------------------------------------------------------------------------------

enum Source { BYTES_SIGNED = 8, BYTES_UNSIGNED = 9, BYTES_E4M3 = 10, BYTES_E5M2 = 11, TABLE_5 = 12, TABLE_6 = 13,
              TABLE_7 = 14, TABLE_8 = 15 };  // 1 .. 7: integers and small tables of that width

struct Levels {
  Lut lut;             // up to 4 bits: the numbers, repeated so that bits above the code do not matter
  const float* table;  // 5 .. 8 bits with a table
  bool is_signed;
  alignas(64) float numbers[16];  // what is in `lut`
  uint16_t halves[2][32];         // the same as bfloat16, and what that leaves over
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

static inline Levels read_levels(const anybit_shape* s, const anybit_tensors* t) {
  Levels found = {{}, t->table, s->levels == ANYBIT_SIGNED, {0}, {{0}}};
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
  for (int i = 0; i < 32; i++) {
    found.halves[0][i] = bf16_of_float(numbers[i % 16]);
    found.halves[1][i] = bf16_of_float(numbers[i % 16] - float_of_bf16(found.halves[0][i]));
  }
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

// --- weights in natural order ---------------------------------------------------------------------------------------------------

static constexpr int64_t BLOCK = 1024;  // columns made at a time, small enough to stay in the first cache level

// `bytes` (at most 16) of a row from `column` on; zeros beyond the end of the row.
static NOINLINE void copy_codes(const anybit_shape* s, const anybit_tensors* t, int64_t row, int64_t column, int64_t bytes,
                                uint8_t* spare) {
  const int64_t at = column * s->bits / 8;
  memset(spare, 0, 16);
  memcpy(spare, t->codes + row * s->row_bytes + at, (size_t)least(bytes, s->row_bytes - at));
}

template <int ROUND> static inline F rounded(F a) {
  if constexpr (ROUND == ANYBIT_BF16) return f_round_bf16(a);
  if constexpr (ROUND == ANYBIT_F16) return f_round_f16(a);
  return a;
}

struct RowParameters { Parameter zero, scale, offset; };

static inline RowParameters row_parameters(const anybit_shape* s, const anybit_tensors* t, int64_t row) {
  return {parameter_at(&s->zero, t->zero, row), parameter_at(&s->scale, t->scale, row),
          parameter_at(&s->offset, t->offset, row)};
}

// Centred levels of columns start .. stop of a row; `start` is a multiple of LANES. Lanes beyond `stop` hold anything.
template <int SOURCE>
static void level_block(const anybit_shape* s, const anybit_tensors* t, const Levels& levels, int64_t row, int64_t start,
                        int64_t stop, float* out) {
  uint8_t spare[16];
  for (int64_t column = start; column < stop; column += LANES)
    f_store(out + column - start, levels_at<SOURCE>(levels, readable(s, t, row, column, spare)));
}

// Levels -> weights, in place: each operation of the format in its order, rounded as it says.
template <int ROUND>
static void weigh_block(const anybit_shape* s, const anybit_tensors* t, int64_t row, int64_t start, int64_t stop,
                        float* numbers) {
  const RowParameters own = row_parameters(s, t, row);
  const bool has_zero = s->zero.kind != ANYBIT_ABSENT, has_scale = s->scale.kind != ANYBIT_ABSENT,
             has_offset = s->offset.kind != ANYBIT_ABSENT, divides = s->scale.inverted != 0, wide = wide_group(s, LANES);
  const F middle = f_set(centre(s));
  F zero = f_zero(), scale = f_zero(), offset = f_zero();
  uint32_t distance[LANES] = {0};
  int64_t known = -1;
  for (int64_t column = start; column < stop; column += LANES) {
    if (!wide) {
      int64_t first = groups_of_lanes(s, column, 1, distance);
      I index = i_load(distance);
      if (has_zero) zero = rounded<ROUND>(several(own.zero, first, index));
      if (has_scale) scale = rounded<ROUND>(several(own.scale, first, index));
      if (has_offset) offset = rounded<ROUND>(several(own.offset, first, index));
    } else if (int64_t group = s->group >= s->columns ? 0 : column / s->group; group != known) {
      if (has_zero) zero = rounded<ROUND>(f_set(one(own.zero, group)));
      if (has_scale) scale = rounded<ROUND>(f_set(one(own.scale, group)));
      if (has_offset) offset = rounded<ROUND>(f_set(one(own.offset, group)));
      known = group;
    }
    F w = rounded<ROUND>(f_add(f_load(numbers + column - start), middle));
    if (has_zero) w = rounded<ROUND>(f_sub(w, zero));
    if (has_scale) w = rounded<ROUND>(divides ? f_div(w, scale) : f_mul(w, scale));
    if (has_offset) w = rounded<ROUND>(f_add(w, offset));
    f_store(numbers + column - start, w);
  }
}

template <int ROUND>
static Lut weigh_table(const anybit_shape* s, const anybit_tensors* t, const Levels& levels, int64_t row, int64_t group) {
  const RowParameters own = row_parameters(s, t, row);
  const F middle = f_set(centre(s));
  float numbers[16];
  for (int i = 0; i < 16; i += LANES) {
    F w = rounded<ROUND>(f_add(f_load(levels.numbers + i), middle));
    if (s->zero.kind != ANYBIT_ABSENT) w = rounded<ROUND>(f_sub(w, rounded<ROUND>(f_set(one(own.zero, group)))));
    if (s->scale.kind != ANYBIT_ABSENT) {
      const F scale = rounded<ROUND>(f_set(one(own.scale, group)));
      w = rounded<ROUND>(s->scale.inverted ? f_div(w, scale) : f_mul(w, scale));
    }
    if (s->offset.kind != ANYBIT_ABSENT) w = rounded<ROUND>(f_add(w, rounded<ROUND>(f_set(one(own.offset, group)))));
    f_store(numbers + i, w);
  }
  return lut_load(numbers);
}

typedef Lut (*WeighTable)(const anybit_shape*, const anybit_tensors*, const Levels&, int64_t, int64_t);
static const WeighTable WEIGH_TABLES[3] = {weigh_table<0>, weigh_table<1>, weigh_table<2>};

// Up to 4 bits, groups of whole vectors: a group has few different weights, so they are worked out once and looked up.
template <int BITS>
static void table_block(const anybit_shape* s, const anybit_tensors* t, const Levels& levels, int64_t row, int64_t start,
                        int64_t stop, float* out, WeighTable weigh) {
  uint8_t spare[16];
  while (start < stop) {
    const int64_t group = s->group >= s->columns ? 0 : start / s->group;
    const int64_t end = s->group >= s->columns ? stop : least(stop, (group + 1) * s->group);
    const Lut lut = weigh(s, t, levels, row, group);
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
typedef void (*TableBlock)(const anybit_shape*, const anybit_tensors*, const Levels&, int64_t, int64_t, int64_t, float*,
                           WeighTable);
static const TableBlock TABLE_BLOCKS[5] = {nullptr, table_block<1>, table_block<2>, table_block<3>, table_block<4>};
static const WeighBlock WEIGH_BLOCKS[3] = {weigh_block<0>, weigh_block<1>, weigh_block<2>};

// Weights of columns start .. stop, `out` with room for BLOCK floats; zeros up to the next multiple of LANES.
static void weights_of(const anybit_shape* s, const anybit_tensors* t, const Levels& levels, int64_t row, int64_t start,
                       int64_t stop, float* out) {
  if (s->bits <= 4 && wide_group(s, LANES)) {
    TABLE_BLOCKS[s->bits](s, t, levels, row, start, stop, out, WEIGH_TABLES[s->compute]);
  } else {
    LEVEL_BLOCKS[source_of(s)](s, t, levels, row, start, stop, out);
    WEIGH_BLOCKS[s->compute](s, t, row, start, stop, out);
  }
  for (int64_t i = stop - start; i % LANES; i++) out[i] = 0;  // what was there may not even be a number
}

static void decode(const anybit_shape* s, const anybit_tensors* t, int64_t row, void* out, int64_t kind) {
  const Levels levels = read_levels(s, t);
  alignas(64) float some[BLOCK];
  for (int64_t start = 0; start < s->columns; start += BLOCK) {
    const int64_t stop = least(start + BLOCK, s->columns);
    weights_of(s, t, levels, row, start, stop, some);
    int64_t i = 0;
    if (kind == ANYBIT_BF16)
      for (; i + LANES <= stop - start; i += LANES) f_store_bf16((uint16_t*)out + start + i, f_load(some + i));
    if (kind == ANYBIT_F32)
      for (; i + LANES <= stop - start; i += LANES) f_store((float*)out + start + i, f_load(some + i));
    for (; i < stop - start; i++) write_float(out, kind, start + i, some[i]);
  }
}

// --- products ---------------------------------------------------------------------------------------------------------------

struct Product {
  const anybit_shape* s;
  const anybit_tensors* t;
  const anybit_product* p;
  const Input* in;
  Levels levels;
};

static inline void put(const anybit_product* p, int64_t n, int64_t row, float value) {
  if (p->bias) value += read_float(p->bias, p->bias_kind, row);
  int64_t at = n * p->y_row + row;
  if (p->accumulate) ((float*)p->y)[at] += value;
  else write_float(p->y, p->y_kind, at, value);
}

// The weights of one row, made a block at a time, and B rows of x.
template <int B> static void product_exact(const Product& q, int64_t row, int64_t n) {
  F total[B];
  UNROLLED for (int b = 0; b < B; b++) total[b] = f_zero();
  const float* x = q.in->values + n * q.in->value_stride;
  alignas(64) float weights[BLOCK];
  for (int64_t start = 0; start < q.s->columns; start += BLOCK) {
    const int64_t stop = least(start + BLOCK, q.s->columns);
    weights_of(q.s, q.t, q.levels, row, start, stop, weights);
    for (int64_t column = start; column < stop; column += LANES) {
      F w = f_load(weights + column - start);
      UNROLLED for (int b = 0; b < B; b++) total[b] = f_fma(w, f_load(x + b * q.in->value_stride + column), total[b]);
    }
  }
  UNROLLED for (int b = 0; b < B; b++) put(q.p, n + b, row, f_sum(total[b]));
}

// Scales, shifts (centre - zero) and offsets of R rows for a run of groups, in float32.
static constexpr int64_t RUN = 256;

template <int R> struct Runs {
  float scale[R][RUN + 2 * LANES], shift[R][RUN + 2 * LANES], offset[R][RUN + 2 * LANES];
};

template <int R>
static NOINLINE void read_runs(const anybit_shape* s, const anybit_tensors* t, int64_t row, int64_t first, int64_t count,
                               Runs<R>* runs) {
  const F middle = f_set(centre(s)), one = f_set(1.0f);
  for (int r = 0; r < R; r++) {
    const RowParameters own = row_parameters(s, t, row + r);
    if (s->scale.kind != ANYBIT_ABSENT) run_of(own.scale, first, count, runs->scale[r]);
    else
      for (int64_t i = 0; i < count + LANES; i += LANES) f_store(runs->scale[r] + i, one);
    if (s->scale.inverted)
      for (int64_t i = 0; i < count + LANES; i += LANES) f_store(runs->scale[r] + i, f_div(one, f_load(runs->scale[r] + i)));
    if (s->zero.kind != ANYBIT_ABSENT) run_of(own.zero, first, count, runs->shift[r]);
    for (int64_t i = 0; i < count + LANES; i += LANES)
      f_store(runs->shift[r] + i, s->zero.kind != ANYBIT_ABSENT ? f_sub(middle, f_load(runs->shift[r] + i)) : middle);
    if (s->offset.kind != ANYBIT_ABSENT) run_of(own.offset, first, count, runs->offset[r]);
  }
}

// float32, groups of whole vectors: sum_g scale_g * (sum levels * x + (centre - zero_g) * sum x) + offset_g * sum x.
template <int SOURCE, int UNIT, int R, int B> static void product_sums(const Product& q, int64_t row, int64_t n) {
  constexpr int BITS = bits_of_source<SOURCE>();
  const anybit_shape* s = q.s;
  const bool sums = needs_sums(s), has_offset = s->offset.kind != ANYBIT_ABSENT;
  F total[R][B];
  UNROLLED for (int r = 0; r < R; r++)
    UNROLLED for (int b = 0; b < B; b++) total[r][b] = f_zero();
  const int64_t stride = q.in->value_stride, sum_stride = q.in->sum_stride, row_bytes = s->row_bytes;
  const float* x = q.in->values + n * stride;
  const float* sum = q.in->sums + n * sum_stride;
  const uint8_t* codes = q.t->codes + row * row_bytes;
  const uint8_t* end = q.t->codes + s->rows * row_bytes;
  // rows whose vectors may read 16 bytes anywhere: all but those at the end of the tensor
  const bool safe = LANES * BITS / 8 == 16 || codes + R * row_bytes + 16 <= end;
  uint8_t spare[16];
  Runs<R> runs;
  const int64_t groups = ceil_div(s->columns, s->group);
  for (int64_t base = 0; base < groups; base += RUN) {
    const int64_t count = least(RUN, groups - base);
    read_runs<R>(s, q.t, row, base, count, &runs);
    for (int64_t g = 0; g < count; g++) {
      const int64_t start = (base + g) * s->group, stop = least(start + s->group, s->columns);
      F acc[R][B];
      UNROLLED for (int r = 0; r < R; r++)
        UNROLLED for (int b = 0; b < B; b++)
          acc[r][b] = sums ? f_mul(f_set(runs.shift[r][g]), f_load(sum + b * sum_stride + (base + g) * LANES)) : f_zero();
      int64_t column = start;
      for (; safe && column + UNIT * LANES <= stop; column += UNIT * LANES) {
        const uint8_t* p = codes + column * BITS / 8;
        UNROLLED for (int r = 0; r < R; r++) prefetch(p + (r + R) * row_bytes);
        UNROLLED for (int u = 0; u < UNIT; u++, p += LANES * BITS / 8) {
          F own[B];
          UNROLLED for (int b = 0; b < B; b++) own[b] = f_load(x + b * stride + column + u * LANES);
          UNROLLED for (int r = 0; r < R; r++) {
            const F level = levels_at<SOURCE>(q.levels, p + r * row_bytes);
            UNROLLED for (int b = 0; b < B; b++) acc[r][b] = f_fma(level, own[b], acc[r][b]);
          }
        }
      }
      for (; column < stop; column += LANES) {  // the end of a row, and the last rows
        UNROLLED for (int r = 0; r < R; r++) {
          copy_codes(s, q.t, row + r, column, LANES * BITS / 8, spare);
          const F level = levels_at<SOURCE>(q.levels, spare);
          UNROLLED for (int b = 0; b < B; b++) acc[r][b] = f_fma(level, f_load(x + b * stride + column), acc[r][b]);
        }
      }
      UNROLLED for (int r = 0; r < R; r++) {
        const F scale = f_set(runs.scale[r][g]);
        UNROLLED for (int b = 0; b < B; b++) total[r][b] = f_fma(acc[r][b], scale, total[r][b]);
        if (has_offset)
          UNROLLED for (int b = 0; b < B; b++)
            total[r][b] =
                f_fma(f_set(runs.offset[r][g]), f_load(sum + b * sum_stride + (base + g) * LANES), total[r][b]);
      }
    }
  }
  UNROLLED for (int r = 0; r < R; r++)
    UNROLLED for (int b = 0; b < B; b++) put(q.p, n + b, row + r, f_sum(total[r][b]));
}

// How the codes of a chunk meet x: in float32, eight steps of LANES products.
template <int BITS> struct ByFloats {
  static constexpr int64_t CHUNK_BYTES = CHUNK * sizeof(float);
  typedef Lut Table;
  static Table table(const Levels& levels) { return levels.lut; }

  template <int K, int R, int B>
  static ALWAYS_INLINE void step(const Table& lut, const I* raw, const char* x, int64_t stride, F (*acc)[B]) {
    F own[B];
    UNROLLED for (int b = 0; b < B; b++) own[b] = f_load((const float*)(x + b * stride) + K * LANES);
    UNROLLED for (int r = 0; r < R; r++) {
      const F level = lut_take(lut, i_right<BITS * K>(raw[r]));
      UNROLLED for (int b = 0; b < B; b++) acc[r][b] = f_fma(level, own[b], acc[r][b]);
    }
  }
  template <int R, int B>
  static ALWAYS_INLINE void steps(const Table& lut, I* raw, const char* x, int64_t stride, F (*acc)[B]) {
    step<0, R, B>(lut, raw, x, stride, acc);
    step<1, R, B>(lut, raw, x, stride, acc);
    step<2, R, B>(lut, raw, x, stride, acc);
    step<3, R, B>(lut, raw, x, stride, acc);
    step<4, R, B>(lut, raw, x, stride, acc);
    step<5, R, B>(lut, raw, x, stride, acc);
    step<6, R, B>(lut, raw, x, stride, acc);
    step<7, R, B>(lut, raw, x, stride, acc);
  }
};

#ifdef ANYBIT_DOTS
// The same for a bfloat16 x: four steps of 2 * LANES products, summed in pairs into float32. Levels that bfloat16 cannot hold
// (NF4) come as a sum of two, which keeps 16 bits of them.
//
//   lane (32 bits)   high half: codes 4 .. 7   low half: codes 0 .. 3    x block k (k = 0..3): pairs (x[k], x[4 + k]), ...
template <int BITS, int TERMS> struct ByDots {
  static constexpr int64_t CHUNK_BYTES = CHUNK * 2;
  struct Table { __m512i terms[TERMS]; };
  static Table table(const Levels& levels) {
    Table found;
    for (int i = 0; i < TERMS; i++) found.terms[i] = _mm512_loadu_si512(levels.halves[i]);
    return found;
  }

  template <int K, int R, int B>
  static ALWAYS_INLINE void step(const Table& table, const I* raw, const char* x, int64_t stride, F (*acc)[B]) {
    __m512i own[B];
    UNROLLED for (int b = 0; b < B; b++) own[b] = _mm512_loadu_si512(x + b * stride + K * 4 * LANES);
    UNROLLED for (int r = 0; r < R; r++) {
      const __m512i index = _mm512_srli_epi16(raw[r], BITS * K);  // five bits are looked at: entries are repeated
      UNROLLED for (int i = 0; i < TERMS; i++) {
        const __m512i level = _mm512_permutexvar_epi16(index, table.terms[i]);
        UNROLLED for (int b = 0; b < B; b++) acc[r][b] = _mm512_dpbf16_ps(acc[r][b], (__m512bh)level, (__m512bh)own[b]);
      }
    }
  }
  template <int R, int B>
  static ALWAYS_INLINE void steps(const Table& table, I* raw, const char* x, int64_t stride, F (*acc)[B]) {
    if constexpr (BITS < 4)
      UNROLLED for (int r = 0; r < R; r++)
        raw[r] = _mm512_ternarylogic_epi32(_mm512_set1_epi32((int)0xFFFF0000), _mm512_slli_epi32(raw[r], 16 - 4 * BITS),
                                           raw[r], 0xCA);
    step<0, R, B>(table, raw, x, stride, acc);
    step<1, R, B>(table, raw, x, stride, acc);
    step<2, R, B>(table, raw, x, stride, acc);
    step<3, R, B>(table, raw, x, stride, acc);
  }
};
#endif

// R rows of the weight, B rows of x. WIDE: a group is a whole number of chunks; else each lane has parameters of its own.
template <class BY, int BITS, bool WIDE, int R, int B> static void product_chunks(const Product& q, int64_t row, int64_t n) {
  constexpr int64_t BYTES = LANES * BITS;
  const anybit_shape* s = q.s;
  const bool sums = needs_sums(s), has_offset = s->offset.kind != ANYBIT_ABSENT;
  const typename BY::Table table = BY::table(q.levels);
  F total[R][B], acc[R][B];
  UNROLLED for (int r = 0; r < R; r++)
    UNROLLED for (int b = 0; b < B; b++) total[r][b] = f_zero();
  const int64_t stride = q.in->value_stride * sizeof(float), sum_stride = q.in->sum_stride, row_bytes = s->row_bytes;
  const char* x = (const char*)q.in->values + n * stride;
  const float* sum = q.in->sums + n * sum_stride;
  const uint8_t* codes = q.t->codes + row * row_bytes;
  const int64_t chunks = ceil_div(s->columns, CHUNK), groups = ceil_div(s->columns, s->group);
  const int64_t last_bytes = row_bytes - (chunks - 1) * BYTES;
  const int64_t per_group = WIDE ? least(ceil_div(s->group, CHUNK), chunks) : 1;
  // a run holds the parameters of RUN groups: that many groups of chunks, or chunks of at most LANES groups
  const int64_t per_run = WIDE ? RUN * per_group : RUN / LANES;
  const bool regular = !WIDE && CHUNK % s->group == 0;
  uint32_t distance[LANES] = {0};
  for (int i = 0; i < LANES && regular; i++) distance[i] = (uint32_t)(8 * i / s->group);
  I index = i_load(distance);
  Runs<R> runs;
  for (int64_t begin = 0; begin < chunks; begin += per_run) {
    const int64_t base = WIDE ? begin / per_group : begin * CHUNK / s->group;
    const int64_t wanted = WIDE ? RUN : (least(begin + per_run, chunks) * CHUNK - 1) / s->group + 1 - base;
    read_runs<R>(s, q.t, row, base, least(wanted, groups - base), &runs);
    const int64_t finish = least(begin + per_run, chunks);
    for (int64_t first = begin; first < finish; first += per_group) {
      const int64_t block = WIDE ? first / per_group : first;  // of the sums of x
      int64_t g = block - base;
      if (!WIDE) {
        g = regular ? first * (CHUNK / s->group) - base : first * CHUNK / s->group - base;
        if (!regular) {
          groups_of_lanes(s, first * CHUNK, 8, distance);
          index = i_load(distance);
        }
      }
      UNROLLED for (int r = 0; r < R; r++) {
        if (!sums) {
          UNROLLED for (int b = 0; b < B; b++) acc[r][b] = f_zero();
          continue;
        }
        const F shift = WIDE ? f_set(runs.shift[r][g]) : f_permute(f_load(runs.shift[r] + g), index);
        UNROLLED for (int b = 0; b < B; b++) acc[r][b] = f_mul(shift, f_load(sum + b * sum_stride + block * LANES));
      }
      const int64_t stop = least(first + per_group, chunks);
      for (int64_t chunk = first; chunk < stop; chunk++) {
        const uint8_t* p = codes + chunk * BYTES;
        I raw[R];
        if (chunk + 1 < chunks || last_bytes >= BYTES) {
          UNROLLED for (int r = 0; r < R; r++) raw[r] = chunk_load<BITS>(p + r * row_bytes);
          UNROLLED for (int r = 0; r < R; r++) prefetch(p + (r + R) * row_bytes);
        } else {
          uint8_t spare[BYTES + 16];
          UNROLLED for (int r = 0; r < R; r++) {
            memset(spare, 0, sizeof spare);
            memcpy(spare, p + r * row_bytes, (size_t)last_bytes);
            raw[r] = chunk_load<BITS>(spare);
          }
        }
        BY::template steps<R, B>(table, raw, x + chunk * BY::CHUNK_BYTES, stride, acc);
      }
      UNROLLED for (int r = 0; r < R; r++) {
        const F scale = WIDE ? f_set(runs.scale[r][g]) : f_permute(f_load(runs.scale[r] + g), index);
        UNROLLED for (int b = 0; b < B; b++) total[r][b] = f_fma(acc[r][b], scale, total[r][b]);
        if (has_offset) {
          const F offset = WIDE ? f_set(runs.offset[r][g]) : f_permute(f_load(runs.offset[r] + g), index);
          UNROLLED for (int b = 0; b < B; b++)
            total[r][b] = f_fma(offset, f_load(sum + b * sum_stride + block * LANES), total[r][b]);
        }
      }
    }
  }
  UNROLLED for (int r = 0; r < R; r++)
    UNROLLED for (int b = 0; b < B; b++) put(q.p, n + b, row + r, f_sum(total[r][b]));
}

// --- choosing ---------------------------------------------------------------------------------------------------------------

typedef void (*Tile)(const Product&, int64_t row, int64_t n);

// Rows of the weight beside rows of x: as many as the registers hold.
struct Tiles { Tile four_one, one_one, two_two, one_two, two_four, one_four; };

template <class BY, int BITS, bool WIDE> static constexpr Tiles chunk_tiles() {
  if constexpr (!VECTORS)
    return {nullptr, product_chunks<BY, BITS, WIDE, 1, 1>, nullptr, product_chunks<BY, BITS, WIDE, 1, 2>,
            nullptr, product_chunks<BY, BITS, WIDE, 1, 4>};
  else
    return {product_chunks<BY, BITS, WIDE, 4, 1>, product_chunks<BY, BITS, WIDE, 1, 1>, product_chunks<BY, BITS, WIDE, 2, 2>,
            product_chunks<BY, BITS, WIDE, 1, 2>, product_chunks<BY, BITS, WIDE, 2, 4>, product_chunks<BY, BITS, WIDE, 1, 4>};
}
template <int SOURCE, int UNIT> static constexpr Tiles sum_tiles() {
  if constexpr (!VECTORS)
    return {nullptr, product_sums<SOURCE, 1, 1, 1>, nullptr, product_sums<SOURCE, 1, 1, 2>,
            nullptr, product_sums<SOURCE, 1, 1, 4>};
  else
    return {product_sums<SOURCE, UNIT, 4, 1>, product_sums<SOURCE, UNIT, 1, 1>, product_sums<SOURCE, UNIT, 2, 2>,
            product_sums<SOURCE, UNIT, 1, 2>, product_sums<SOURCE, UNIT, 2, 4>, product_sums<SOURCE, UNIT, 1, 4>};
}
template <int SOURCE> struct Units {
  static constexpr Tiles tiles[3] = {sum_tiles<SOURCE, 1>(), sum_tiles<SOURCE, 2>(), sum_tiles<SOURCE, 4>()};
};

// Vectors handled together: 1, 2 or 4, whatever fits into a group.
static int unit_of(const anybit_shape* s) { return wide_group(s, 4 * LANES) ? 2 : wide_group(s, 2 * LANES) ? 1 : 0; }

static const Tiles* const SUMS[12] = {nullptr, nullptr, nullptr, nullptr, nullptr,
                                      Units<5>::tiles, Units<6>::tiles, Units<7>::tiles,
                                      Units<8>::tiles, Units<9>::tiles, Units<10>::tiles, Units<11>::tiles};
static const Tiles EXACT = {nullptr, product_exact<1>, nullptr, product_exact<2>, nullptr, product_exact<4>};
template <int BITS> struct Chunks {
  static constexpr Tiles floats[2] = {chunk_tiles<ByFloats<BITS>, BITS, false>(), chunk_tiles<ByFloats<BITS>, BITS, true>()};
#ifdef ANYBIT_DOTS
  static constexpr Tiles dots[2] = {chunk_tiles<ByDots<BITS, 1>, BITS, false>(), chunk_tiles<ByDots<BITS, 1>, BITS, true>()};
#endif
};
static const Tiles* const CHUNKS[5] = {nullptr, Chunks<1>::floats, Chunks<2>::floats, Chunks<3>::floats, Chunks<4>::floats};
#ifdef ANYBIT_DOTS
static const Tiles* const DOTS[5] = {nullptr, Chunks<1>::dots, Chunks<2>::dots, Chunks<3>::dots, Chunks<4>::dots};
static const Tiles TWO_TERMS[2] = {chunk_tiles<ByDots<4, 2>, 4, false>(), chunk_tiles<ByDots<4, 2>, 4, true>()};
#endif

static const Tiles& tiles_of(const anybit_shape* s, const anybit_tensors* t, const anybit_product* p) {
#ifdef ANYBIT_DOTS
  if (int terms = dot_terms(s, t, p)) return terms == 1 ? DOTS[s->bits][wide_group(s, CHUNK)] : TWO_TERMS[wide_group(s, CHUNK)];
#else
  (void)t, (void)p;
#endif
  if (in_chunks(s)) return CHUNKS[s->bits][wide_group(s, CHUNK)];
  return sums_first(s) ? SUMS[source_of(s)][unit_of(s)] : EXACT;
}

static void multiply(const anybit_shape* s, const anybit_tensors* t, const anybit_product* p, const Input* in,
                     int64_t first_row, int64_t last_row) {
  const Tiles& tiles = tiles_of(s, t, p);
  const Product q = {s, t, p, in, read_levels(s, t)};
  for (int64_t row = first_row; row < last_row;) {
    int64_t n = 0, taken = 1;
    if (tiles.four_one && p->n == 1 && row + 4 <= last_row) {
      tiles.four_one(q, row, 0);
      taken = 4;
    } else if (tiles.two_two && row + 2 <= last_row && p->n > 1) {
      taken = 2;
      for (; n + 4 <= p->n; n += 4) tiles.two_four(q, row, n);
      for (; n + 2 <= p->n; n += 2) tiles.two_two(q, row, n);
      for (; n < p->n; n++) tiles.one_one(q, row, n), tiles.one_one(q, row + 1, n);
    } else {
      for (; n + 4 <= p->n; n += 4) tiles.one_four(q, row, n);
      for (; n + 2 <= p->n; n += 2) tiles.one_two(q, row, n);
      for (; n < p->n; n++) tiles.one_one(q, row, n);
    }
    row += taken;
  }
}

// --- inputs -----------------------------------------------------------------------------------------------------------------

static int64_t padded_columns(const anybit_shape* s) { return ceil_div(s->columns, CHUNK) * CHUNK; }

static int64_t sum_blocks(const anybit_shape* s) {
  if (!needs_sums(s)) return 0;
  if (in_chunks(s) && !wide_group(s, CHUNK)) return ceil_div(s->columns, CHUNK);
  if (!in_chunks(s) && !sums_first(s)) return 0;
  return ceil_div(s->columns, s->group);
}

static void sizes(const anybit_shape* s, int64_t* values, int64_t* sums) {
  *values = padded_columns(s);
  *sums = sum_blocks(s) * LANES;
}

static void read_row(const anybit_shape* s, const anybit_tensors* t, const anybit_product* p, int64_t n, float* values) {
  int64_t start = n * p->x_row, done = 0;
  if (t->permutation) {
    for (; done < s->columns; done++) {
      int64_t from = t->permutation[done];
      values[done] = from < 0 ? 0.0f : read_float(p->x, p->x_kind, start + from * p->x_column);
    }
  } else if (p->x_column == 1) {
    for (; done + LANES <= s->columns; done += LANES) {
      F some = p->x_kind == ANYBIT_F32    ? f_load((const float*)p->x + start + done)
               : p->x_kind == ANYBIT_BF16 ? f_load_bf16((const uint16_t*)p->x + start + done)
                                          : f_load_f16((const uint16_t*)p->x + start + done);
      f_store(values + done, some);
    }
  }
  for (; done < s->columns; done++) values[done] = read_float(p->x, p->x_kind, start + done * p->x_column);
  memset(values + s->columns, 0, (size_t)(padded_columns(s) - s->columns) * sizeof(float));
}

// Sums of x that zeros and offsets are multiplied with, lane by lane: per group, or per chunk of several groups.
static void sum_input(const anybit_shape* s, int64_t blocks, const float* values, float* sums) {
  const int64_t width = in_chunks(s) && !wide_group(s, CHUNK) ? CHUNK : s->group;
  for (int64_t block = 0; block < blocks; block++) {
    F sum = f_zero();
    int64_t stop = least((block + 1) * width, s->columns);
    if (in_chunks(s)) stop = ceil_div(stop, CHUNK) * CHUNK;  // the columns of the last chunk are spread over all of it
    for (int64_t start = block * width; start < stop; start += LANES) sum = f_add(sum, f_load(values + start));
    f_store(sums + block * LANES, sum);
  }
}

static void take_input(const anybit_shape* s, const anybit_tensors* t, const anybit_product* p, int64_t n, float* values,
                       float* sums) {
  read_row(s, t, p, n, values);
  const int64_t blocks = sum_blocks(s);
#ifdef ANYBIT_DOTS
  const bool dots = dot_terms(s, t, p) != 0;
#else
  const bool dots = false;
#endif
  if (in_chunks(s)) {
    float natural[CHUNK];
    for (int64_t start = 0; start < padded_columns(s); start += CHUNK) {
      memcpy(natural, values + start, sizeof natural);
      for (int k = 0; k < 8; k++)
        for (int lane = 0; lane < LANES; lane++) values[start + k * LANES + lane] = natural[8 * lane + k];
    }
  }
  if (blocks) sum_input(s, blocks, values, sums);
  if (dots) {  // in place: a chunk of halves ends before the floats it is read from
    for (int64_t chunk = 0; chunk < padded_columns(s) / CHUNK; chunk++) {
      float floats[CHUNK];
      memcpy(floats, values + chunk * CHUNK, sizeof floats);
      uint16_t* halves = (uint16_t*)values + chunk * CHUNK;
      for (int k = 0; k < 4; k++)
        for (int lane = 0; lane < LANES; lane++) {
          halves[(k * LANES + lane) * 2] = (uint16_t)(bits_of_float(floats[k * LANES + lane]) >> 16);
          halves[(k * LANES + lane) * 2 + 1] = (uint16_t)(bits_of_float(floats[(k + 4) * LANES + lane]) >> 16);
        }
    }
  }
}

}  // namespace

#endif
