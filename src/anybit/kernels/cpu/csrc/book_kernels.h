// Products with codebooks: a code names a vector of weights (grid.h). vec_*.h must be included first.
//
//   wide   vectors along a row (AQLM, llama.cpp's lattices): the codes of a span of columns are spread to 16 bits, then LANES
//          columns at a time are fetched from the tables, summed over the books, signed, and multiplied with as many of x
//   pairs  vectors of two (HIGGS), where bytes of a register can be looked up: book_pairs.h
//   points integers along a row (llama.cpp's lattices) where bytes are multiplied in fours: book_lattices.h
//   tall   vectors down a column (VPTQ): one number of x is multiplied with the eight rows that a code names
//   else   weights of a row are made a block at a time
//
// In all of them a group is summed first and scaled after; a zero (IQ1_S) is multiplied with the sums of x.
#ifndef ANYBIT_BOOK_KERNELS_H
#define ANYBIT_BOOK_KERNELS_H

#include "grid_common.h"
#include "vec_eight.h"

namespace {

static constexpr int64_t SPAN = 2048, CODES = 4096;  // columns and codes spread at a time
static constexpr int64_t BEYOND = 64;                // zeros behind them: codes of eight tiles of eight books

// --- codes and signs --------------------------------------------------------------------------------------------------------

template <int BITS> static void spread_codes(const uint8_t* p, const uint8_t* end, int64_t count, uint16_t* out) {
  for (; count > 0; count -= 8, p += BITS, out += 8) {
    if (end - p >= 20) {
      spread_eight<BITS>(p, out);
    } else {
      uint8_t spare[20] = {0};
      if (end > p) memcpy(spare, p, (size_t)(end - p));
      spread_eight<BITS>(spare, out);
    }
  }
}

typedef void (*SpreadCodes)(const uint8_t*, const uint8_t*, int64_t, uint16_t*);
static const SpreadCodes SPREAD_CODES[17] = {
    nullptr,          spread_codes<1>,  spread_codes<2>,  spread_codes<3>,  spread_codes<4>,  spread_codes<5>,
    spread_codes<6>,  spread_codes<7>,  spread_codes<8>,  spread_codes<9>,  spread_codes<10>, spread_codes<11>,
    spread_codes<12>, spread_codes<13>, spread_codes<14>, spread_codes<15>, nullptr};

// Codes first .. first + count of a row of tiles, and BEYOND zeros. `first` is a multiple of eight.
static void codes_of(const anybit_shape* s, const anybit_tensors* t, int64_t tile_row, int64_t first, int64_t count,
                     uint16_t* out) {
  const uint8_t* row = t->codes + tile_row * s->row_bytes;
  const uint8_t* p = row + first * s->bits / 8;
  if (s->bits == 16) {
    memcpy(out, p, (size_t)count * 2);
  } else if (s->bits == 8) {
    spread_bytes(p, count, out);
  } else {
    SPREAD_CODES[s->bits](p, t->codes + s->rows / s->high * s->row_bytes, count, out);
  }
  memset(out + count, 0, BEYOND * sizeof(uint16_t));
}

// Signs of columns start .. stop of a row, a byte for eight; `start` is a multiple of 64. Writes up to 8 bytes beyond.
static void signs_of(const anybit_shape* s, const anybit_tensors* t, int64_t row, int64_t start, int64_t stop, uint8_t* out) {
  const uint8_t* own = t->signs + row * s->sign_bytes;
  const uint8_t* p = own + (s->sign_bits == 1 ? start / 8 : start / 8 * 7 / 8);
  int64_t left = own + s->sign_bytes - p, count = ceil_div(stop - start, 8);
  if (s->sign_bits == 1) {
    memcpy(out, p, (size_t)least(count, left));
    return;
  }
  for (; count > 0; count -= 8, p += 7, left -= 7, out += 8) {
    uint64_t word = 0;
    if (left >= 8) memcpy(&word, p, 8);
    else memcpy(&word, p, (size_t)left);
    uint64_t bytes = sevens(word);
    uint64_t odd = bytes ^ (bytes >> 4 & 0x0F0F0F0F0F0F0F0Full);
    odd ^= odd >> 2 & 0x3333333333333333ull;
    odd ^= odd >> 1 & 0x5555555555555555ull;
    bytes |= (odd & 0x0101010101010101ull) << 7;
    memcpy(out, &bytes, 8);
  }
}

struct Product {
  const anybit_shape* s;
  const anybit_tensors* t;
  const anybit_product* p;
  const Input* in;
  const uint8_t (*planes)[256];  // of a table of pairs
};

}  // namespace

#ifdef ANYBIT_VBMI
#include "book_lattices.h"
#endif

namespace {

// --- vectors along a row -----------------------------------------------------------------------------------------------------

enum BookMode { ANY_BOOKS, ONE_BOOK, TWO_BOOKS, SIGNED_BOOK };

// R rows of spread codes.
template <class T, int WIDE, int MODE, int R> struct Spread {
  static constexpr int64_t PER = WIDE <= LANES ? LANES / WIDE : 1;  // tiles of a step of LANES columns
  const T* table;
  int64_t books, apart;
  uint16_t index[R][CODES + BEYOND];
  uint8_t signs[R][SPAN / 8 + 16];

  explicit Spread(const anybit_shape* s, const anybit_tensors* t)
      : table((const T*)t->table), books(MODE == ANY_BOOKS ? s->books : MODE == TWO_BOOKS ? 2 : 1), apart(s->entries * WIDE) {}

  // Columns that are spread at a time.
  int64_t span() const { return least(SPAN, CODES * WIDE / books / 512 * 512); }

  void take(const anybit_shape* s, const anybit_tensors* t, int64_t row, int64_t start, int64_t stop) {
    for (int64_t r = 0; r < R; r++) {
      codes_of(s, t, row + r, start / WIDE * books, ceil_div(stop - start, WIDE) * books, index[r]);
      if (MODE == SIGNED_BOOK) signs_of(s, t, row + r, start, stop, signs[r]);
    }
  }
  ALWAYS_INLINE F numbers(int r, int64_t step, int64_t k) const {
    const uint16_t* own = index[r] + (WIDE <= LANES ? step * PER : step * LANES / WIDE) * books + k;
    return lanes_at<T, WIDE>(table + k * apart, own, books, step % 2);
  }
  ALWAYS_INLINE F weights(int r, int64_t step) const {
    F sum = numbers(r, step, 0);
    if constexpr (MODE == TWO_BOOKS) sum = f_add(sum, numbers(r, step, 1));
    if constexpr (MODE == ANY_BOOKS)
      for (int64_t k = 1; k < books; k++) sum = f_add(sum, numbers(r, step, k));
    if constexpr (MODE == SIGNED_BOOK) sum = flipped(sum, signs[r] + step * (LANES / 8));
    return sum;
  }
};

// Numbers of columns start .. stop of a row before zero and scale; `start` is a multiple of BLOCK.
template <class T, int WIDE, int MODE>
static void vector_block(const anybit_shape* s, const anybit_tensors* t, int64_t row, int64_t start, int64_t stop, float* out) {
  Spread<T, WIDE, MODE, 1> spread(s, t);
  for (const int64_t span = spread.span(); start < stop; start += span) {
    const int64_t end = least(start + span, stop);
    spread.take(s, t, row, start, end);
    for (int64_t step = 0; step * LANES < end - start; step++, out += LANES) f_store(out, spread.weights(0, step));
  }
}

static inline bool has_shift(const anybit_shape* s) {
  return s->zero.kind != ANYBIT_ABSENT || s->offset.kind != ANYBIT_ABSENT;
}

// Products of `count` groups of STEPS steps each (0: `steps`), from a step on; total += scale * (sum of weights * x).
template <int STEPS, int R, int B, class S>
static ALWAYS_INLINE void product_groups(const S& spread, int64_t step, int64_t steps, int64_t count, const float* x,
                                         int64_t stride, const Runs<R>& runs, int64_t g, F (*total)[B]) {
  constexpr int CHAINS = B == 1 ? 2 : 1;
  for (; count > 0; count--, g++) {
    F acc[R][B][CHAINS];
    UNROLLED for (int r = 0; r < R; r++)
      UNROLLED for (int b = 0; b < B; b++)
        UNROLLED for (int c = 0; c < CHAINS; c++) acc[r][b][c] = f_zero();
    const auto take = [&](int c) INLINE_LAMBDA {
      UNROLLED for (int r = 0; r < R; r++) {
        const F w = spread.weights(r, step);
        UNROLLED for (int b = 0; b < B; b++) acc[r][b][c] = f_fma(w, f_load(x + b * stride), acc[r][b][c]);
      }
      step++, x += LANES;
    };
    if constexpr (STEPS != 0) {
      UNROLLED for (int i = 0; i < STEPS; i++) take(i % CHAINS);
    } else {
      int64_t i = 0;
      for (; i + 2 <= steps; i += 2) take(0), take(CHAINS - 1);
      if (i < steps) take(0);
    }
    UNROLLED for (int r = 0; r < R; r++) {
      const F scale = f_set(runs.scale[r][g]);
      UNROLLED for (int b = 0; b < B; b++) {
        F sum = acc[r][b][0];
        if constexpr (CHAINS == 2 && STEPS != 1) sum = f_add(sum, acc[r][b][1]);
        total[r][b] = f_fma(sum, scale, total[r][b]);
      }
    }
  }
}

// R rows of the weight, B rows of x; groups of whole steps.
template <class T, int WIDE, int MODE, int R, int B> static void product_wide(const Product& q, int64_t row, int64_t n) {
  const anybit_shape* s = q.s;
  const bool sums = has_shift(s), one_group = s->group >= s->columns;
  const int64_t stride = q.in->value_stride, sum_stride = q.in->sum_stride;
  const float* x = q.in->values + n * stride;
  const float* sum = q.in->sums + n * sum_stride;
  F total[R][B];
  UNROLLED for (int r = 0; r < R; r++)
    UNROLLED for (int b = 0; b < B; b++) total[r][b] = f_zero();
  Spread<T, WIDE, MODE, R> spread(s, q.t);
  Runs<R> runs;
  const int64_t group = one_group ? s->columns : s->group, groups = ceil_div(s->columns, group), span = spread.span();
  const int64_t per_group = ceil_div(group, LANES);
  for (int64_t base = 0; base < groups; base += RUN) {
    const int64_t count = least(RUN, groups - base), last = least((base + count) * group, s->columns);
    read_runs<R>(s, q.t, Unit{0.0f, 1.0f}, row, base, count, &runs);
    if (sums) add_sums<R, B>(runs, 0, count, sum + base, sum_stride, total);
    for (int64_t start = base * group; start < last; start += span) {
      const int64_t stop = least(start + span, last);
      spread.take(s, q.t, row, start, stop);
      if (span % group == 0 && per_group <= 4 && per_group != 3) {
        const int64_t g = start / group - base, many = ceil_div(stop - start, group);
        if (per_group == 1) product_groups<1, R, B>(spread, 0, 1, many, x + start, stride, runs, g, total);
        else if (per_group == 2) product_groups<2, R, B>(spread, 0, 2, many, x + start, stride, runs, g, total);
        else product_groups<4, R, B>(spread, 0, 4, many, x + start, stride, runs, g, total);
        continue;
      }
      for (int64_t column = start; column < stop;) {
        const int64_t g = column / group, end = least(stop, (g + 1) * group);
        product_groups<0, R, B>(spread, (column - start) / LANES, ceil_div(end - column, LANES), 1, x + column, stride, runs,
                                g - base, total);
        column = end;
      }
    }
  }
  UNROLLED for (int r = 0; r < R; r++)
    UNROLLED for (int b = 0; b < B; b++) put(q.p, n + b, row + r, f_sum(total[r][b]));
}

}  // namespace

#include "book_pairs.h"

namespace {

// --- vectors down a column ---------------------------------------------------------------------------------------------------

static constexpr int64_t TALLEST = 16;  // rows of a vector

// Scales of the rows of one vector.
static void tall_scales(const anybit_shape* s, const anybit_tensors* t, int64_t row, float* scales) {
  Runs<1> runs;
  for (int64_t r = 0; r < TALLEST; r++) scales[r] = 1.0f;
  if (s->scale.kind == ANYBIT_ABSENT) return;
  for (int64_t r = 0; r < s->high; r++) {
    read_runs<1>(s, t, Unit{0.0f, 1.0f}, row + r, 0, 1, &runs);
    scales[r] = runs.scale[0][0];
  }
}

// All rows of a vector (P times eight; a table may be read up to seven numbers beyond its end), B rows of x.
template <class T, int P, int B> static void product_tall(const Product& q, int64_t row, int64_t n) {
  constexpr int CHAINS = B == 1 ? 4 / P : 1;
  const anybit_shape* s = q.s;
  const int64_t books = s->books, high = s->high, apart = s->entries * high, stride = q.in->value_stride;
  const int64_t span = least(SPAN, CODES / books / 8 * 8);
  const float* x = q.in->values + n * stride;
  E acc[B][P][CHAINS];
  UNROLLED for (int b = 0; b < B; b++)
    UNROLLED for (int p = 0; p < P; p++)
      UNROLLED for (int c = 0; c < CHAINS; c++) acc[b][p][c] = e_zero();
  uint16_t index[CODES + BEYOND];
  for (int64_t start = 0; start < s->columns; start += span) {
    const int64_t count = least(span, s->columns - start);
    codes_of(s, q.t, row / high, start * books, count * books, index);
    for (int64_t k = 0; k < books; k++) {
      const T* table = (const T*)q.t->table + k * apart;
      int64_t column = 0;
      const auto step = [&](int c) INLINE_LAMBDA {
        const T* own = table + high * (int64_t)index[column * books + k];
        UNROLLED for (int p = 0; p < P; p++) {
          const E w = e_one(own + 8 * p);
          UNROLLED for (int b = 0; b < B; b++)
            acc[b][p][c] = e_fma(w, e_set(x[b * stride + start + column]), acc[b][p][c]);
        }
        column++;
      };
      for (; column + CHAINS <= count;)
        UNROLLED for (int c = 0; c < CHAINS; c++) step(c);
      for (; column < count;) step(0);
    }
  }
  float numbers[TALLEST], scales[TALLEST];
  tall_scales(s, q.t, row, scales);
  UNROLLED for (int b = 0; b < B; b++) {
    UNROLLED for (int p = 0; p < P; p++) {
      for (int c = 1; c < CHAINS; c++) acc[b][p][0] = e_add(acc[b][p][0], acc[b][p][c]);
      e_store(numbers + 8 * p, acc[b][p][0]);
    }
    for (int64_t r = 0; r < high; r++) put(q.p, n + b, row + r, numbers[r] * scales[r]);
  }
}

// --- choosing -----------------------------------------------------------------------------------------------------------------

typedef void (*Tile)(const Product&, int64_t row, int64_t n);
typedef void (*VectorBlock)(const anybit_shape*, const anybit_tensors*, int64_t, int64_t, int64_t, float*);
struct BookTiles {
  VectorBlock block;
  Tile two_one, one_one, one_four;
};
template <class T, int WIDE, int MODE> struct Wide {
  static constexpr BookTiles tiles = {vector_block<T, WIDE, MODE>, product_wide<T, WIDE, MODE, 2, 1>,
                                      product_wide<T, WIDE, MODE, 1, 1>, product_wide<T, WIDE, MODE, 1, 4>};
};
#ifdef ANYBIT_VBMI
template <int BITS> struct Pairs {
  static constexpr BookTiles tiles[4] = {
      {},
      {nullptr, product_pairs<BITS, 2, 1>, product_pairs<BITS, 1, 1>, product_pairs<BITS, 1, 4>},
      {nullptr, product_apart<Half, BITS, 2, 1>, product_apart<Half, BITS, 1, 1>, product_apart<Half, BITS, 1, 4>},
      {nullptr, product_apart<Brain, BITS, 2, 1>, product_apart<Brain, BITS, 1, 1>, product_apart<Brain, BITS, 1, 4>}};
};
static const BookTiles* pair_tiles(const anybit_shape* s, PairWay way) {
  return (s->bits == 4 ? Pairs<4>::tiles : s->bits == 6 ? Pairs<6>::tiles : Pairs<8>::tiles) + way;
}
#else
static const BookTiles* pair_tiles(const anybit_shape*, PairWay) { return nullptr; }
#endif

// Null for books that are read number by number: what no format has.
static const BookTiles* book_tiles(const anybit_shape* s) {
  if (s->high != 1) return nullptr;
  const bool one = s->books == 1;
  if (s->table_kind == ANYBIT_F16 || s->table_kind == ANYBIT_BF16) {  // large tables
    const bool half = s->table_kind == ANYBIT_F16;
    if (!one || s->sign_bits) return nullptr;
    if (s->wide == 8) return half ? &Wide<Half, 8, ONE_BOOK>::tiles : &Wide<Brain, 8, ONE_BOOK>::tiles;
    if (s->wide == 16) return half ? &Wide<Half, 16, ONE_BOOK>::tiles : &Wide<Brain, 16, ONE_BOOK>::tiles;
    return nullptr;
  }
  if (s->sign_bits) {
    if (!one) return nullptr;
    return s->wide == 8 ? &Wide<float, 8, SIGNED_BOOK>::tiles : s->wide == 4 ? &Wide<float, 4, SIGNED_BOOK>::tiles : nullptr;
  }
  switch (s->wide) {
    case 2: return one ? &Wide<float, 2, ONE_BOOK>::tiles : &Wide<float, 2, ANY_BOOKS>::tiles;
    case 4: return one ? &Wide<float, 4, ONE_BOOK>::tiles : &Wide<float, 4, ANY_BOOKS>::tiles;
    case 8:
      return one ? &Wide<float, 8, ONE_BOOK>::tiles : s->books == 2 ? &Wide<float, 8, TWO_BOOKS>::tiles : &Wide<float, 8, ANY_BOOKS>::tiles;
    case 16: return &Wide<float, 16, ANY_BOOKS>::tiles;
  }
  return nullptr;
}

static bool is_tall(const anybit_shape* s) {
  return s->wide == 1 && s->high > 1 && s->high <= TALLEST && s->group >= s->columns && !s->sign_bits &&
         !has_shift(s);
}

struct TallTiles { Tile one, four; };
template <class T> static TallTiles tall_tiles(const anybit_shape* s) {
  if (s->high <= 8) return {product_tall<T, 1, 1>, product_tall<T, 1, 4>};
  return {product_tall<T, 2, 1>, product_tall<T, 2, 4>};
}

// Number by number: any vector.
static void number_block(const anybit_shape* s, const anybit_tensors* t, int64_t row, int64_t start, int64_t stop, float* out) {
  const int64_t books = s->books, apart = s->entries * s->high * s->wide, inside = row % s->high * s->wide;
  uint16_t index[CODES + BEYOND];
  uint8_t signs[BLOCK / 8 + 16];
  if (s->sign_bits) signs_of(s, t, row, start, stop, signs);
  const int64_t span = CODES / books / 64 * 64;  // tiles; blocks are whole tiles
  for (int64_t first = start / s->wide, last = ceil_div(stop, s->wide); first < last; first += span) {
    const int64_t count = least(span, last - first);
    codes_of(s, t, row / s->high, first * books, count * books, index);
    for (int64_t tile = 0; tile < count; tile++)
      for (int64_t c = 0; c < s->wide; c++) {
        const int64_t column = (first + tile) * s->wide + c - start;
        if (column >= stop - start) continue;
        float sum = 0.0f;
        for (int64_t k = 0; k < books; k++) {
          const int64_t at = k * apart + index[tile * books + k] * s->high * s->wide + inside + c;
          const float number = read_float(t->table, s->table_kind, at);
          sum = k ? sum + number : number;
        }
        out[column] = s->sign_bits && signs[column / 8] >> (column % 8) & 1 ? -sum : sum;
      }
  }
}

struct Levels {};
static Levels read_levels(const anybit_shape*, const anybit_tensors*) { return {}; }

// Weights of columns start .. stop, `out` with room for BLOCK floats; zeros up to the next multiple of LANES.
static void weights_of(const anybit_shape* s, const anybit_tensors* t, const Levels&, int64_t row, int64_t start, int64_t stop,
                       float* out) {
  const BookTiles* tiles = book_tiles(s);
  (tiles ? tiles->block : number_block)(s, t, row, start, stop, out);
  if (s->scale.kind != ANYBIT_ABSENT) weigh_block<ANYBIT_F32>(s, t, row, start, stop, out);
  for (int64_t i = stop - start; i % LANES; i++) out[i] = 0;  // what was there may not even be a number
}

#ifdef ANYBIT_DOTS
static bool pairs_of(const anybit_shape*, const anybit_tensors*, const Levels&, int64_t, int64_t, int64_t, uint32_t*) {
  return false;
}
#endif

// Vectors down a column are the packed form of grid_blocks.h already: false for others. `tall` rows from `row` on.
template <class T, int64_t PER_WORD>
static void pack_tall(const anybit_shape* s, const anybit_tensors* t, int64_t row, int64_t start, int64_t stop, int64_t tall,
                      float* packed) {
  const int64_t high = s->high, books = s->books, apart = s->entries * high, span = CODES / books / 8 * 8;
  uint16_t index[CODES + BEYOND];
  float scales[TALLEST];
  for (int64_t down = 0; down < tall; down += high) {
    if (row + down >= s->rows) {
      for (int64_t word = 0; word < ceil_div(stop - start, PER_WORD); word++)
        memset(packed + word * tall + down, 0, (size_t)high * sizeof(float));
      continue;
    }
    tall_scales(s, t, row + down, scales);
    for (int64_t first = start; first < stop; first += span) {
      const int64_t count = least(span, stop - first);
      codes_of(s, t, (row + down) / high, first * books, count * books, index);
      const auto weights = [&](int64_t column, int64_t rows) INLINE_LAMBDA {
        const T* table = (const T*)t->table + rows;
        E sum = e_one(table + high * (int64_t)index[column * books]);
        for (int64_t k = 1; k < books; k++)
          sum = e_add(sum, e_one(table + k * apart + high * (int64_t)index[column * books + k]));
        return e_mul(sum, e_load(scales + rows));
      };
      for (int64_t column = 0; column < count; column += PER_WORD) {
        float* to = packed + (first - start + column) / PER_WORD * tall + down;
        for (int64_t rows = 0; rows < high; rows += 8) {
          const E even = weights(column, rows);
          if constexpr (PER_WORD == 1) e_store(to + rows, even);
#ifdef ANYBIT_DOTS
          else e_store_pairs((uint32_t*)to + rows, even, column + 1 < count ? weights(column + 1, rows) : e_zero());
#endif
        }
      }
    }
  }
}

template <int64_t PER_WORD>
static bool pack_directly(const anybit_shape* s, const anybit_tensors* t, int64_t row, int64_t start, int64_t stop,
                          int64_t tall, uint32_t* packed) {
  if (!is_tall(s) || s->high % 8 || tall % s->high) return false;
  if (s->table_kind == ANYBIT_F16) pack_tall<Half, PER_WORD>(s, t, row, start, stop, tall, (float*)packed);
  else if (s->table_kind == ANYBIT_BF16) pack_tall<Brain, PER_WORD>(s, t, row, start, stop, tall, (float*)packed);
  else pack_tall<float, PER_WORD>(s, t, row, start, stop, tall, (float*)packed);
  return true;
}

// The weights of one row, made a block at a time, and one row of x.
static void product_by_blocks(const Product& q, int64_t row, int64_t n) {
  F total = f_zero();
  const float* x = q.in->values + n * q.in->value_stride;
  alignas(64) float weights[BLOCK + LANES];
  for (int64_t start = 0; start < q.s->columns; start += BLOCK) {
    const int64_t stop = least(start + BLOCK, q.s->columns);
    weights_of(q.s, q.t, Levels(), row, start, stop, weights);
    for (int64_t i = 0; i < stop - start; i += LANES) total = f_fma(f_load(weights + i), f_load(x + start + i), total);
  }
  put(q.p, n, row, f_sum(total));
}

static void multiply(const anybit_shape* s, const anybit_tensors* t, const anybit_product* p, const Input* in, int64_t row,
                     int64_t last_row) {
  uint8_t planes[4][256];
  const PairWay pairs = pair_way(s, t, p);
  if (pairs) read_planes(s, t, pairs, planes);
  const Product q = {s, t, p, in, planes};
#ifdef ANYBIT_VBMI
  if (const LatticeTiles* lattice = lattice_of(s)) return multiply_lattice(lattice, q, row, last_row);
#endif
  if (is_tall(s)) {
    const TallTiles tiles = s->table_kind == ANYBIT_F16    ? tall_tiles<Half>(s)
                            : s->table_kind == ANYBIT_BF16 ? tall_tiles<Brain>(s)
                                                           : tall_tiles<float>(s);
    for (; row < last_row; row += s->high) {
      int64_t n = 0;
      for (; n + 4 <= p->n; n += 4) tiles.four(q, row, n);
      for (; n < p->n; n++) tiles.one(q, row, n);
    }
    return;
  }
  const BookTiles* tiles = pairs ? pair_tiles(s, pairs) : wide_group(s, LANES) ? book_tiles(s) : nullptr;
  while (row < last_row) {
    if (tiles && p->n == 1 && row + 2 <= last_row) {
      tiles->two_one(q, row, 0);
      row += 2;
      continue;
    }
    int64_t n = 0;
    if (tiles)
      for (; n + 4 <= p->n; n += 4) tiles->one_four(q, row, n);
    for (; n < p->n; n++) (tiles ? tiles->one_one : product_by_blocks)(q, row, n);
    row++;
  }
}

// --- inputs -------------------------------------------------------------------------------------------------------------------

static int64_t sum_count(const anybit_shape* s) {
  return has_shift(s) ? (ceil_div(ceil_div(s->columns, s->group), LANES) + 1) * LANES : 0;
}

static void sizes(const anybit_shape* s, const anybit_tensors*, const anybit_product*, int64_t* values, int64_t* sums) {
  *values = padded_columns(s);
  *sums = sum_count(s);
}

static void take_input(const anybit_shape* s, const anybit_tensors* t, const anybit_product* p, int64_t n, float* values,
                       float* sums) {
  read_row(s, t, p, n, values);
  if (int64_t count = sum_count(s)) sum_input(s, count, values, sums);
  if (const PairWay pairs = pair_way(s, t, p)) pair_input(padded_columns(s), pairs, values);
#ifdef ANYBIT_VBMI
  if (const LatticeTiles* lattice = lattice_of(s)) lattice_input(lattice, p, s->columns, values);
#endif
}

}  // namespace

#endif
