// Two or three bits in the format's own float16 arithmetic, groups of sixteen columns (SpQR): a group has up to eight different
// weights, each operation rounded as the format does it. They are worked out for sixteen groups at a time, kept as float16, and
// a register with those of four groups is what 64 codes are looked up in.
//
//   16 bits of an index   low three bits: the code   two bits above: the group
#ifndef ANYBIT_GRID_HALVES_H
#define ANYBIT_GRID_HALVES_H

#ifdef ANYBIT_VBMI

namespace {

static inline bool has_half_tables(const anybit_shape* s) {
  return s->compute == ANYBIT_F16 && (s->bits == 2 || s->bits == 3) && s->levels == ANYBIT_UNSIGNED && s->group == 16 &&
         s->columns > 16 && s->zero.kind != ANYBIT_ABSENT && s->scale.kind != ANYBIT_ABSENT && !s->scale.inverted &&
         s->offset.kind == ANYBIT_ABSENT;
}

// Weights of the groups of a block, eight of each; `tables` with room for a multiple of sixteen groups.
static void half_tables(const BlockParameters& q, int64_t groups, uint16_t* tables) {
  for (int64_t g = 0; g < groups; g += 16) {
    const F zero = f_load(q.zero + g), scale = f_load(q.scale + g);
    __m256i a[8], t[8], u[8];
    UNROLLED for (int i = 0; i < 8; i++)  // lanes: groups; the code is a float16 itself
      a[i] = _mm512_cvtps_ph(f_mul(f_round_f16(f_sub(f_set((float)i), zero)), scale), 0);
    UNROLLED for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_epi16(a[i], a[i + 1]);
      t[i + 1] = _mm256_unpackhi_epi16(a[i], a[i + 1]);
    }
    UNROLLED for (int i = 0; i < 8; i += 4) {  // words i .. i + 3 of groups 0, 1 | 2, 3 | 4, 5 | 6, 7
      UNROLLED for (int j = 0; j < 2; j++) {
        u[i + 2 * j] = _mm256_unpacklo_epi32(t[i + j], t[i + 2 + j]);
        u[i + 2 * j + 1] = _mm256_unpackhi_epi32(t[i + j], t[i + 2 + j]);
      }
    }
    UNROLLED for (int j = 0; j < 4; j++) {
      const __m256i even = _mm256_unpacklo_epi64(u[j], u[4 + j]), odd = _mm256_unpackhi_epi64(u[j], u[4 + j]);
      __m128i* to = (__m128i*)(tables + 8 * g) + 2 * j;
      _mm_storeu_si128(to, _mm256_castsi256_si128(even));
      _mm_storeu_si128(to + 1, _mm256_castsi256_si128(odd));
      _mm_storeu_si128(to + 8, _mm256_extracti128_si256(even, 1));
      _mm_storeu_si128(to + 9, _mm256_extracti128_si256(odd, 1));
    }
  }
}

// Half of 64 codes, as indices.
template <int BITS> static ALWAYS_INLINE I half_index(I raw, int half) {
  alignas(64) static constexpr struct Tables {
    uint8_t spread[2][64], shift[2][64];
    uint16_t group[2][32];
    constexpr Tables() : spread(), shift(), group() {
      for (int half = 0; half < 2; half++)
        for (int i = 0; i < 64; i++) {
          const int bit = BITS * (32 * half + i / 8 * 4);  // four codes to 64 bits
          spread[half][i] = i % 8 < 4 ? uint8_t(bit / 8 + i % 8) : uint8_t(63);
          shift[half][i] = uint8_t(bit % 8 + i % 8 / 2 * BITS);
          group[half][i / 2] = uint16_t((2 * half + i / 32) << 3);
        }
    }
  } tables;
  const I codes = _mm512_multishift_epi64_epi8(_mm512_load_si512(tables.shift[half]),
                                               _mm512_permutexvar_epi8(_mm512_load_si512(tables.spread[half]), raw));
  return i_or(i_and(codes, _mm512_set1_epi16((1 << BITS) - 1)), _mm512_load_si512(tables.group[half]));
}

// Calls take(column, which of four, weights) for every sixteen weights of columns start .. stop, and up to 48 more.
template <int BITS, class Take>
static ALWAYS_INLINE void each_half(const anybit_shape* s, const anybit_tensors* t, int64_t row,
                                    int64_t start, int64_t stop, const Take& take) {
  BlockParameters q;
  alignas(64) uint16_t tables[BLOCK / 16 * 8];
  read_block<ANYBIT_F16>(s, t, row, start, stop, &q);
  half_tables(q, ceil_div(stop - start, 16), tables);
  const uint8_t* codes = t->codes + row * s->row_bytes;
  const uint16_t* table = tables;
  for (int64_t column = start; column < stop; column += 64, table += 32) {
    prefetch(codes + s->row_bytes + column * BITS / 8);
    const int64_t at = column * BITS / 8, left = least(s->row_bytes - at, 8 * BITS);
    const I raw = _mm512_maskz_loadu_epi8((1ull << left) - 1, codes + at), own = _mm512_load_si512(table);
    UNROLLED for (int half = 0; half < 2; half++) {
      const I found = _mm512_permutexvar_epi16(half_index<BITS>(raw, half), own);
      take(column + 32 * half, 2 * half, _mm512_cvtph_ps(_mm512_castsi512_si256(found)));
      take(column + 32 * half + 16, 2 * half + 1, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(found, 1)));
    }
  }
}

template <int BITS>
static void half_block(const anybit_shape* s, const anybit_tensors* t, int64_t row, int64_t start,
                       int64_t stop, float* out) {
  each_half<BITS>(s, t, row, start, stop, [&](int64_t column, int, F w) INLINE_LAMBDA { f_store(out + column - start, w); });
}

// B rows of x in their natural order.
template <int BITS, int B>
static void product_halves(const anybit_shape* s, const anybit_tensors* t, const anybit_product* p,
                           const Input* in, int64_t row, int64_t n) {
  constexpr int CHAINS = B == 1 ? 4 : 1;
  const int64_t stride = in->value_stride;
  const float* x = in->values + n * stride;
  F total[B][CHAINS];
  UNROLLED for (int b = 0; b < B; b++)
    UNROLLED for (int c = 0; c < CHAINS; c++) total[b][c] = f_zero();
  for (int64_t start = 0; start < s->columns; start += BLOCK)
    each_half<BITS>(s, t, row, start, least(start + BLOCK, s->columns), [&](int64_t column, int i, F w) INLINE_LAMBDA {
      UNROLLED for (int b = 0; b < B; b++)
        total[b][i % CHAINS] = f_fma(w, f_load(x + b * stride + column), total[b][i % CHAINS]);
    });
  UNROLLED for (int b = 0; b < B; b++) {
    for (int c = 1; c < CHAINS; c++) total[b][0] = f_add(total[b][0], total[b][c]);
    put(p, n + b, row, f_sum(total[b][0]));
  }
}

static void multiply_halves(const anybit_shape* s, const anybit_tensors* t, const anybit_product* p,
                            const Input* in, int64_t row, int64_t last_row) {
  const auto one = s->bits == 2 ? product_halves<2, 1> : product_halves<3, 1>;
  const auto four = s->bits == 2 ? product_halves<2, 4> : product_halves<3, 4>;
  for (; row < last_row; row++) {
    int64_t n = 0;
    for (; n + 4 <= p->n; n += 4) four(s, t, p, in, row, n);
    for (; n < p->n; n++) one(s, t, p, in, row, n);
  }
}

}  // namespace

#endif

#endif
