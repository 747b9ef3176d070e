// Rounding with scales that are known: ranges of blocks, integers, small floats, levels of a table.
#ifndef ANYBIT_ENCODE_ROUNDINGS_H
#define ANYBIT_ENCODE_ROUNDINGS_H

#include "encode.h"
#include "encode_packing.h"
#include "encode_source.h"
#include "lanes.h"

namespace {

constexpr float NOT_FINITE = NAN;

// --- ranges ---------------------------------------------------------------------------------------------------------------

struct Range {
  float low, high, largest;
  bool finite;
  void add(const float* x, int64_t count) {
    F least = f_all(low), most = f_all(high), wrong = f_all(0.0f);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
      const F own = f_load(x + i);
      least = pick(own < least, own, least);
      most = pick(own > most, own, most);
      wrong = wrong + own * 0.0f;  // NaN for what is not finite
    }
    finite = finite && !any(wrong != wrong);
    low = smallest_of(least);
    high = largest_of(most);
    for (; i < count; i++) {
      low = x[i] < low ? x[i] : low;
      high = x[i] > high ? x[i] : high;
      finite = finite && x[i] * 0.0f == 0.0f;
    }
  }
  static Range empty() { return {INFINITY, -INFINITY, 0.0f, true}; }
};

void encode_ranges(void* data, int64_t first, int64_t last) {
  const anybit_ranges* job = static_cast<const anybit_ranges*>(data);
  const int64_t columns = job->source.columns, across = job->across, blocks = (columns + across - 1) / across;
  float x[TILE];
  for (int64_t row = first; row < last; row++) {
    Range block = Range::empty();
    for (int64_t start = 0; start < columns; start += TILE) {
      const int64_t stop = start + TILE < columns ? start + TILE : columns;
      take(&job->source, row, start, stop - start, x);
      for (int64_t at = start; at < stop;) {
        const int64_t number = at / across, whole = (number + 1) * across, end = whole < stop ? whole : stop;
        block.add(x + (at - start), end - at);
        at = end;
        if (end < whole && end < columns) break;  // the rest is in the next tile
        const int64_t place = row * blocks + number;
        if (job->low) {
          job->low[place] = block.finite ? block.low + 0.0f : NOT_FINITE;
          job->high[place] = block.finite ? block.high + 0.0f : NOT_FINITE;
        } else {
          job->high[place] = !block.finite ? NOT_FINITE : -block.low > block.high ? -block.low : block.high + 0.0f;
        }
        block = Range::empty();
      }
    }
  }
}

// --- integers ---------------------------------------------------------------------------------------------------------------

struct Affine {
  F scale, zero, offset, low, high;
  bool multiply, zero_after, has_zero, has_offset, away;
};

template <int KIND> inline I integer_of(F x, const Affine& how) {
  if (how.has_offset) x = rounded<KIND>(x - how.offset);
  x = rounded<KIND>(how.multiply ? x * how.scale : x / how.scale);
  if (how.has_zero && !how.zero_after) x = rounded<KIND>(x + how.zero);
  x = how.away ? f_half_up(x) : f_even(x);
  if (how.has_zero && how.zero_after) x = rounded<KIND>(x + how.zero);
  return i_of(at_most(at_least(x, how.low), how.high));
}

template <int KIND> inline void integers_of(const float* x, int64_t count, const Affine& how, uint8_t* codes) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store_bytes(codes + i, integer_of<KIND>(f_load(x + i), how));
  if (i < count) {
    float rest[LANES] = {0};
    uint8_t bytes[LANES];
    memcpy(rest, x + i, (size_t)(count - i) * sizeof(float));
    store_bytes(bytes, integer_of<KIND>(f_load(rest), how));
    memcpy(codes + i, bytes, (size_t)(count - i));
  }
}

// The common case without branches: nothing but a product or quotient of float32.
template <bool MULTIPLY, bool ZERO> inline void plain_integers_of(const float* x, int64_t count, const Affine& how, uint8_t* codes) {
  const Affine own = how;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    F v = f_load(x + i);
    v = f_even(MULTIPLY ? v * own.scale : v / own.scale);
    if (ZERO) v = v + own.zero;
    store_bytes(codes + i, i_of(at_most(at_least(v, own.low), own.high)));
  }
  if (i < count) integers_of<ANYBIT_F32>(x + i, count - i, how, codes + i);
}

void encode_integers(void* data, int64_t first, int64_t last) {
  const anybit_integers* job = static_cast<const anybit_integers*>(data);
  const int64_t columns = job->source.columns, across = job->across, blocks = (columns + across - 1) / across;
  float x[TILE];
  uint8_t bytes[TILE];
  Affine how = {};
  how.low = f_all((float)job->first), how.high = f_all((float)job->last);
  how.multiply = job->multiply, how.zero_after = job->zero_after, how.away = job->away;
  how.has_zero = job->zero, how.has_offset = job->offset;
  const bool plain = job->arithmetic == ANYBIT_F32 && !how.away && !how.has_offset && (!how.has_zero || how.zero_after);
  for (int64_t row = first; row < last; row++) {
    const int64_t parameters = row / job->down * blocks;
    for (int64_t start = 0; start < columns; start += TILE) {
      const int64_t stop = start + TILE < columns ? start + TILE : columns;
      take(&job->source, row, start, stop - start, x);
      for (int64_t at = start; at < stop;) {
        const int64_t number = at / across, whole = (number + 1) * across, end = whole < stop ? whole : stop;
        how.scale = f_all(job->scale[parameters + number]);
        if (how.has_zero) how.zero = f_all(job->zero[parameters + number]);
        if (how.has_offset) how.offset = f_all(job->offset[parameters + number]);
        const float* own = x + (at - start);
        uint8_t* out = bytes + (at - start);
        if (plain && how.has_zero && how.multiply) plain_integers_of<true, true>(own, end - at, how, out);
        else if (plain && how.has_zero) plain_integers_of<false, true>(own, end - at, how, out);
        else if (plain && how.multiply) plain_integers_of<true, false>(own, end - at, how, out);
        else if (plain) plain_integers_of<false, false>(own, end - at, how, out);
        else if (job->arithmetic == ANYBIT_BF16) integers_of<ANYBIT_BF16>(own, end - at, how, out);
        else if (job->arithmetic == ANYBIT_F16) integers_of<ANYBIT_F16>(own, end - at, how, out);
        else integers_of<ANYBIT_F32>(own, end - at, how, out);
        at = end;
      }
      pack_codes(job->bits, bytes, stop - start, job->codes + row * job->row_bytes + start * job->bits / 8);
    }
  }
}

// --- small floats -----------------------------------------------------------------------------------------------------------

struct SmallFloat {
  F top;
  int exponent_bits, mantissa_bits, least;
  int64_t ties, zeros;
};

inline I small_float_of(F x, const SmallFloat& kind) {
  const F size = at_most(f_abs(x), kind.top);
  I exponent = i_shift_right(bits_of(size), 23) - 127;
  exponent = pick(exponent < kind.least, i_all(kind.least), exponent);
  F steps = size * float_of(i_shift_left((127 + kind.mantissa_bits) - exponent, 23));
  if (kind.ties == 0) {
    steps = f_even(steps);
  } else {
    const F whole = f_trunc(steps), rest = steps - whole, one = f_all(1.0f), none = f_all(0.0f);
    steps = whole + (kind.ties == 1 ? pick(rest >= 0.5f, one, none) : pick(rest > 0.5f, one, none));
  }
  const I found = i_of(steps) + i_shift_left(exponent - kind.least, kind.mantissa_bits), none = i_all(0);
  const I sign = i_all(1 << (kind.exponent_bits + kind.mantissa_bits));
  if (kind.zeros == 0) return found | pick(bits_of(x) < 0, sign, none);
  const I below = pick(x < 0.0f, sign, none);
  return found | (kind.zeros == 1 ? below : pick(found != 0, below, none));
}

void encode_small_floats(void* data, int64_t first, int64_t last) {
  const anybit_small_floats* job = static_cast<const anybit_small_floats*>(data);
  const int64_t columns = job->source.columns, across = job->across, blocks = (columns + across - 1) / across;
  SmallFloat kind;
  kind.top = f_all((float)job->top);
  kind.exponent_bits = (int)job->exponent_bits, kind.mantissa_bits = (int)job->mantissa_bits;
  kind.least = 2 - (1 << (kind.exponent_bits - 1));
  kind.ties = job->ties, kind.zeros = job->zeros;
  float x[TILE + LANES];
  uint8_t bytes[TILE + LANES];
  for (int64_t row = first; row < last; row++) {
    const float* scales = job->scale + row / job->down * blocks;
    for (int64_t start = 0; start < columns; start += TILE) {
      const int64_t stop = start + TILE < columns ? start + TILE : columns;
      take(&job->source, row, start, stop - start, x);
      for (int64_t at = start; at < stop;) {  // what is written beyond a block is written again by the next
        const int64_t number = at / across, whole = (number + 1) * across, end = whole < stop ? whole : stop;
        const F scale = f_all(scales[number]);
        const bool nothing = !job->multiply && scales[number] == 0;
        for (int64_t i = at - start; i < end - start; i += LANES) {
          F v = f_load(x + i);
          v = nothing ? f_all(0.0f) : job->multiply ? v * scale : v / scale;
          store_bytes(bytes + i, small_float_of(rounded(v, job->quotient), kind));
        }
        at = end;
      }
      pack_codes(job->bits, bytes, stop - start, job->codes + row * job->row_bytes + start * job->bits / 8);
    }
  }
}

// --- blocks of a table --------------------------------------------------------------------------------------------------

void encode_table_blocks(void* data, int64_t first, int64_t last) {
  const anybit_table_blocks* job = static_cast<const anybit_table_blocks*>(data);
  const int64_t size = job->size, step = size < TILE ? size : TILE;
  float x[TILE];
  uint8_t bytes[TILE];
  F middles[15];
  for (int i = 0; i < 15; i++) middles[i] = f_all(job->middles[i]);
#if defined(__AVX512F__)
  float padded[16] = {0};
  memcpy(padded, job->middles, 15 * sizeof(float));
  const __m512 table = _mm512_loadu_ps(padded);
#endif
  for (int64_t block = first; block < last; block++) {
    Range range = Range::empty();
    for (int64_t start = 0; start < size; start += step) {
      take(&job->source, 0, block * size + start, step, x);
      range.add(x, step);
    }
    const float largest = !range.finite ? NOT_FINITE : -range.low > range.high ? -range.low : range.high + 0.0f;
    job->scales[block] = largest;
    const F inverse = f_all(1.0f / (largest < 1e-38f ? 1e-38f : largest)), one = f_all(1.0f), minus = f_all(-1.0f);
    for (int64_t start = 0; start < size; start += step) {
      if (size > step) take(&job->source, 0, block * size + start, step, x);
      for (int64_t i = 0; i < step; i += LANES) {
        const F v = at_most(at_least(f_load(x + i) * inverse, minus), one);
#if defined(__AVX512F__)
        // how many middles are below: a binary search among fifteen
        __m512i place = _mm512_setzero_si512();
        const __m512 number = (__m512)v;
        for (int half = 8; half; half /= 2) {
          const __m512 middle = _mm512_permutexvar_ps(_mm512_add_epi32(place, _mm512_set1_epi32(half - 1)), table);
          const __mmask16 above = _mm512_cmp_ps_mask(middle, number, _CMP_LT_OQ);
          place = _mm512_mask_add_epi32(place, above, place, _mm512_set1_epi32(half));
        }
        store_bytes(bytes + i, (I)place);
#else
        I place = i_all(0);
        for (int k = 0; k < 15; k++) place = place - (middles[k] < v);
        store_bytes(bytes + i, place);
#endif
      }
      uint8_t* out = job->codes + (block * size + start) / 2;
      pack_row<4>(bytes, step, out);
      if (job->pairs)
        for (int64_t i = 0; i < step / 2; i++) out[i] = job->pairs[out[i]];
    }
  }
}

}  // namespace

#endif
