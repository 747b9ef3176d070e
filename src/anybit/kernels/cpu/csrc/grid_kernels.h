// Products with a Grid, written once over the vector types of a variant (vec_*.h must be included first).
//
// Two kinds of inner loops:
//
//   lanes    float32 arithmetic, each lane of a vector holding adjacent columns of one row, so that it has one scale as long as
//            groups are multiples of eight columns; x is laid out to match. A chunk is what one step takes:
//
//              lane          0        1        2
//              codes      0 ..  7   8 .. 15  16 .. 23      up to 4 bits: 8 * LANES columns
//              codes      0 ..  3   4 ..  7   8 .. 11      5 to 8 bits: 4 * LANES columns
//
//            A policy (By...) says how a chunk meets x: as floats, as pairs of bfloat16, as bytes in fours.
//
//   natural  everything else: LANES codes in order, made into numbers by the format's own arithmetic (each operation
//            rounded as `compute` says) or, in float32 with whole groups of lanes, summed first and scaled after.
//
// What is the same for a whole group (zero points, offsets, a constant that keeps codes unsigned) is left out of the loops and
// multiplied once with the group's sum of x. Policies centre codes where they can (the level is code - 2**(bits - 1)), which
// keeps the part of the sum that a zero point cancels small.
#ifndef ANYBIT_GRID_KERNELS_H
#define ANYBIT_GRID_KERNELS_H

#include "grid_limbs.h"
#include "grid_turned.h"

namespace {

// Rows of x from which unpacking codes to floats once for several rows is less work than three products of bytes for each.
static constexpr int64_t FEW = 4;

// How a product is done.
enum Way { EXACTLY, SUMS, FLOATS, PAIRS, WIDE_PAIRS, LIMBS, BYTES, TABLES, SPLIT_TABLES };

static inline Way way_of(const anybit_shape* s, const anybit_tensors* t, const anybit_product* p) {
#ifdef ANYBIT_DOTS
  const bool tables = s->compute == ANYBIT_BF16 && s->bits == 4 && !s->scale.inverted && wide_group(s, 64);
  if (tables && p->x_kind == ANYBIT_BF16) return TABLES;
  if (tables && p->x_kind == ANYBIT_F32) return SPLIT_TABLES;
#endif
  if (s->compute != ANYBIT_F32) return EXACTLY;
  const bool integers = s->levels == ANYBIT_UNSIGNED || s->levels == ANYBIT_SIGNED;
  const bool table = s->levels == ANYBIT_TABLE && s->bits == 4;
  if (p->fast && (integers || table) && limbs_fit(s)) return BYTES;
  const bool few = VECTORS && (p->n < FEW || s->bits > 4) && limbs_fit(s);
#ifdef ANYBIT_DOTS
  if (p->x_kind == ANYBIT_BF16 && s->bits <= 4 && !(few && integers && s->bits <= 2)) return PAIRS;
  if (p->x_kind == ANYBIT_BF16 && s->bits < 8 && s->bits > 4 && integers) return WIDE_PAIRS;
#endif
  if (few && ((integers && s->bits < 8) || (table && step_of_table(t->table) > 0))) return LIMBS;
  if (s->bits <= 4) return FLOATS;
  // natural order: each group a whole number of vectors
  return s->levels != ANYBIT_TABLE && wide_group(s, LANES) ? SUMS : EXACTLY;
}

// --- products ---------------------------------------------------------------------------------------------------------------

struct Product {
  const anybit_shape* s;
  const anybit_tensors* t;
  const anybit_product* p;
  const Input* in;
  Levels levels;
};

}  // namespace

#include "grid_tables.h"

namespace {

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

// float32, groups of whole vectors: sum_g scale_g * (sum levels * x) + shift_g * sum x.
template <int SOURCE, int UNIT, int R, int B> static void product_sums(const Product& q, int64_t row, int64_t n) {
  constexpr int BITS = bits_of_source<SOURCE>();
  const anybit_shape* s = q.s;
  const Unit own_unit = {0.0f, 1.0f};
  const bool sums = needs_sums(s, own_unit);
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
  Lines<R> lines;
  const int64_t groups = ceil_div(s->columns, s->group);
  for (int64_t base = 0; base < groups; base += RUN) {
    const int64_t count = least(RUN, groups - base);
    read_lines<R>(s, q.t, own_unit, row, base, count, &lines);
    if (sums) add_sums<R, B>(lines, 0, count, sum + base, sum_stride, total);
    for (int64_t g = 0; g < count; g++) {
      const int64_t start = (base + g) * s->group, stop = least(start + s->group, s->columns);
      F acc[R][B];
      UNROLLED for (int r = 0; r < R; r++)
        UNROLLED for (int b = 0; b < B; b++) acc[r][b] = f_zero();
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
        const F scale = f_set(lines.scale[r * lines.pitch + g]);
        UNROLLED for (int b = 0; b < B; b++) total[r][b] = f_fma(acc[r][b], scale, total[r][b]);
      }
    }
  }
  UNROLLED for (int r = 0; r < R; r++)
    UNROLLED for (int b = 0; b < B; b++) put(q.p, n + b, row + r, f_sum(total[r][b]));
}

// --- policies: how the codes of a chunk meet x ------------------------------------------------------------------------------

// Up to 4 bits in float32: eight steps of LANES products.
template <int WIDTH> struct ByFloats {
  static constexpr int BITS = WIDTH;
  static constexpr int64_t PER_LANE = 8, CHUNK_BYTES = CHUNK * sizeof(float);
  typedef Lut Table;
  static Table table(const Levels& levels) { return levels.lut; }
  static Unit unit(const anybit_shape*, const Levels&) { return {0.0f, 1.0f}; }
  static const char* x(const anybit_shape*, const float* values) { return (const char*)values; }

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
  static ALWAYS_INLINE void steps(const Table& lut, const uint8_t* p, int64_t pitch, const char* x, int64_t stride,
                                  F (*acc)[B]) {
    I raw[R];
    UNROLLED for (int r = 0; r < R; r++) raw[r] = chunk_load<BITS>(p + r * pitch);
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
static ALWAYS_INLINE F pair_dot(F sum, I levels, I x) { return _mm512_dpbf16_ps(sum, (__m512bh)levels, (__m512bh)x); }

// The same for a bfloat16 x: four steps of 2 * LANES products, summed in pairs into float32. Levels that bfloat16 cannot hold
// (NF4) are rounded to it, as a dense weight of that dtype would be.
//
//   lane (32 bits)   high half: codes 4 .. 7   low half: codes 0 .. 3    x block k (k = 0..3): pairs (x[k], x[4 + k]), ...
template <int WIDTH> struct ByPairs {
  static constexpr int BITS = WIDTH;
  static constexpr int64_t PER_LANE = 8, CHUNK_BYTES = CHUNK * 2;
  typedef I Table;
  static Table table(const Levels& levels) { return _mm512_loadu_si512(levels.halves); }
  static Unit unit(const anybit_shape*, const Levels&) { return {0.0f, 1.0f}; }
  static const char* x(const anybit_shape*, const float* values) { return (const char*)values; }

  template <int K, int R, int B>
  static ALWAYS_INLINE void step(const Table& table, const I* raw, const char* x, int64_t stride, F (*acc)[B]) {
    I own[B];
    UNROLLED for (int b = 0; b < B; b++) own[b] = _mm512_loadu_si512(x + b * stride + K * 4 * LANES);
    UNROLLED for (int r = 0; r < R; r++) {
      // five bits are looked at: entries are repeated
      const I level = _mm512_permutexvar_epi16(_mm512_srli_epi16(raw[r], BITS * K), table);
      UNROLLED for (int b = 0; b < B; b++) acc[r][b] = pair_dot(acc[r][b], level, own[b]);
    }
  }
  template <int R, int B>
  static ALWAYS_INLINE void steps(const Table& table, const uint8_t* p, int64_t pitch, const char* x, int64_t stride,
                                  F (*acc)[B]) {
    I raw[R];
    UNROLLED for (int r = 0; r < R; r++) {
      raw[r] = chunk_load<BITS>(p + r * pitch);
      if constexpr (BITS < 4)
        raw[r] = _mm512_ternarylogic_epi32(i_set(0xFFFF0000u), i_left<16 - 4 * BITS>(raw[r]), raw[r], 0xCA);
    }
    step<0, R, B>(table, raw, x, stride, acc);
    step<1, R, B>(table, raw, x, stride, acc);
    step<2, R, B>(table, raw, x, stride, acc);
    step<3, R, B>(table, raw, x, stride, acc);
  }
};

// 5 to 7 bits: below the seven bits of 128 + code, which bfloat16 holds exactly, lies the code itself.
//
//   lane (32 bits)   code 3, code 2, code 1, code 0, a byte each     x: pairs (x[0], x[2]), ..., then (x[1], x[3]), ...
template <int WIDTH> struct ByWidePairs {
  static constexpr int BITS = WIDTH;
  static constexpr int64_t PER_LANE = 4, CHUNK_BYTES = CHUNK;
  typedef I Table;  // what makes signed codes unsigned
  static Table table(const Levels& levels) { return i_set(levels.is_signed ? 0x43004300u ^ (0x00010001u << (BITS - 1)) : 0x43004300u); }
  static Unit unit(const anybit_shape*, const Levels&) { return {128.0f + (1 << (BITS - 1)), 1.0f}; }
  static const char* x(const anybit_shape*, const float* values) { return (const char*)values; }

  template <int R, int B>
  static ALWAYS_INLINE void steps(const Table& table, const uint8_t* p, int64_t pitch, const char* x, int64_t stride,
                                  F (*acc)[B]) {
    const I mask = i_set(0x00010001u * ((1u << BITS) - 1));
    I raw[R], own[B];
    UNROLLED for (int b = 0; b < B; b++) own[b] = _mm512_loadu_si512(x + b * stride);
    UNROLLED for (int r = 0; r < R; r++) {
      raw[r] = quads_load<BITS>(p + r * pitch);
      const I level = _mm512_ternarylogic_epi32(raw[r], mask, table, 0x6A);  // (raw & mask) ^ table
      UNROLLED for (int b = 0; b < B; b++) acc[r][b] = pair_dot(acc[r][b], level, own[b]);
    }
    UNROLLED for (int b = 0; b < B; b++) own[b] = _mm512_loadu_si512(x + b * stride + 4 * LANES);
    UNROLLED for (int r = 0; r < R; r++) {
      const I level = _mm512_ternarylogic_epi32(i_right<8>(raw[r]), mask, table, 0x6A);
      UNROLLED for (int b = 0; b < B; b++) acc[r][b] = pair_dot(acc[r][b], level, own[b]);
    }
  }
};
#endif

// R rows of the weight, B rows of x. Wide: a group is a whole number of chunks; else each lane has parameters of its own.
template <class BY, int R, int B> static void product_lanes(const Product& q, int64_t row, int64_t n) {
  constexpr int64_t OWN = BY::PER_LANE * LANES, BYTES_OF_CHUNK = OWN * BY::BITS / 8;
  const anybit_shape* s = q.s;
  const Unit unit = BY::unit(s, q.levels);
  const bool sums = needs_sums(s, unit);
  const typename BY::Table table = BY::table(q.levels);
  const bool wide = wide_group(s, OWN);
  F total[R][B], acc[R][B];
  UNROLLED for (int r = 0; r < R; r++)
    UNROLLED for (int b = 0; b < B; b++) total[r][b] = f_zero();
  const int64_t stride = q.in->value_stride * sizeof(float), sum_stride = q.in->sum_stride, row_bytes = s->row_bytes;
  const char* x = BY::x(s, q.in->values + n * q.in->value_stride);
  const float* sum = q.in->sums + n * sum_stride;
  const uint8_t* codes = q.t->codes + row * row_bytes;
  const int64_t chunks = ceil_div(s->columns, OWN), groups = ceil_div(s->columns, s->group);
  const int64_t last_bytes = row_bytes - (chunks - 1) * BYTES_OF_CHUNK;
  const int64_t per_group = wide ? least(ceil_div(s->group, OWN), chunks) : 1;
  const bool regular = !wide && OWN % s->group == 0;
  const int64_t step = wide ? 1 : regular ? OWN / s->group : 0;
  // a run holds the parameters of RUN groups: that many groups of chunks, or chunks of at most LANES groups
  const int64_t per_run = wide ? RUN * per_group : RUN / (regular ? step : LANES);
  uint32_t distance[LANES] = {0};
  for (int i = 0; i < LANES && regular; i++) distance[i] = (uint32_t)(BY::PER_LANE * i / s->group);
  I index = i_load(distance);
  const bool few = regular && 4 * s->group >= OWN;
  const int64_t whole = last_bytes >= BYTES_OF_CHUNK ? chunks : chunks - 1;  // chunks that are all there
  const uint8_t* p = codes;
  const char* own = x;
  int64_t summed = 0;
  Lines<R> lines;
  const auto one_chunk = [&](const auto& scale_at, int64_t g) INLINE_LAMBDA {
    UNROLLED for (int r = 0; r < R; r++) prefetch(p + (r + R) * row_bytes);
    UNROLLED for (int r = 0; r < R; r++)
      UNROLLED for (int b = 0; b < B; b++) acc[r][b] = f_zero();
    BY::template steps<R, B>(table, p, row_bytes, own, stride, acc);
    UNROLLED for (int r = 0; r < R; r++) {
      const F scale = scale_at(lines.scale + r * lines.pitch + g);
      UNROLLED for (int b = 0; b < B; b++) total[r][b] = f_fma(acc[r][b], scale, total[r][b]);
    }
    p += BYTES_OF_CHUNK, own += BY::CHUNK_BYTES;
  };
  for (int64_t begin = 0; begin < chunks; begin += per_run) {
    const int64_t base = wide ? begin / per_group : begin * OWN / s->group;
    const int64_t wanted = wide ? RUN : (least(begin + per_run, chunks) * OWN - 1) / s->group + 1 - base;
    const int64_t count = least(wanted, groups - base);
    read_lines<R>(s, q.t, unit, row, base, count, &lines);
    if (sums) add_sums<R, B>(lines, summed - base, count, sum + base, sum_stride, total);
    summed = base + count;  // the first group of a run may be the last of the one before
    const int64_t finish = least(begin + per_run, chunks);
    int64_t g = 0, chunk = begin;
    // mostly a chunk is a group, or a few of them
    if (wide && per_group == 1) {
      for (const int64_t last = least(finish, whole); chunk < last; chunk++, g++)
        one_chunk([&](const float* scale) INLINE_LAMBDA { return f_set(*scale); }, g);
    } else if (few) {
      for (const int64_t last = least(finish, whole); chunk < last; chunk++, g += step)
        one_chunk([&](const float* scale) INLINE_LAMBDA { return f_permute(f_load_four(scale), index); }, g);
    }
    for (; chunk < finish; g += step) {
      UNROLLED for (int r = 0; r < R; r++)
        UNROLLED for (int b = 0; b < B; b++) acc[r][b] = f_zero();
      if (!wide && !regular) {
        const int64_t column = chunk * OWN;
        g = column / s->group - base;
        for (int64_t i = 0; i < LANES; i++)
          distance[i] = (uint32_t)(least(column + i * BY::PER_LANE, s->columns - 1) / s->group - base - g);
        index = i_load(distance);
      }
      const int64_t stop = least(chunk + per_group, chunks), direct = least(stop, whole);
      for (; chunk < direct; chunk++) {
        UNROLLED for (int r = 0; r < R; r++) prefetch(p + (r + R) * row_bytes);
        BY::template steps<R, B>(table, p, row_bytes, own, stride, acc);
        p += BYTES_OF_CHUNK, own += BY::CHUNK_BYTES;
      }
      if (chunk < stop) {
        alignas(64) uint8_t spare[R][BYTES_OF_CHUNK];
        memset(spare, 0, sizeof spare);
        for (int r = 0; r < R; r++) memcpy(spare[r], p + r * row_bytes, (size_t)last_bytes);
        BY::template steps<R, B>(table, spare[0], BYTES_OF_CHUNK, own, stride, acc);
        chunk++;
      }
      UNROLLED for (int r = 0; r < R; r++) {
        const float* some = lines.scale + r * lines.pitch + g;
        const F scale = wide ? f_set(*some) : f_permute(few ? f_load_four(some) : f_load(some), index);
        UNROLLED for (int b = 0; b < B; b++) total[r][b] = f_fma(acc[r][b], scale, total[r][b]);
      }
    }
  }
  UNROLLED for (int r = 0; r < R; r++)
    UNROLLED for (int b = 0; b < B; b++) put(q.p, n + b, row + r, f_sum(total[r][b]));
}

// --- choosing ---------------------------------------------------------------------------------------------------------------

typedef void (*Tile)(const Product&, int64_t row, int64_t n);

// Rows of the weight beside rows of x: as many as the registers hold.
struct Tiles { Tile four_one, one_one, two_four, one_four, two_two = nullptr, two_three = nullptr; };

template <class BY> static constexpr Tiles lane_tiles() {
  if constexpr (!VECTORS) return {nullptr, product_lanes<BY, 1, 1>, nullptr, product_lanes<BY, 1, 4>};
  else
    return {product_lanes<BY, 4, 1>, product_lanes<BY, 1, 1>, product_lanes<BY, 2, 4>, nullptr, product_lanes<BY, 2, 2>,
            product_lanes<BY, 2, 3>};
}
template <int SOURCE, int UNIT> static constexpr Tiles sum_tiles() {
  if constexpr (!VECTORS) return {nullptr, product_sums<SOURCE, 1, 1, 1>, nullptr, product_sums<SOURCE, 1, 1, 4>};
  else
    return {product_sums<SOURCE, UNIT, 4, 1>, product_sums<SOURCE, UNIT, 1, 1>, product_sums<SOURCE, UNIT, 2, 4>, nullptr};
}
template <int SOURCE> struct Units {
  static constexpr Tiles tiles[3] = {sum_tiles<SOURCE, 1>(), sum_tiles<SOURCE, 2>(), sum_tiles<SOURCE, 4>()};
};

// Vectors handled together: 1, 2 or 4, whatever fits into a group.
static int unit_of(const anybit_shape* s) { return wide_group(s, 4 * LANES) ? 2 : wide_group(s, 2 * LANES) ? 1 : 0; }

static const Tiles* const SUM_TILES[12] = {nullptr, nullptr, nullptr, nullptr, nullptr,
                                      Units<5>::tiles, Units<6>::tiles, Units<7>::tiles,
                                      Units<8>::tiles, Units<9>::tiles, Units<10>::tiles, Units<11>::tiles};
static const Tiles EXACT = {nullptr, product_exact<1>, nullptr, product_exact<4>};
template <class BY> struct Lanes {
  static constexpr Tiles tiles = lane_tiles<BY>();
};
static const Tiles* const BY_FLOATS[5] = {nullptr, &Lanes<ByFloats<1>>::tiles, &Lanes<ByFloats<2>>::tiles,
                                          &Lanes<ByFloats<3>>::tiles, &Lanes<ByFloats<4>>::tiles};
#ifdef ANYBIT_DOTS
static const Tiles* const BY_PAIRS[8] = {
    nullptr,
    &Lanes<ByPairs<1>>::tiles,     &Lanes<ByPairs<2>>::tiles,     &Lanes<ByPairs<3>>::tiles,    &Lanes<ByPairs<4>>::tiles,
    &Lanes<ByWidePairs<5>>::tiles, &Lanes<ByWidePairs<6>>::tiles, &Lanes<ByWidePairs<7>>::tiles};
#endif
#ifdef ANYBIT_DOTS
template <int X> struct Tables {
  static constexpr Tiles tiles = {product_tables<X, 4, 1>, product_tables<X, 1, 1>, product_tables<X, 2, 4>, nullptr};
};
#endif
template <int LIMBS> struct Limbs {
  static constexpr const Tiles* tiles[9] = {
      nullptr,
      &Lanes<ByLimbs<1, false, LIMBS>>::tiles, &Lanes<ByLimbs<2, false, LIMBS>>::tiles, &Lanes<ByLimbs<3, false, LIMBS>>::tiles,
      &Lanes<ByLimbs<4, false, LIMBS>>::tiles, &Lanes<ByLimbs<5, false, LIMBS>>::tiles, &Lanes<ByLimbs<6, false, LIMBS>>::tiles,
      &Lanes<ByLimbs<7, false, LIMBS>>::tiles, LIMBS == 1 ? &Lanes<ByLimbs<8, false, 1>>::tiles : nullptr};
  static const Tiles& of(const anybit_shape* s) {
    return s->levels == ANYBIT_TABLE ? Lanes<ByLimbs<4, true, LIMBS>>::tiles : *tiles[s->bits];
  }
};

static const Tiles& tiles_of(const anybit_shape* s, const anybit_tensors* t, const anybit_product* p) {
  switch (way_of(s, t, p)) {
    case BYTES: return Limbs<1>::of(s);
    case LIMBS:
      if constexpr (VECTORS) return Limbs<3>::of(s);
      else return EXACT;
    case FLOATS: return *BY_FLOATS[s->bits];
#ifdef ANYBIT_DOTS
    case TABLES: return Tables<1>::tiles;
    case SPLIT_TABLES: return Tables<3>::tiles;
    case PAIRS:
    case WIDE_PAIRS: return *BY_PAIRS[s->bits];
#endif
    case SUMS: return SUM_TILES[source_of(s)][unit_of(s)];
    default: return EXACT;
  }
}

static void multiply(const anybit_shape* s, const anybit_tensors* t, const anybit_product* p, const Input* in,
                     int64_t first_row, int64_t last_row) {
#ifdef ANYBIT_VBMI
  if (has_half_tables(s)) return multiply_halves(s, t, p, in, first_row, last_row);
#endif
  const Tiles& tiles = tiles_of(s, t, p);
  const Product q = {s, t, p, in, read_levels(s, t)};
  for (int64_t row = first_row; row < last_row;) {
    if (tiles.four_one && p->n == 1 && row + 4 <= last_row) {
      tiles.four_one(q, row, 0);
      row += 4;
      continue;
    }
    const int64_t taken = tiles.two_four && p->n >= (tiles.two_two ? 2 : 4) && row + 2 <= last_row ? 2 : 1;
    int64_t n = 0;
    if (Tile four = taken == 2 ? tiles.two_four : tiles.one_four)
      for (; n + 4 <= p->n; n += 4) four(q, row, n);
    if (Tile rest = taken == 2 && p->n - n == 3 ? tiles.two_three : taken == 2 && p->n - n == 2 ? tiles.two_two : nullptr) {
      rest(q, row, n);
      n = p->n;
    }
    for (; n < p->n; n++)
      for (int64_t i = 0; i < taken; i++) tiles.one_one(q, row + i, n);
    row += taken;
  }
}

// --- inputs -----------------------------------------------------------------------------------------------------------------

// Sums a row of x has: one for each group, filled up with zeros.
static int64_t sum_count(const anybit_shape* s, Way way) {
  return way == EXACTLY || way == TABLES || way == SPLIT_TABLES ? 0 : (ceil_div(ceil_div(s->columns, s->group), LANES) + 1) * LANES;
}

static void sizes(const anybit_shape* s, const anybit_tensors* t, const anybit_product* p, int64_t* values, int64_t* sums) {
  const Way way = way_of(s, t, p);
  *values = padded_columns(s);
  if (way == LIMBS) *values = limb_size(s, 3);
  if (way == BYTES) *values = limb_size(s, 1);
  if (way == SPLIT_TABLES) *values += padded_columns(s) / 2 * 3;
  *sums = sum_count(s, way);
}

// Columns spread over the lanes of their chunk, in place: values[k][lane] = values[8 * lane + k]
static void spread_floats(int64_t columns, float* values) {
  float natural[CHUNK];
  for (int64_t start = 0; start < columns; start += CHUNK) {
    memcpy(natural, values + start, sizeof natural);
    for (int k = 0; k < 8; k++)
      for (int lane = 0; lane < LANES; lane++) values[start + k * LANES + lane] = natural[8 * lane + k];
  }
}

// The same in pairs of bfloat16, PER_LANE columns a lane. In place: halves end before what they are read from.
template <int PER_LANE> static void spread_pairs(int64_t columns, float* values) {
  constexpr int HALF = PER_LANE / 2, APART = PER_LANE / 2 > 2 ? 4 : 2;
  constexpr int64_t OWN = PER_LANE * LANES;
  uint32_t natural[OWN], *out = (uint32_t*)values;
  for (int64_t start = 0; start < columns; start += OWN) {
    memcpy(natural, values + start, sizeof natural);
    for (int k = 0; k < HALF; k++)
      for (int lane = 0; lane < LANES; lane++) {
        const uint32_t* own = natural + PER_LANE * lane + k;
        *out++ = own[0] >> 16 | (own[APART] & 0xFFFF0000u);
      }
  }
}

// A float32 x as three parts behind it, in pairs.
static void split_pairs(int64_t columns, float* values) {
  for (int part = 0; part < 3; part++) {
    float* out = values + columns + part * (columns / 2);
    for (int64_t start = 0; start < columns; start += CHUNK) {
      alignas(64) float chunk[CHUNK];
      for (int64_t i = 0; i < CHUNK; i += LANES) {
        const F some = f_load(values + start + i), high = f_round_bf16(some);
        f_store(chunk + i, high);
        f_store(values + start + i, f_sub(some, high));
      }
      spread_pairs<8>(CHUNK, chunk);
      memcpy(out + start / 2, chunk, CHUNK * 2);
    }
  }
}

static void take_input(const anybit_shape* s, const anybit_tensors* t, const anybit_product* p, int64_t n, float* values,
                       float* sums) {
  const Way way = way_of(s, t, p);
  read_row(s, t, p, n, values);
  if (way == BYTES) take_limbs<1>(s, t, values);
  if (way == LIMBS) take_limbs<3>(s, t, values);
  if (int64_t count = sum_count(s, way)) sum_input(s, count, values, sums);
  if (way == FLOATS) spread_floats(padded_columns(s), values);
  if (way == PAIRS || way == TABLES) spread_pairs<8>(padded_columns(s), values);
#ifdef ANYBIT_DOTS
  if (way == SPLIT_TABLES) split_pairs(padded_columns(s), values);
#endif
  if (way == WIDE_PAIRS) spread_pairs<4>(padded_columns(s), values);
}

}  // namespace

#endif
