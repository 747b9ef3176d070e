// Rows of a weight decoded, and products with many rows of x, whatever the variant's `weights_of` reads: 2 * LANES rows of the weight are decoded, packed column by column and multiplied while they
// are in the second cache level; the dense weight never exists. One parallel region for the whole product.
//
//   packed  [column][2 * LANES rows]           float32, or pairs of columns in bfloat16 for a bfloat16 x
//   tile    MANY rows of x  x  2 vectors of weight rows: one load per vector, one broadcast per row of x
#ifndef ANYBIT_GRID_BLOCKS_H
#define ANYBIT_GRID_BLOCKS_H

namespace {

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

static constexpr int64_t TALL = 2 * LANES, DEPTH = BLOCK;  // rows and columns packed at a time
static constexpr int MANY = LANES == 16 ? 12 : VECTORS ? 6 : 4;

struct FloatTile {
  static constexpr int64_t PER_WORD = 1;  // columns in 32 bits
  static ALWAYS_INLINE F add(F acc, const uint32_t* w, const uint32_t* x) {
    float value;
    memcpy(&value, x, 4);
    return f_fma(f_load((const float*)w), f_set(value), acc);
  }
  static void pack(const float* from, uint32_t* to, int64_t words) { memcpy(to, from, (size_t)words * 4); }
};

#ifdef ANYBIT_DOTS
struct HalfTile {
  static constexpr int64_t PER_WORD = 2;
  static ALWAYS_INLINE F add(F acc, const uint32_t* w, const uint32_t* x) {
    int32_t pair;
    memcpy(&pair, x, 4);
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_set1_epi32(pair));
  }
  static void pack(const float* from, uint32_t* to, int64_t words) {
    for (int64_t i = 0; i < words; i += LANES) {
      const __m512bh halves = _mm512_cvtne2ps_pbh(f_load(from + 2 * i + LANES), f_load(from + 2 * i));
      _mm512_storeu_si512(to + i, (__m512i)halves);
    }
  }
};
#endif

// c [M][TALL] += x [M][words] * packed [words][TALL]
template <class T, int M>
static void tile(const uint32_t* packed, int64_t words, const uint32_t* x, int64_t stride, float* c) {
  F acc[M][2];
  UNROLLED16 for (int m = 0; m < M; m++) {
    acc[m][0] = f_load(c + m * TALL);
    acc[m][1] = f_load(c + m * TALL + LANES);
  }
  for (int64_t k = 0; k < words; k++, packed += TALL) {
    UNROLLED16 for (int m = 0; m < M; m++) {
      acc[m][0] = T::add(acc[m][0], packed, x + m * stride + k);
      acc[m][1] = T::add(acc[m][1], packed + LANES, x + m * stride + k);
    }
  }
  UNROLLED16 for (int m = 0; m < M; m++) {
    f_store(c + m * TALL, acc[m][0]);
    f_store(c + m * TALL + LANES, acc[m][1]);
  }
}

// Weights start .. stop of TALL rows, packed; rows beyond the last are zero. `natural`: room for LANES rows of DEPTH floats.
template <class T>
static void pack_rows(const anybit_shape* s, const anybit_tensors* t, const Levels& levels, int64_t row, int64_t start,
                      int64_t stop, float* natural, uint32_t* packed) {
  const int64_t padded = ceil_div(stop - start, LANES) * LANES;
  const int64_t words = ceil_div(padded / T::PER_WORD, LANES) * LANES;
  alignas(64) float some[BLOCK + LANES];
  for (int64_t half = 0; half < TALL; half += LANES) {
    for (int64_t r = 0; r < LANES; r++) {
      uint32_t* own = (uint32_t*)natural + r * DEPTH;
      if (row + half + r >= s->rows) {
        memset(own, 0, (size_t)words * 4);
        continue;
      }
      weights_of(s, t, levels, row + half + r, start, stop, some);
      if (padded < words * T::PER_WORD) memset(some + padded, 0, LANES * sizeof(float));
      T::pack(some, own, words);
    }
    for (int64_t k = 0; k < words; k += LANES)
      transpose((uint32_t*)natural + k, DEPTH, packed + k * TALL + half, TALL);
  }
}

template <class T>
static void multiply_blocks(const anybit_shape* s, const anybit_tensors* t, const anybit_product* p, const Input* in,
                            int64_t row, float* scratch) {
  const Levels levels = read_levels(s, t);
  float* natural = scratch;
  uint32_t* packed = (uint32_t*)(natural + LANES * DEPTH);
  float* c = (float*)packed + DEPTH * TALL;
  memset(c, 0, (size_t)(p->n * TALL) * sizeof(float));
  const uint32_t* x = (const uint32_t*)in->values;
  const int64_t stride = in->value_stride;
  for (int64_t start = 0; start < s->columns; start += DEPTH) {
    const int64_t stop = least(start + DEPTH, s->columns);
    if (!pack_directly<T::PER_WORD>(s, t, row, start, stop, TALL, packed))
      pack_rows<T>(s, t, levels, row, start, stop, natural, packed);
    const int64_t words = ceil_div(stop - start, T::PER_WORD);
    const uint32_t* own = x + start / T::PER_WORD;
    int64_t n = 0;
    for (; n + MANY <= p->n; n += MANY) tile<T, MANY>(packed, words, own + n * stride, stride, c + n * TALL);
    for (; n + 3 <= p->n; n += 3) tile<T, 3>(packed, words, own + n * stride, stride, c + n * TALL);
    for (; n < p->n; n++) tile<T, 1>(packed, words, own + n * stride, stride, c + n * TALL);
  }
  const int64_t rows = least(TALL, s->rows - row);
  if (rows < TALL || p->accumulate || p->y_kind == ANYBIT_F16) {
    for (int64_t n = 0; n < p->n; n++)
      for (int64_t r = 0; r < rows; r++) put(p, n, row + r, c[n * TALL + r]);
    return;
  }
  float bias[TALL];
  for (int64_t r = 0; r < TALL; r++) bias[r] = p->bias ? read_float(p->bias, p->bias_kind, row + r) : 0.0f;
  const F low = f_load(bias), high = f_load(bias + LANES);
  for (int64_t n = 0; n < p->n; n++) {
    const F first = f_add(f_load(c + n * TALL), low), second = f_add(f_load(c + n * TALL + LANES), high);
    const int64_t at = n * p->y_row + row;
    if (p->y_kind == ANYBIT_F32) {
      f_store((float*)p->y + at, first);
      f_store((float*)p->y + at + LANES, second);
    } else {
      f_store_bf16((uint16_t*)p->y + at, first);
      f_store_bf16((uint16_t*)p->y + at + LANES, second);
    }
  }
}

static bool in_halves(const anybit_product* p) {
#ifdef ANYBIT_DOTS
  return p->x_kind == ANYBIT_BF16;
#else
  (void)p;
  return false;
#endif
}

// Whether x can be read where it is: rows of whole words, in the order of the codes.
static bool as_it_is(const anybit_shape* s, const anybit_tensors* t, const anybit_product* p) {
  if (t->permutation || p->x_column != 1) return false;
  if (in_halves(p)) return s->columns % 2 == 0 && p->x_row % 2 == 0 && (uintptr_t)p->x % 4 == 0;
  return p->x_kind == ANYBIT_F32;
}

static void block_sizes(const anybit_shape* s, const anybit_tensors* t, const anybit_product* p, int64_t* row_of_x,
                        int64_t* scratch) {
  *row_of_x = as_it_is(s, t, p) ? 0 : in_halves(p) ? padded_columns(s) / 2 : padded_columns(s);
  *scratch = LANES * DEPTH + DEPTH * TALL + p->n * TALL;
}

static void take_block_input(const anybit_shape* s, const anybit_tensors* t, const anybit_product* p, int64_t n, float* words) {
  if (!in_halves(p)) {
    read_row(s, t, p, n, words);
    return;
  }
  uint16_t* halves = (uint16_t*)words;
  const uint16_t* x = (const uint16_t*)p->x + n * p->x_row;
  for (int64_t j = 0; j < s->columns; j++) {
    const int64_t from = t->permutation ? t->permutation[j] : j;
    halves[j] = from < 0 ? 0 : x[from * p->x_column];
  }
  memset(halves + s->columns, 0, (size_t)(padded_columns(s) - s->columns) * 2);
}

static void multiply_many(const anybit_shape* s, const anybit_tensors* t, const anybit_product* p, const Input* in,
                          int64_t row, float* scratch) {
#ifdef ANYBIT_DOTS
  if (in_halves(p)) return multiply_blocks<HalfTile>(s, t, p, in, row, scratch);
#endif
  multiply_blocks<FloatTile>(s, t, p, in, row, scratch);
}

}  // namespace

#endif
