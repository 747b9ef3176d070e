// Products with lattices of small integers (llama.cpp's i-quants): a point is a 16-bit word of indices into a few values, so a
// register holds 32 points. x becomes integers of 16 bits (24 of a float32 x) that share a power of two in blocks of 32, cut
// into bytes, and bytes are multiplied in fours: sums are exact until they meet a scale.
//
//   256 columns (SUPER)   codes -> 16-bit indices -> words of points, looked up 32 at a time -> bytes of values, 64 at a time
//   bytes of x            in the order in which bits of the words come out, WIDE weights behind WIDE others:
//                         register j, 64 bits q: columns 32 q + 8 j ..+ 7 (WIDE 8); 16 q + 8 j ..+ 7 of each half (WIDE 4)
//
// So the lanes of one register of sums belong to the same blocks in every step.
//
// Signs: the first byte of x is signed and the others are not, because one factor of a product of bytes is without sign. With
// the first one goes the value and x has the sign; with the others the value has it. Without signs (IQ1) values are lifted
// above zero, all bytes of x are signed, and the sums of x are taken away again.
#ifndef ANYBIT_BOOK_LATTICES_H
#define ANYBIT_BOOK_LATTICES_H

namespace {

static constexpr int64_t SUPER = 256;

// Behind the float32 numbers of a table of kind ANYBIT_F32_POINTS: 64 values (their first few, again and again), then a word
// for each point.
struct PointTable {
  const int8_t* values;
  const uint16_t* words;
};

static PointTable point_table(const anybit_shape* s, const anybit_tensors* t) {
  const int8_t* values = (const int8_t*)(t->table + s->entries * s->wide);
  return {values, (const uint16_t*)(values + 64)};
}

static int bytes_of_input(const anybit_product* p) { return p->x_kind == ANYBIT_F32 ? 3 : 2; }

// --- x ------------------------------------------------------------------------------------------------------------------------

// 256 columns: BYTES planes, the most significant one last, and the powers of two of its eight blocks.
template <int BYTES> struct Limbs {
  alignas(64) uint8_t plane[BYTES][SUPER];
  float scale[SUPER / 32];
  float spare[8];
};

// One block of 32: integers up to 127 << 8 (BYTES - 1), so that no byte of theirs overflows when it is negated; what they are
// multiplied with to be x again.
template <int BYTES> static float integers_of(const float* x, int32_t* out) {
  constexpr int32_t SHIFT = 8 * BYTES - 2;
  const I magnitude = i_set(0x7FFFFFFF);
  const F low = f_load(x), high = f_load(x + 16);
  const int32_t top = _mm512_reduce_max_epi32(
      _mm512_max_epi32(i_and(_mm512_castps_si512(low), magnitude), i_and(_mm512_castps_si512(high), magnitude)));
  if (top >= 0x7F800000) {  // no numbers: nor is anything they are multiplied with
    memset(out, 0, 32 * sizeof(int32_t));
    return float_of_bits(0x7FC00000);
  }
  // the largest one is below 127 / 64 times two to this power (less 127); both factors have to be normal numbers
  int32_t power = (int32_t)(bits_of_float(float_of_bits((uint32_t)top) * (128.0f / 127.0f)) >> 23);
  if (power <= SHIFT) power = SHIFT + 1;
  const F up = f_set(float_of_bits((uint32_t)(254 - power + SHIFT) << 23));
  _mm512_storeu_si512(out, _mm512_cvtps_epi32(f_mul(low, up)));
  _mm512_storeu_si512(out + 16, _mm512_cvtps_epi32(f_mul(high, up)));
  return float_of_bits((uint32_t)(power - SHIFT) << 23);
}

template <int BYTES, int WIDE, bool SIGNED_BYTES> static void take_limbs(int64_t columns, float* values) {  // in place
  Limbs<BYTES>* to = (Limbs<BYTES>*)values;
  int32_t numbers[SUPER];
  uint8_t plane[SUPER];
  for (int64_t start = 0; start < columns; start += SUPER, to++) {
    float scale[SUPER / 32];
    for (int64_t block = 0; block < SUPER / 32; block++)
      scale[block] = integers_of<BYTES>(values + start + 32 * block, numbers + 32 * block);
    memcpy(to->scale, scale, sizeof scale);
    memset(to->spare, 0, sizeof to->spare);
    for (int byte = 0; byte < BYTES; byte++) {
      for (int64_t i = 0; i < SUPER; i += 16) {
        const I number = _mm512_loadu_si512(numbers + i);
        _mm_storeu_si128((__m128i*)(plane + i), _mm512_cvtepi32_epi8(number));
        _mm512_storeu_si512(numbers + i, _mm512_srai_epi32(SIGNED_BYTES ? _mm512_add_epi32(number, i_set(128)) : number, 8));
      }
      for (int j = 0; j < 4; j++)
        for (int q = 0; q < 8; q++)
          memcpy(to->plane[byte] + 64 * j + 8 * q, plane + (WIDE == 8 ? 32 * q + 8 * j : 128 * (j / 2) + 16 * q + 8 * (j % 2)), 8);
    }
  }
}

// --- points -------------------------------------------------------------------------------------------------------------------

// 32 codes in 16 bits each, with bits of others above them.
template <int BITS> static ALWAYS_INLINE I point_codes(const uint8_t* p) {
  if constexpr (BITS == 8) return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
  alignas(64) static constexpr struct Tables {
    uint8_t spread[64], shift[64];
    constexpr Tables() : spread(), shift() {
      for (int i = 0; i < 64; i++) {
        const int q = i / 8, bit = 4 * BITS * q;  // four codes to 64 bits
        spread[i] = i % 8 < 7 ? uint8_t(bit / 8 + i % 8) : uint8_t(63);
        shift[i] = uint8_t(bit % 8 + i % 8 / 2 * BITS + i % 2 * 8);
      }
    }
  } tables;
  const I raw = _mm512_maskz_loadu_epi8((1ull << (4 * BITS)) - 1, p);
  return _mm512_multishift_epi64_epi8(_mm512_load_si512(tables.shift),
                                      _mm512_permutexvar_epi8(_mm512_load_si512(tables.spread), raw));
}

// Words of 1 << BITS points, looked up 64 at a time.
template <int BITS> static ALWAYS_INLINE I point_words(const uint16_t* words, I codes) {
  constexpr int PARTS = 1 << (BITS - 6);
  I found[PARTS];
  UNROLLED16 for (int i = 0; i < PARTS; i++)
    found[i] = _mm512_permutex2var_epi16(_mm512_loadu_si512(words + 64 * i), codes, _mm512_loadu_si512(words + 64 * i + 32));
  UNROLLED for (int bit = 6; bit < BITS; bit++) {
    const __mmask32 upper = _mm512_test_epi16_mask(codes, _mm512_set1_epi16((short)(1 << bit)));
    UNROLLED for (int i = 0; i < PARTS >> (bit - 5); i++) found[i] = _mm512_mask_blend_epi16(upper, found[2 * i], found[2 * i + 1]);
  }
  return found[0];
}

// The same one by one, in place: of large tables.
static void words_in_place(const uint16_t* words, int64_t count, uint16_t* codes) {
  for (int64_t i = 0; i < count; i += 8) {
    const uint16_t* own = codes + i;
    __m128i some = _mm_cvtsi32_si128(words[own[0]]);
    some = _mm_insert_epi16(some, words[own[1]], 1), some = _mm_insert_epi16(some, words[own[2]], 2);
    some = _mm_insert_epi16(some, words[own[3]], 3), some = _mm_insert_epi16(some, words[own[4]], 4);
    some = _mm_insert_epi16(some, words[own[5]], 5), some = _mm_insert_epi16(some, words[own[6]], 6);
    _mm_store_si128((__m128i*)(codes + i), _mm_insert_epi16(some, words[own[7]], 7));
  }
}

// Values of register j: of every 64 bits of words, its point j (WIDE 8) or its points 2 j and 2 j + 1 (WIDE 4). Six bits of a
// byte are looked at, of which the lower ones are the index.
template <int WIDE> static ALWAYS_INLINE I point_values(I values, I words, int j) {
  alignas(64) static constexpr struct Tables {
    uint8_t shift[4][64];
    constexpr Tables() : shift() {
      for (int j = 0; j < 4; j++)
        for (int i = 0; i < 64; i++)
          shift[j][i] = uint8_t(WIDE == 8 ? 16 * j + 2 * (i % 8) : 32 * (j % 2) + i % 8 / 4 * 16 + 3 * (i % 4));
    }
  } tables;
  return _mm512_permutexvar_epi8(_mm512_multishift_epi64_epi8(_mm512_load_si512(tables.shift[j]), words), values);
}

// Signs of 256 columns, 64 bits for each register.
template <int SIGN, int WIDE> static ALWAYS_INLINE void point_signs(const uint8_t* p, uint64_t* masks) {
  alignas(64) static constexpr struct Tables {
    uint8_t order[32], spread[32], shift[32], parity[128];
    constexpr Tables() : order(), spread(), shift(), parity() {
      for (int i = 0; i < 32; i++) {
        const int j = i / 8, q = i % 8;
        order[i] = uint8_t(WIDE == 8 ? 4 * q + j : 16 * (j / 2) + 2 * q + j % 2);
        spread[i] = i % 8 < 7 ? uint8_t(7 * j + q) : uint8_t(31);
        shift[i] = uint8_t(7 * q);
      }
      for (int i = 0; i < 128; i++) {
        int odd = 0;
        for (int bit = 0; bit < 7; bit++) odd ^= i >> bit & 1;
        parity[i] = uint8_t(i | odd << 7);
      }
    }
  } tables;
  const __m256i order = _mm256_load_si256((const __m256i*)tables.order);
  __m256i bytes;
  if constexpr (SIGN == 1) {
    bytes = _mm256_loadu_si256((const __m256i*)p);
  } else {
    const __m256i raw = _mm256_maskz_loadu_epi8(0x0FFFFFFF, p);
    const __m256i sevens = _mm256_multishift_epi64_epi8(
        _mm256_load_si256((const __m256i*)tables.shift),
        _mm256_permutexvar_epi8(_mm256_load_si256((const __m256i*)tables.spread), raw));
    bytes = _mm512_castsi512_si256(_mm512_permutex2var_epi8(_mm512_load_si512(tables.parity), _mm512_castsi256_si512(sevens),
                                                            _mm512_load_si512(tables.parity + 64)));
  }
  _mm256_store_si256((__m256i*)masks, _mm256_permutexvar_epi8(order, bytes));
}

// --- products -----------------------------------------------------------------------------------------------------------------

// Lane i of the sums of part `part` meets scale number of[part][i] of the weights and x_of[part][i] of x.
template <int WIDE, int GROUP> struct LaneScales {
  static constexpr int PARTS = WIDE == 8 && GROUP == 32 ? 1 : 2;
  alignas(64) uint32_t of[2][16], x_of[2][16];
  constexpr LaneScales() : of(), x_of() {
    for (int part = 0; part < 2; part++)
      for (int i = 0; i < 16; i++) {
        const int column = WIDE == 8 ? 32 * (i / 2) + 16 * part : 128 * part + 8 * i;
        of[part][i] = uint32_t(column / GROUP), x_of[part][i] = uint32_t(column / 32);
      }
  }
};

// Sums of bytes, the most significant one last, as one number.
template <int BYTES> static ALWAYS_INLINE F number_of(const I* sums) {
  const I upper = _mm512_add_epi32(_mm512_slli_epi32(sums[BYTES - 1], 8), sums[BYTES - 2]);
  if constexpr (BYTES == 2) return f_of_integers(upper);
  else return f_fma(f_of_integers(upper), f_set(256.0f), f_of_integers(sums[0]));
}

// Words and signs of a run of groups, made before they are multiplied: together that is too long a chain of operations for a
// processor to overlap with the next one.
template <int WIDE, int GROUP> struct Points {
  static constexpr int64_t SUPERS = RUN * GROUP / SUPER;
  alignas(64) uint16_t words[SUPERS * (SUPER / WIDE)];
  alignas(64) uint64_t negative[SUPERS][4];
};

template <int WIDE, int BITS, int SIGN, int GROUP>
static ALWAYS_INLINE void read_points(const anybit_shape* s, const uint16_t* table, const uint8_t* codes, const uint8_t* signs,
                                      int64_t supers, Points<WIDE, GROUP>* to) {
  for (int64_t i = 0; i < supers * (8 / WIDE); i++) {
    prefetch(codes + s->row_bytes + 4 * BITS * i);
    const I own = point_codes<BITS>(codes + 4 * BITS * i);
    if constexpr (BITS <= 10) _mm512_store_si512(to->words + 32 * i, point_words<BITS>(table, own));
    else _mm512_store_si512(to->words + 32 * i, i_and(own, _mm512_set1_epi16((1 << BITS) - 1)));
  }
  if constexpr (BITS > 10) words_in_place(table, supers * (SUPER / WIDE), to->words);
  if constexpr (SIGN != 0)
    for (int64_t i = 0; i < supers; i++) {
      const uint8_t* own = signs + (SIGN == 1 ? 32 : 28) * i;
      prefetch(own + s->sign_bytes);
      point_signs<SIGN, WIDE>(own, to->negative[i]);
    }
}

template <int WIDE, int BITS, int SIGN, int GROUP, int BYTES, int B> static void product_lattice(const Product& q, int64_t row, int64_t n) {
  static constexpr LaneScales<WIDE, GROUP> lanes;
  constexpr int PARTS = lanes.PARTS;
  const anybit_shape* s = q.s;
  const PointTable table = point_table(s, q.t);
  const I values = _mm512_loadu_si512(table.values), zero = i_zero();
  const Limbs<BYTES>* x[B];
  UNROLLED for (int b = 0; b < B; b++) x[b] = (const Limbs<BYTES>*)(q.in->values + (n + b) * q.in->value_stride);
  F total[B];
  UNROLLED for (int b = 0; b < B; b++) total[b] = f_zero();
  alignas(64) float scale_of[RUN + 4 * LANES];
  Points<WIDE, GROUP> points;
  const RowParameters parameters = row_parameters(s, q.t, row);
  const int64_t groups = s->columns / GROUP;
  for (int64_t base = 0; base < groups; base += RUN) {
    const int64_t count = least(RUN, groups - base), first = base * GROUP / SUPER, supers = count * GROUP / SUPER;
    run_of(parameters.scale, base, count, scale_of);
    if constexpr (SIGN == 0) {  // what values were lifted by, and the zero
      alignas(64) float zero_of[RUN + 4 * LANES];
      run_of(parameters.zero, base, count, zero_of);
      for (int64_t g = 0; g < count; g += LANES) {
        const F shift = f_mul(f_sub(f_set(-1.0f), f_load(zero_of + g)), f_load(scale_of + g));
        const __mmask16 own = (__mmask16)((1u << least(count - g, LANES)) - 1);
        UNROLLED for (int b = 0; b < B; b++)
          total[b] = f_fma(_mm512_maskz_mov_ps(own, shift), f_load(q.in->sums + (n + b) * q.in->sum_stride + base + g), total[b]);
      }
    }
    read_points<WIDE, BITS, SIGN, GROUP>(s, table.words, q.t->codes + row * s->row_bytes + first * (SUPER / WIDE * BITS / 8),
                                         SIGN ? q.t->signs + row * s->sign_bytes + first * (SIGN == 1 ? 32 : 28) : nullptr, supers,
                                         &points);
    for (int64_t i = 0; i < supers; i++) {
      I sums[B][PARTS][BYTES];
      UNROLLED for (int b = 0; b < B; b++)
        UNROLLED for (int part = 0; part < PARTS; part++)
          UNROLLED for (int byte = 0; byte < BYTES; byte++) sums[b][part][byte] = zero;
      UNROLLED for (int j = 0; j < 4; j++) {
        const I words = _mm512_load_si512(points.words + SUPER / WIDE * i + (WIDE == 8 ? 0 : 32 * (j / 2)));
        const I value = point_values<WIDE>(values, words, j);
        const int part = PARTS == 1 ? 0 : j / 2;
        if constexpr (SIGN == 0) {
          UNROLLED for (int b = 0; b < B; b++)
            UNROLLED for (int byte = 0; byte < BYTES; byte++)
              sums[b][part][byte] = _mm512_dpbusd_epi32(sums[b][part][byte], value, _mm512_load_si512(x[b]->plane[byte] + 64 * j));
        } else {
          const __mmask64 negative = points.negative[i][j];
          const I own = _mm512_mask_sub_epi8(value, negative, zero, value);
          UNROLLED for (int b = 0; b < B; b++) {
            const I first = _mm512_load_si512(x[b]->plane[BYTES - 1] + 64 * j);
            sums[b][part][BYTES - 1] =
                _mm512_dpbusd_epi32(sums[b][part][BYTES - 1], value, _mm512_mask_sub_epi8(first, negative, zero, first));
            UNROLLED for (int byte = 0; byte < BYTES - 1; byte++)
              sums[b][part][byte] = _mm512_dpbusd_epi32(sums[b][part][byte], _mm512_load_si512(x[b]->plane[byte] + 64 * j), own);
          }
        }
      }
      const F scales = f_load(scale_of + SUPER / GROUP * i);
      UNROLLED for (int part = 0; part < PARTS; part++) {
        const F scale = f_permute(scales, i_load(lanes.of[part]));
        UNROLLED for (int b = 0; b < B; b++) {
          const F of_x = f_permute(_mm512_castps256_ps512(_mm256_load_ps(x[b]->scale)), i_load(lanes.x_of[part]));
          total[b] = f_fma(number_of<BYTES>(sums[b][part]), f_mul(scale, of_x), total[b]);
        }
      }
      UNROLLED for (int b = 0; b < B; b++) x[b]++;
    }
  }
  UNROLLED for (int b = 0; b < B; b++) put(q.p, n + b, row, f_sum(total[b]));
}

// --- choosing -----------------------------------------------------------------------------------------------------------------

typedef void (*LatticeTile)(const Product&, int64_t row, int64_t n);
struct LatticeTiles {
  int64_t wide, bits, sign, group;
  LatticeTile one[2], four[2];  // of x in two and in three bytes
};
template <int WIDE, int BITS, int SIGN, int GROUP> static constexpr LatticeTiles lattice_tiles() {
  return {WIDE, BITS, SIGN, GROUP,
          {product_lattice<WIDE, BITS, SIGN, GROUP, 2, 1>, product_lattice<WIDE, BITS, SIGN, GROUP, 3, 1>},
          {product_lattice<WIDE, BITS, SIGN, GROUP, 2, 4>, product_lattice<WIDE, BITS, SIGN, GROUP, 3, 4>}};
}
static const LatticeTiles LATTICES[] = {
    lattice_tiles<8, 8, 7, 32>(),   // IQ2_XXS
    lattice_tiles<8, 9, 7, 16>(),   // IQ2_XS
    lattice_tiles<8, 10, 1, 16>(),  // IQ2_S
    lattice_tiles<4, 8, 7, 32>(),   // IQ3_XXS
    lattice_tiles<4, 9, 1, 32>(),   // IQ3_S
    lattice_tiles<8, 11, 0, 32>(),  // IQ1_S
};

// Null where points are read as numbers.
static const LatticeTiles* lattice_of(const anybit_shape* s) {
  if (s->table_kind != ANYBIT_F32_POINTS || s->high != 1 || s->books != 1 || s->columns % SUPER || s->offset.kind != ANYBIT_ABSENT)
    return nullptr;
  if ((s->sign_bits != 0) == (s->zero.kind != ANYBIT_ABSENT)) return nullptr;
  for (const LatticeTiles& tiles : LATTICES)
    if (tiles.wide == s->wide && tiles.bits == s->bits && tiles.sign == s->sign_bits && tiles.group == s->group) return &tiles;
  return nullptr;
}

static void multiply_lattice(const LatticeTiles* tiles, const Product& q, int64_t row, int64_t last_row) {
  const int bytes = bytes_of_input(q.p);
  for (; row < last_row; row++) {
    int64_t n = 0;
    for (; n + 4 <= q.p->n; n += 4) tiles->four[bytes - 2](q, row, n);
    for (; n < q.p->n; n++) tiles->one[bytes - 2](q, row, n);
  }
}

static void lattice_input(const LatticeTiles* tiles, const anybit_product* p, int64_t columns, float* values) {
  typedef void (*Take)(int64_t, float*);
  static const Take TAKE[2][2][2] = {{{take_limbs<2, 4, false>, take_limbs<2, 4, true>}, {take_limbs<2, 8, false>, take_limbs<2, 8, true>}},
                                     {{take_limbs<3, 4, false>, take_limbs<3, 4, true>}, {take_limbs<3, 8, false>, take_limbs<3, 8, true>}}};
  TAKE[bytes_of_input(p) - 2][tiles->wide == 8][tiles->sign == 0](columns, values);
}

}  // namespace

#endif
