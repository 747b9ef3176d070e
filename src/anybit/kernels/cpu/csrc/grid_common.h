// What products with grids and with codebooks share: parameters of blocks, sums of x, inputs and outputs.
//
// The vector types of a variant (vec_*.h) must be included first.
#ifndef ANYBIT_GRID_COMMON_H
#define ANYBIT_GRID_COMMON_H

#if defined(__GNUC__) || defined(__clang__)
#define ALWAYS_INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#define INLINE_LAMBDA __attribute__((always_inline))
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
#define INLINE_LAMBDA
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

static int64_t padded_columns(const anybit_shape* s) { return ceil_div(s->columns, CHUNK) * CHUNK; }

}  // namespace

#include "grid_parameters.h"

namespace {

static inline bool wide_group(const anybit_shape* s, int64_t unit) {
  return s->group % unit == 0 || s->group >= s->columns;
}

static inline float centre(const anybit_shape* s) {
  return s->levels == ANYBIT_UNSIGNED ? (float)(1 << (s->bits - 1)) : 0.0f;
}

// --- parameters of a block ---------------------------------------------------------------------------------------------------

static constexpr int64_t BLOCK = 1024;  // columns made at a time, small enough to stay in the first cache level
static constexpr int64_t TALL = 2 * LANES, DEPTH = BLOCK;  // rows and columns of the weight packed at a time (grid_blocks.h)

template <int ROUND> static inline F rounded(F a) {
  if constexpr (ROUND == ANYBIT_BF16) return f_round_bf16(a);
  if constexpr (ROUND == ANYBIT_F16) return f_round_f16(a);
  return a;
}

struct RowParameters { Parameter zero, scale, offset; };

static inline RowParameters row_parameters(const anybit_shape* s, const anybit_tensors* t, int64_t row) {
  return {parameter_at(&s->zero, t->zero, &t->nested[1], row, s->rows), parameter_at(&s->scale, t->scale, &t->nested[0], row, s->rows),
          parameter_at(&s->offset, t->offset, &t->nested[2], row, s->rows)};
}

// Parameters of the groups of up to BLOCK columns, rounded as the format's arithmetic takes them.
struct BlockParameters {
  bool has_zero, has_scale, has_offset, divides;
  int64_t first;
  float zero[BLOCK / 8 + 4 * LANES], scale[BLOCK / 8 + 4 * LANES], offset[BLOCK / 8 + 4 * LANES];
};

template <int ROUND>
static void read_block(const anybit_shape* s, const anybit_tensors* t, int64_t row, int64_t start, int64_t stop,
                       BlockParameters* q) {
  const RowParameters own = row_parameters(s, t, row);
  q->has_zero = s->zero.kind != ANYBIT_ABSENT, q->has_scale = s->scale.kind != ANYBIT_ABSENT;
  q->has_offset = s->offset.kind != ANYBIT_ABSENT, q->divides = s->scale.inverted != 0;
  q->first = s->group >= s->columns ? 0 : start / s->group;
  const int64_t count = s->group >= s->columns ? 1 : (stop - 1) / s->group + 1 - q->first;
  if (q->has_zero) run_of(own.zero, q->first, count, q->zero);
  if (q->has_scale) run_of(own.scale, q->first, count, q->scale);
  if (q->has_offset) run_of(own.offset, q->first, count, q->offset);
  if (ROUND == ANYBIT_F32) return;
  for (int64_t i = 0; i < count; i += LANES) {
    if (q->has_zero) f_store(q->zero + i, rounded<ROUND>(f_load(q->zero + i)));
    if (q->has_scale) f_store(q->scale + i, rounded<ROUND>(f_load(q->scale + i)));
    if (q->has_offset) f_store(q->offset + i, rounded<ROUND>(f_load(q->offset + i)));
  }
}

// Each operation of the format in its order, rounded as it says.
template <int ROUND>
static ALWAYS_INLINE F weigh(const BlockParameters& q, F level, F middle, F zero, F scale, F offset) {
  F w = rounded<ROUND>(f_add(level, middle));
  if (q.has_zero) w = rounded<ROUND>(f_sub(w, zero));
  if (q.has_scale) w = rounded<ROUND>(q.divides ? f_div(w, scale) : f_mul(w, scale));
  if (q.has_offset) w = rounded<ROUND>(f_add(w, offset));
  return w;
}

// Levels -> weights, in place.
template <int ROUND>
static void weigh_block(const anybit_shape* s, const anybit_tensors* t, int64_t row, int64_t start, int64_t stop,
                        float* numbers) {
  BlockParameters q;
  read_block<ROUND>(s, t, row, start, stop, &q);
  const F middle = f_set(centre(s));
  if (wide_group(s, LANES)) {
    for (int64_t column = start; column < stop;) {
      const int64_t group = s->group >= s->columns ? 0 : column / s->group, g = group - q.first;
      const int64_t end = s->group >= s->columns ? stop : least(stop, (group + 1) * s->group);
      const F zero = f_set(q.zero[g]), scale = f_set(q.scale[g]), offset = f_set(q.offset[g]);
      for (; column < end; column += LANES) {
        float* own = numbers + column - start;
        f_store(own, weigh<ROUND>(q, f_load(own), middle, zero, scale, offset));
      }
    }
    return;
  }
  uint32_t distance[LANES];
  for (int64_t column = start; column < stop; column += LANES) {  // each lane its own group
    const int64_t first = column / s->group;
    for (int64_t i = 0; i < LANES; i++) distance[i] = (uint32_t)(least(column + i, s->columns - 1) / s->group - first);
    const I index = i_load(distance);
    const int64_t g = first - q.first;
    float* own = numbers + column - start;
    f_store(own, weigh<ROUND>(q, f_load(own), middle, f_permute(f_load(q.zero + g), index),
                              f_permute(f_load(q.scale + g), index), f_permute(f_load(q.offset + g), index)));
  }
}

// --- parameters of a run, for products --------------------------------------------------------------------------------------

// A policy's levels are `lift` above the centred ones, in steps of `unit`.
struct Unit { float lift, unit; };

static inline bool needs_sums(const anybit_shape* s, Unit own) {
  return s->zero.kind != ANYBIT_ABSENT || s->offset.kind != ANYBIT_ABSENT || centre(s) != own.lift * own.unit;
}

// What R rows of a run of groups are multiplied with: scales of the levels, and `shift` of the sums of x; rows `pitch` apart.
template <int R> struct Lines {
  static constexpr int64_t ROW = RUN + 4 * LANES;
  int64_t pitch;
  alignas(64) float scale[R * ROW], shift[R * ROW];
};

// Whether the numbers of rows lie one behind the other, whole vectors of them, so that they can be read as one row.
static inline bool adjoins(const anybit_parameter* p, int64_t count) {
  return p->kind == ANYBIT_ABSENT || (p->down == 1 && p->width == count && p->row_stride == count && count % LANES == 0);
}

template <int R>
static NOINLINE void read_lines(const anybit_shape* s, const anybit_tensors* t, Unit own, int64_t row, int64_t first,
                                int64_t count, Lines<R>* lines) {
  static_assert(R * RUN <= TOGETHER, "rows read together");
  constexpr int64_t ROW = Lines<R>::ROW;
  const F middle = f_set(centre(s) - own.lift * own.unit), one = f_set(1.0f), unit = f_set(own.unit);
  const bool has_scale = s->scale.kind != ANYBIT_ABSENT, has_zero = s->zero.kind != ANYBIT_ABSENT;
  const bool has_offset = s->offset.kind != ANYBIT_ABSENT, sums = needs_sums(s, own);
  const bool together = R > 1 && adjoins(&s->scale, count) && adjoins(&s->zero, count) && adjoins(&s->offset, count);
  const int64_t lengths = together ? 1 : R, length = together ? R * count : count;
  alignas(64) float zeros[R * ROW], offsets[R * ROW];
  lines->pitch = together ? count : ROW;
  for (int64_t i = 0; i < lengths; i++) {
    const RowParameters q = row_parameters(s, t, row + i);
    float *scale = lines->scale + i * ROW, *shift = lines->shift + i * ROW, *zero = zeros + i * ROW, *offset = offsets + i * ROW;
    if (has_scale) run_of(q.scale, first, length, scale);
    else
      for (int64_t j = 0; j < length + LANES; j += LANES) f_store(scale + j, one);
    if (s->scale.inverted)
      for (int64_t j = 0; j < length + LANES; j += LANES) f_store(scale + j, f_div(one, f_load(scale + j)));
    if (sums) {
      if (has_zero) run_of(q.zero, first, length, zero);
      if (has_offset) run_of(q.offset, first, length, offset);
      for (int64_t j = 0; j < length; j += LANES) {
        const F found = f_mul(has_zero ? f_sub(middle, f_load(zero + j)) : middle, f_load(scale + j));
        f_store(shift + j, has_offset ? f_add(found, f_load(offset + j)) : found);
      }
      f_store(shift + length, f_zero());
    }
    if (own.unit != 1.0f)
      for (int64_t j = 0; j < length + LANES; j += LANES) f_store(scale + j, f_mul(f_load(scale + j), unit));
  }
}

// total += shift * sum of x, for groups first .. count of a run. Shifts are zero beyond its end.
template <int R, int B>
static ALWAYS_INLINE void add_sums(const Lines<R>& lines, int64_t first, int64_t count, const float* sum, int64_t stride,
                                   F (*total)[B]) {
  for (int64_t i = first; i < count; i += LANES) {
    UNROLLED for (int r = 0; r < R; r++) {
      const F shift = f_load(lines.shift + r * lines.pitch + i);
      UNROLLED for (int b = 0; b < B; b++) total[r][b] = f_fma(shift, f_load(sum + b * stride + i), total[r][b]);
    }
  }
}

// The same with a pitch that is known, for codebooks.
template <int R> struct Runs {
  alignas(64) float scale[R][RUN + 4 * LANES], shift[R][RUN + 4 * LANES];
};

template <int R>
static void read_runs(const anybit_shape* s, const anybit_tensors* t, Unit own, int64_t row, int64_t first, int64_t count,
                      Runs<R>* runs) {
  Lines<1> line;
  const size_t bytes = (size_t)(count + LANES) * sizeof(float);
  for (int r = 0; r < R; r++) {
    read_lines<1>(s, t, own, row + r, first, count, &line);
    memcpy(runs->scale[r], line.scale, bytes);
    if (needs_sums(s, own)) memcpy(runs->shift[r], line.shift, bytes);
  }
}

template <int R, int B>
static ALWAYS_INLINE void add_sums(const Runs<R>& runs, int64_t first, int64_t count, const float* sum, int64_t stride,
                                   F (*total)[B]) {
  for (int64_t i = first; i < count; i += LANES) {
    UNROLLED for (int r = 0; r < R; r++) {
      const F shift = f_load(runs.shift[r] + i);
      UNROLLED for (int b = 0; b < B; b++) total[r][b] = f_fma(shift, f_load(sum + b * stride + i), total[r][b]);
    }
  }
}

// --- inputs and outputs -------------------------------------------------------------------------------------------------------

static inline void put(const anybit_product* p, int64_t n, int64_t row, float value) {
  if (p->bias) value += read_float(p->bias, p->bias_kind, row);
  int64_t at = n * p->y_row + row;
  if (p->accumulate) ((float*)p->y)[at] += value;
  else write_float(p->y, p->y_kind, at, value);
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

static void sum_input(const anybit_shape* s, int64_t count, const float* values, float* sums) {
  memset(sums, 0, (size_t)count * sizeof(float));
  for (int64_t group = 0, start = 0; start < s->columns; group++, start += s->group) {
    F sum = f_zero();
    int64_t stop = least(start + s->group, s->columns), column = start;
    for (; column + LANES <= stop; column += LANES) sum = f_add(sum, f_load(values + column));
    float total = f_sum(sum);
    for (; column < stop; column++) total += values[column];
    sums[group] = total;
  }
}

}  // namespace

#endif
