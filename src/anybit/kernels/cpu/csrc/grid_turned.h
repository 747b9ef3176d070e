// Weights packed column by column for grid_blocks.h, where every operation is in float32: codes are turned before they are
// unpacked, so that a word of eight of them (of four, from five bits on) is moved at once, and a vector holds rows of the weight.
//
//   word      lane r: codes of row r, of PER_LANE columns            params  [group][TALL], turned too
//   packed    [column][TALL] floats, or [pair of columns][TALL] words of two bfloat16
#ifndef ANYBIT_GRID_TURNED_H
#define ANYBIT_GRID_TURNED_H

#include "grid_levels.h"

namespace {

static constexpr int64_t LEAST_GROUP = 16, TURNED_GROUPS = DEPTH / LEAST_GROUP + 2 * LANES;

// Scales, zeros and offsets of the groups of some columns.
struct TurnedParameters { float scale[TURNED_GROUPS * TALL], zero[TURNED_GROUPS * TALL], offset[TURNED_GROUPS * TALL]; };

static bool turns(const anybit_shape* s) {
  const bool integers = s->levels == ANYBIT_UNSIGNED || s->levels == ANYBIT_SIGNED;
  return s->compute == ANYBIT_F32 && (s->bits <= 4 || integers) && wide_group(s, LEAST_GROUP);
}

static NOINLINE void turn_parameters(const anybit_shape* s, const anybit_tensors* t, int64_t row, int64_t start, int64_t stop,
                                     TurnedParameters* out) {
  const bool one = s->group >= s->columns;
  const int64_t count = one ? 1 : (stop - 1) / s->group + 1 - start / s->group;
  const anybit_parameter* kinds[3] = {&s->scale, &s->zero, &s->offset};
  const void* data[3] = {t->scale, t->zero, t->offset};
  float* found[3] = {out->scale, out->zero, out->offset};
  alignas(64) float natural[LANES * TURNED_GROUPS];
  for (int i = 0; i < 3; i++) {
    if (kinds[i]->kind == ANYBIT_ABSENT) continue;
    for (int64_t half = 0; half < TALL; half += LANES) {
      for (int64_t r = 0; r < LANES; r++) {
        float* own = natural + r * TURNED_GROUPS;
        if (row + half + r < s->rows)
          run_of(parameter_at(kinds[i], data[i], &t->nested[i], row + half + r, s->rows), one ? 0 : start / s->group, count, own);
        else memset(own, 0, (size_t)count * sizeof(float));
      }
      for (int64_t g = 0; g < count; g += LANES)
        transpose((const uint32_t*)natural + g, TURNED_GROUPS, (uint32_t*)found[i] + g * TALL + half, TALL);
    }
  }
}

// Weights of one column and of the next one.
template <int64_t PER_WORD> static ALWAYS_INLINE void put_pair(uint32_t* to, F first, F second) {
  if constexpr (PER_WORD == 1) {
    f_store((float*)to, first), f_store((float*)to + TALL, second);
  } else {
#ifdef ANYBIT_DOTS
    alignas(64) static constexpr struct Places {  // one of the first, one of the second, and so on
      uint16_t of[2 * LANES];
      constexpr Places() : of() {
        for (int i = 0; i < 2 * LANES; i++) of[i] = uint16_t(i / 2 + i % 2 * LANES);
      }
    } places;
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(places.of), (I)_mm512_cvtne2ps_pbh(second, first)));
#endif
  }
}

template <int64_t PER_WORD, int BITS>
static void turn_codes(const anybit_shape* s, const anybit_tensors* t, const Levels& levels, int64_t row, int64_t start,
                       int64_t stop, uint32_t* packed) {
  constexpr int64_t PER_LANE = BITS <= 4 ? 8 : 4, COLUMNS = PER_LANE * LANES, BYTES = COLUMNS * BITS / 8;
  static_assert(DEPTH % COLUMNS == 0, "whole chunks");
  const bool has_zero = s->zero.kind != ANYBIT_ABSENT, has_scale = s->scale.kind != ANYBIT_ABSENT;
  const bool has_offset = s->offset.kind != ANYBIT_ABSENT, divides = s->scale.inverted != 0, is_signed = s->levels == ANYBIT_SIGNED;
  alignas(64) float numbers[16];
  for (int i = 0; i < 16; i++) numbers[i] = levels.numbers[i] + centre(s);  // whole numbers, or a table as it is
  const Lut lut = lut_load(numbers);
  const I mask = i_set((1u << BITS) - 1), flip = i_set(is_signed ? 1u << (BITS - 1) : 0);
  const F middle = f_set(is_signed ? (float)(1 << (BITS - 1)) : 0.0f);
  TurnedParameters parameters;
  turn_parameters(s, t, row, start, stop, &parameters);
  alignas(64) uint32_t words[LANES * LANES], turned[LANES * LANES];
  for (int64_t half = 0; half < TALL; half += LANES) {
    const float *scales = parameters.scale + half, *zeros = parameters.zero + half, *offsets = parameters.offset + half;
    F scale = f_load(scales), zero = f_load(zeros), offset = f_load(offsets);
    int64_t next = s->group >= s->columns ? stop : (start / s->group + 1) * s->group;
    const auto level_at = [&](I own) INLINE_LAMBDA {
      if constexpr (BITS <= 4) return lut_take(lut, own);
      else return f_sub(f_of_integers(i_field(own, mask, flip)), middle);
    };
    const auto weight_at = [&](I own) INLINE_LAMBDA {
      F w = level_at(own);
      if (has_zero) w = f_sub(w, zero);
      if (has_scale) w = divides ? f_div(w, scale) : f_mul(w, scale);
      return has_offset ? f_add(w, offset) : w;
    };
    for (int64_t column = start; column < stop; column += COLUMNS) {
      const int64_t at = column * BITS / 8, left = s->row_bytes - at;
      for (int64_t r = 0; r < LANES; r++) {
        const uint8_t* p = t->codes + (row + half + r) * s->row_bytes + at;
        alignas(64) uint8_t spare[BYTES];
        if (row + half + r >= s->rows || left < BYTES) {
          memset(spare, 0, sizeof spare);
          if (row + half + r < s->rows) memcpy(spare, p, (size_t)left);
          p = spare;
        }
        if constexpr (BITS <= 4) i_store(words + r * LANES, chunk_load<BITS>(p));
        else i_store(words + r * LANES, quads_load<BITS>(p));
      }
      transpose(words, LANES, turned, LANES);
      uint32_t* out = packed + (column - start) / PER_WORD * TALL + half;
      for (int64_t k = 0, first = column; k < LANES && first < stop; k++, first += PER_LANE) {
        if (first >= next) {
          next += s->group, scales += TALL, zeros += TALL, offsets += TALL;
          scale = f_load(scales), zero = f_load(zeros), offset = f_load(offsets);
        }
        I own = i_load(turned + k * LANES);
        for (int64_t pair = 0; pair < PER_LANE / 2; pair++, out += 2 / PER_WORD * TALL) {
          constexpr int EACH = BITS <= 4 ? BITS : 8;
          put_pair<PER_WORD>(out, weight_at(own), weight_at(i_right<EACH>(own)));
          own = i_right<2 * EACH>(own);
        }
      }
    }
  }
}

template <int64_t PER_WORD> struct Turned {
  typedef void (*Turn)(const anybit_shape*, const anybit_tensors*, const Levels&, int64_t, int64_t, int64_t, uint32_t*);
  static constexpr Turn of_bits[9] = {
      nullptr, turn_codes<PER_WORD, 1>, turn_codes<PER_WORD, 2>, turn_codes<PER_WORD, 3>, turn_codes<PER_WORD, 4>,
      turn_codes<PER_WORD, 5>, turn_codes<PER_WORD, 6>, turn_codes<PER_WORD, 7>, turn_codes<PER_WORD, 8>};
};

// Weights for grid_blocks.h in a way of their own, if there is one: `packed` words of PER_WORD columns.
template <int64_t PER_WORD>
static bool pack_directly(const anybit_shape* s, const anybit_tensors* t, int64_t row, int64_t start, int64_t stop, int64_t,
                          uint32_t* packed) {
  if constexpr (VECTORS) {
    if (!turns(s)) return false;
    Turned<PER_WORD>::of_bits[s->bits](s, t, read_levels(s, t), row, start, stop, packed);
    return true;
  }
  return false;
}

}  // namespace

#endif
