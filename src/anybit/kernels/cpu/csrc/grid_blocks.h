// Rows of a weight decoded, and products with many rows of x, whatever the variant's `weights_of` reads: 2 * LANES rows of the weight are decoded, packed column by column and multiplied while they
// are in the second cache level; the dense weight never exists. One parallel region for the whole product.
//
//   packed  [column][2 * LANES rows]           float32, or pairs of columns in bfloat16 for a bfloat16 x
//   tile    up to MANY rows of x  x  2 vectors of weight rows: one load per vector, one broadcast per row of x
//   x       a panel for each tile, [column][rows]: rows as they are may lie a power of two apart, in one set of the first cache
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

static constexpr int64_t NATURAL = DEPTH + LANES;
static constexpr int MANY = LANES == 16 ? 12 : VECTORS ? 6 : 4;

struct FloatTile {
  static constexpr int64_t PER_WORD = 1;  // columns in 32 bits
  static ALWAYS_INLINE F add(F acc, const uint32_t* w, const uint32_t* x) {
    float value;
    memcpy(&value, x, 4);
    return f_fma(f_load((const float*)w), f_set(value), acc);
  }
  static void pack(const float* from, uint32_t* to, int64_t words) { memcpy(to, from, (size_t)words * 4); }
  static bool direct(const anybit_shape*, const anybit_tensors*, const Levels&, int64_t, int64_t, int64_t, uint32_t*) {
    return false;
  }
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
  static bool direct(const anybit_shape* s, const anybit_tensors* t, const Levels& levels, int64_t row, int64_t start,
                     int64_t stop, uint32_t* to) {
    return pairs_of(s, t, levels, row, start, stop, to);
  }
};
#endif

// c [M][TALL] += x [words][M] * packed [words][TALL]
template <class T, int M> static void tile(const uint32_t* packed, int64_t words, const uint32_t* x, float* c) {
  F acc[M][2];
  UNROLLED16 for (int m = 0; m < M; m++) {
    acc[m][0] = f_load(c + m * TALL);
    acc[m][1] = f_load(c + m * TALL + LANES);
  }
  for (int64_t k = 0; k < words; k++, packed += TALL, x += M) {
    UNROLLED16 for (int m = 0; m < M; m++) {
      acc[m][0] = T::add(acc[m][0], packed, x + m);
      acc[m][1] = T::add(acc[m][1], packed + LANES, x + m);
    }
  }
  UNROLLED16 for (int m = 0; m < M; m++) {
    f_store(c + m * TALL, acc[m][0]);
    f_store(c + m * TALL + LANES, acc[m][1]);
  }
}

typedef void (*BlockTile)(const uint32_t*, int64_t, const uint32_t*, float*);
template <class T, int M> static BlockTile block_tile(int64_t rows) {
  if constexpr (M == 1) return tile<T, 1>;
  else return rows == M ? tile<T, M> : block_tile<T, M - 1>(rows);
}

// Rows of x are shared among as few tiles as can hold them, as evenly as they can be.
struct TileRows { int64_t start, count; };
static inline TileRows tile_rows(int64_t n, int64_t i) {
  const int64_t tiles = ceil_div(n, MANY), each = n / tiles, more = n % tiles;
  return {i * each + least(i, more), each + (i < more)};
}
static inline int64_t tile_of(int64_t n, int64_t row) {
  const int64_t tiles = ceil_div(n, MANY), each = n / tiles, more = n % tiles, large = more * (each + 1);
  return row < large ? row / (each + 1) : more + (row - large) / each;
}

// Weights start .. stop of TALL rows, packed; rows beyond the last are zero. `natural`: room for LANES rows of NATURAL words.
template <class T>
static void pack_rows(const anybit_shape* s, const anybit_tensors* t, const Levels& levels, int64_t row, int64_t start,
                      int64_t stop, float* natural, uint32_t* packed) {
  const int64_t padded = ceil_div(stop - start, LANES) * LANES;
  const int64_t words = ceil_div(padded / T::PER_WORD, LANES) * LANES;
  constexpr int64_t PITCH = DEPTH / T::PER_WORD + LANES;  // no power of two: rows would fight for one set of the first cache
  alignas(64) float some[BLOCK + LANES];
  for (int64_t half = 0; half < TALL; half += LANES) {
    for (int64_t r = 0; r < LANES; r++) {
      uint32_t* own = (uint32_t*)natural + r * PITCH;
      if (row + half + r >= s->rows) {
        memset(own, 0, (size_t)words * 4);
        continue;
      }
      if (T::direct(s, t, levels, row + half + r, start, stop, own)) continue;
      weights_of(s, t, levels, row + half + r, start, stop, some);
      if (padded < words * T::PER_WORD) memset(some + padded, 0, LANES * sizeof(float));
      T::pack(some, own, words);
    }
    for (int64_t k = 0; k < words; k += LANES)
      transpose((uint32_t*)natural + k, PITCH, packed + k * TALL + half, TALL);
  }
}

template <class T>
static void multiply_blocks(const anybit_shape* s, const anybit_tensors* t, const anybit_product* p, const Input* in,
                            int64_t row, float* scratch) {
  const Levels levels = read_levels(s, t);
  float* natural = scratch;
  uint32_t* packed = (uint32_t*)(natural + LANES * NATURAL);
  float* c = (float*)packed + DEPTH * TALL;
  memset(c, 0, (size_t)(p->n * TALL) * sizeof(float));
  const uint32_t* x = (const uint32_t*)in->values;
  const int64_t stride = in->value_stride, tiles = ceil_div(p->n, MANY);
  for (int64_t start = 0; start < s->columns; start += DEPTH) {
    const int64_t stop = least(start + DEPTH, s->columns);
    if (!pack_directly<T::PER_WORD>(s, t, row, start, stop, TALL, packed))
      pack_rows<T>(s, t, levels, row, start, stop, natural, packed);
    const int64_t words = ceil_div(stop - start, T::PER_WORD);
    for (int64_t i = 0; i < tiles; i++) {
      const TileRows own = tile_rows(p->n, i);
      const uint32_t* panel = x + own.start * stride + start / T::PER_WORD * own.count;
      block_tile<T, MANY>(own.count)(packed, words, panel, c + own.start * TALL);
    }
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

// Words of a row of x, in panels.
static int64_t panel_words(const anybit_shape* s, const anybit_product* p) {
  return in_halves(p) ? padded_columns(s) / 2 : padded_columns(s);
}

static void block_sizes(const anybit_shape* s, const anybit_tensors*, const anybit_product* p, int64_t* row_of_x, int64_t* scratch) {
  *row_of_x = panel_words(s, p);
  *scratch = LANES * NATURAL + DEPTH * TALL + p->n * TALL;
}

// Row n of x into its tile's panel; `words`: all panels.
static void take_block_input(const anybit_shape* s, const anybit_tensors* t, const anybit_product* p, int64_t n, float* words) {
  const TileRows own = tile_rows(p->n, tile_of(p->n, n));
  float* to = words + own.start * panel_words(s, p) + n - own.start;
  const auto column_at = [&](int64_t j) { return t->permutation ? (int64_t)t->permutation[j] : j; };
  const bool plain = !t->permutation && p->x_column == 1;
  if (!in_halves(p)) {
    int64_t j = 0;
    if (plain && p->x_kind == ANYBIT_F32)
      for (const float* x = (const float*)p->x + n * p->x_row; j < s->columns; j++, to += own.count) *to = x[j];
    for (; j < s->columns; j++, to += own.count) {
      const int64_t from = column_at(j);
      *to = from < 0 ? 0.0f : read_float(p->x, p->x_kind, n * p->x_row + from * p->x_column);
    }
    return;
  }
  const uint16_t* x = (const uint16_t*)p->x + n * p->x_row;
  const auto half_at = [&](int64_t j) -> uint32_t {
    const int64_t from = j < s->columns ? column_at(j) : -1;
    return from < 0 ? 0 : x[from * p->x_column];
  };
  int64_t j = 0;
  if (plain)
    for (; j + 2 <= s->columns; j += 2, to += own.count) memcpy(to, x + j, 4);
  for (; j < s->columns; j += 2, to += own.count) *to = float_of_bits(half_at(j) | half_at(j + 1) << 16);
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
