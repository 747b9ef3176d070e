// Vectors of two with codes of up to eight bits (HIGGS): the bytes of the two halves of an entry are looked up separately, 64 codes
// at a time, and put together again.
//
//   IN_PAIRS     a bfloat16 x: numbers of the table become bfloat16 too, multiplied in pairs
//                128 bits L (of 4), pair of unpacking j: codes 16 L + 4 j ..+ 3     x: for every 64 codes the words [j][L][4]
//   APART_...    another x: tables of numbers that float16 or bfloat16 holds, first and second numbers multiplied apart
//                number v, half h of every 128 bits, upper half u of a register: lane 8 m + i has code 32 u + 16 m + 8 h + i
#ifndef ANYBIT_BOOK_PAIRS_H
#define ANYBIT_BOOK_PAIRS_H

namespace {

enum PairWay { NOT_IN_PAIRS, IN_PAIRS, APART_HALVES, APART_BRAINS };

#ifdef ANYBIT_VBMI
// Whether all bits of the numbers are those of a shorter float: float16 without subnormals, bfloat16.
static bool fits(const float* numbers, int64_t count, bool half) {
  uint32_t wrong = 0;
  for (int64_t i = 0; i < count; i++) {
    const uint32_t bits = bits_of_float(numbers[i]), size = bits & 0x7FFFFFFFu;
    wrong |= half ? (bits & 0x1FFF) | (size != 0 && (size < 0x38800000u || size >= 0x47800000u)) : bits & 0xFFFF;
  }
  return wrong == 0;
}

static PairWay pair_way(const anybit_shape* s, const anybit_tensors* t, const anybit_product* p) {
  const bool pairs = s->high == 1 && s->wide == 2 && s->books == 1 && !s->sign_bits && !has_shift(s) &&
                     s->table_kind == ANYBIT_F32 && (s->bits == 4 || s->bits == 6 || s->bits == 8) && wide_group(s, CHUNK);
  if (!pairs || p->x_kind == ANYBIT_BF16) return pairs ? IN_PAIRS : NOT_IN_PAIRS;
  const int64_t count = 2 << s->bits;
  return fits(t->table, count, true) ? APART_HALVES : fits(t->table, count, false) ? APART_BRAINS : NOT_IN_PAIRS;
}

static void read_planes(const anybit_shape* s, const anybit_tensors* t, PairWay way, uint8_t (*planes)[256]) {
  for (int64_t i = 0; i < 256; i++) {
    const float* entry = t->table + 2 * (i & ((1 << s->bits) - 1));
    uint32_t word = 0;
    for (int v = 0; v < 2; v++)
      word |= (uint32_t)(way == APART_HALVES ? f16_of_float(entry[v]) : bf16_of_float(entry[v])) << (16 * v);
    for (int byte = 0; byte < 4; byte++) planes[byte][i] = (uint8_t)(word >> (8 * byte));
  }
}

static void pair_input(int64_t columns, PairWay way, float* values) {  // in place: words end before what they are read from
  if (way != IN_PAIRS) {
    float natural[CHUNK];
    for (int64_t start = 0; start < columns; start += CHUNK) {
      memcpy(natural, values + start, sizeof natural);
      for (int i = 0; i < CHUNK; i++) {
        const int v = i / 64, h = i / 32 % 2, u = i / 16 % 2, m = i / 8 % 2;
        values[start + i] = natural[2 * (32 * u + 16 * m + 8 * h + i % 8) + v];
      }
    }
    return;
  }
  uint32_t natural[CHUNK / 2], *out = (uint32_t*)values;
  for (int64_t start = 0; start < columns; start += CHUNK, out += CHUNK / 2) {
    for (int i = 0; i < CHUNK / 2; i++)
      natural[i] = bits_of_float(values[start + 2 * i]) >> 16 | (bits_of_float(values[start + 2 * i + 1]) & 0xFFFF0000u);
    for (int j = 0; j < 4; j++)
      for (int block = 0; block < 4; block++) memcpy(out + 16 * j + 4 * block, natural + 16 * block + 4 * j, 16);
  }
}

// The bytes of an entry, for 64 codes.
template <int BITS> struct Planes {
  static constexpr int QUARTERS = BITS == 8 ? 4 : 1;
  I of[4][QUARTERS];

  explicit Planes(const uint8_t (*planes)[256]) {
    UNROLLED for (int byte = 0; byte < 4; byte++)
      UNROLLED for (int part = 0; part < QUARTERS; part++) of[byte][part] = _mm512_loadu_si512(planes[byte] + 64 * part);
  }
  ALWAYS_INLINE I take(int i, I index) const {
    if constexpr (BITS == 8) {
      const I low = _mm512_permutex2var_epi8(of[i][0], index, of[i][1]);
      const I high = _mm512_permutex2var_epi8(of[i][2], index, of[i][3]);
      return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
    } else {
      return _mm512_permutexvar_epi8(index, of[i][0]);  // six bits are looked at
    }
  }
};

// 64 codes of a row that ends `left` bytes behind p.
template <int BITS> static ALWAYS_INLINE I pair_codes(const uint8_t* p, int64_t left) {
  if (left >= 8 * BITS) return quads_load<BITS>(p);
  uint8_t spare[8 * BITS];
  memset(spare, 0, sizeof spare);
  memcpy(spare, p, (size_t)left);
  return quads_load<BITS>(spare);
}

// R rows of the weight, B rows of x, whose 64 codes are multiplied by step(codes, column, sums of R x B x 2).
template <int BITS, int R, int B, class Step>
static ALWAYS_INLINE void product_of_pairs(const Product& q, int64_t row, int64_t n, const Step& step) {
  const anybit_shape* s = q.s;
  F total[R][B];
  UNROLLED for (int r = 0; r < R; r++)
    UNROLLED for (int b = 0; b < B; b++) total[r][b] = f_zero();
  const int64_t group = s->group >= s->columns ? s->columns : s->group, groups = ceil_div(s->columns, group);
  const uint8_t* codes = q.t->codes + row * s->row_bytes;
  Runs<R> runs;
  for (int64_t base = 0; base < groups; base += RUN) {
    const int64_t count = least(RUN, groups - base);
    read_runs<R>(s, q.t, Unit{0.0f, 1.0f}, row, base, count, &runs);
    for (int64_t g = 0; g < count; g++) {
      F acc[R][B][2];
      UNROLLED for (int r = 0; r < R; r++)
        UNROLLED for (int b = 0; b < B; b++) acc[r][b][0] = acc[r][b][1] = f_zero();
      const int64_t end = least((base + g + 1) * group, s->columns);
      for (int64_t column = (base + g) * group; column < end; column += CHUNK) {
        const int64_t at = column / 2 * BITS / 8;
        UNROLLED for (int r = 0; r < R; r++) prefetch(codes + (r + R) * s->row_bytes + at);
        UNROLLED for (int r = 0; r < R; r++)
          step(pair_codes<BITS>(codes + r * s->row_bytes + at, s->row_bytes - at), column, acc[r]);
      }
      UNROLLED for (int r = 0; r < R; r++) {
        const F scale = f_set(runs.scale[r][g]);
        UNROLLED for (int b = 0; b < B; b++) total[r][b] = f_fma(f_add(acc[r][b][0], acc[r][b][1]), scale, total[r][b]);
      }
    }
  }
  UNROLLED for (int r = 0; r < R; r++)
    UNROLLED for (int b = 0; b < B; b++) put(q.p, n + b, row + r, f_sum(total[r][b]));
}

template <int BITS, int R, int B> static void product_pairs(const Product& q, int64_t row, int64_t n) {
  const Planes<BITS> planes(q.planes);
  const uint32_t* x = (const uint32_t*)(q.in->values + n * q.in->value_stride);
  const int64_t stride = q.in->value_stride;
  product_of_pairs<BITS, R, B>(q, row, n, [&](I index, int64_t column, F (*acc)[2]) INLINE_LAMBDA {
    I byte[4];
    UNROLLED for (int i = 0; i < 4; i++) byte[i] = planes.take(i, index);
    const I low_first = _mm512_unpacklo_epi8(byte[0], byte[1]), high_first = _mm512_unpackhi_epi8(byte[0], byte[1]);
    const I low_second = _mm512_unpacklo_epi8(byte[2], byte[3]), high_second = _mm512_unpackhi_epi8(byte[2], byte[3]);
    const I pairs[4] = {_mm512_unpacklo_epi16(low_first, low_second), _mm512_unpackhi_epi16(low_first, low_second),
                        _mm512_unpacklo_epi16(high_first, high_second), _mm512_unpackhi_epi16(high_first, high_second)};
    UNROLLED for (int j = 0; j < 4; j++)
      UNROLLED for (int b = 0; b < B; b++)
        acc[b][j % 2] = _mm512_dpbf16_ps(acc[b][j % 2], (__m512bh)pairs[j],
                                         (__m512bh)_mm512_loadu_si512(x + b * stride + column / 2 + 16 * j));
  });
}

static ALWAYS_INLINE F sixteen_of(Half, __m256i words) { return _mm512_cvtph_ps(words); }
static ALWAYS_INLINE F sixteen_of(Brain, __m256i words) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

template <class T, int BITS, int R, int B> static void product_apart(const Product& q, int64_t row, int64_t n) {
  const Planes<BITS> planes(q.planes);
  const float* x = q.in->values + n * q.in->value_stride;
  const int64_t stride = q.in->value_stride;
  product_of_pairs<BITS, R, B>(q, row, n, [&](I index, int64_t column, F (*acc)[2]) INLINE_LAMBDA {
    UNROLLED for (int v = 0; v < 2; v++) {
      const I low = planes.take(2 * v, index), high = planes.take(2 * v + 1, index);
      UNROLLED for (int h = 0; h < 2; h++) {
        const I words = h ? _mm512_unpackhi_epi8(low, high) : _mm512_unpacklo_epi8(low, high);
        UNROLLED for (int u = 0; u < 2; u++) {
          const F w = sixteen_of(T(), u ? _mm512_extracti64x4_epi64(words, 1) : _mm512_castsi512_si256(words));
          UNROLLED for (int b = 0; b < B; b++)
            acc[b][u] = f_fma(w, f_load(x + b * stride + column + 64 * v + 32 * h + 16 * u), acc[b][u]);
        }
      }
    }
  });
}
#else
static PairWay pair_way(const anybit_shape*, const anybit_tensors*, const anybit_product*) { return NOT_IN_PAIRS; }
static void read_planes(const anybit_shape*, const anybit_tensors*, PairWay, uint8_t (*)[256]) {}
static void pair_input(int64_t, PairWay, float*) {}
#endif

}  // namespace

#endif
