// AVX2, FMA and F16C: eight lanes.
#ifndef ANYBIT_VEC_H
#define ANYBIT_VEC_H

#include <immintrin.h>

#define ANYBIT_EIGHT_X86  // vec_eight.h

namespace {

static constexpr int LANES = 8;
static constexpr bool VECTORS = true;  // registers, worth tiling for

typedef __m256 F;
typedef __m256i I;
struct Lut { __m256 low, high; };

static inline F f_zero() { return _mm256_setzero_ps(); }
static inline F f_set(float a) { return _mm256_set1_ps(a); }
static inline F f_load(const float* p) { return _mm256_loadu_ps(p); }
static inline F f_load_four(const float* p) { return _mm256_broadcast_ps((const __m128*)p); }  // again and again
static inline void f_store(float* p, F a) { _mm256_storeu_ps(p, a); }
static inline F f_add(F a, F b) { return _mm256_add_ps(a, b); }
static inline F f_sub(F a, F b) { return _mm256_sub_ps(a, b); }
static inline F f_mul(F a, F b) { return _mm256_mul_ps(a, b); }
static inline F f_div(F a, F b) { return _mm256_div_ps(a, b); }
static inline F f_fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
static inline float f_sum(F a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline I round_bits_bf16(F a) {  // nearest even, in the upper half of each lane
  I bits = _mm256_castps_si256(a);
  I odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
}
static inline F f_round_bf16(F a) {
  return _mm256_castsi256_ps(_mm256_and_si256(round_bits_bf16(a), _mm256_set1_epi32((int)0xFFFF0000)));
}
static inline F f_round_f16(F a) { return _mm256_cvtph_ps(_mm256_cvtps_ph(a, 0)); }
static inline F f_permute(F a, I index) { return _mm256_permutevar8x32_ps(a, index); }

static inline I i_load(const uint32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline void i_store(uint32_t* p, I a) { _mm256_storeu_si256((__m256i*)p, a); }
static inline I i_and(I a, I b) { return _mm256_and_si256(a, b); }
static inline I i_xor(I a, uint32_t b) { return _mm256_xor_si256(a, _mm256_set1_epi32((int)b)); }
template <int N> static inline I i_right(I a) { return _mm256_srli_epi32(a, N); }
static inline I i_add(I a, I b) { return _mm256_add_epi32(a, b); }
static inline I i_field(I a, I mask, I flip) { return _mm256_xor_si256(_mm256_and_si256(a, mask), flip); }
static inline I i_or(I a, I b) { return _mm256_or_si256(a, b); }
template <int N> static inline I i_left(I a) { return _mm256_slli_epi32(a, N); }
static inline I i_set(uint32_t a) { return _mm256_set1_epi32((int)a); }
static inline I i_load_u8(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
// Lane i of the sum gets bytes 4 i .. 4 i + 3 of u (unsigned, up to 7 bits) times those of x (signed).
static inline I i_dot7(I sum, I u, I x) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(u, x), _mm256_set1_epi16(1)));
}
static inline I i_dot8(I sum, I u, I x) {  // of all eight bits
  const I low = _mm256_set1_epi16(0xFF);
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_and_si256(u, low), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8)));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(x, 8)));
}
static inline I i_zero() { return _mm256_setzero_si256(); }
static inline I b_table(const uint8_t* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)); }
static inline I b_take(I table, I index) { return _mm256_shuffle_epi8(table, index); }  // of each byte, below 16
static inline F f_gather(const float* table, I index) { return _mm256_i32gather_ps(table, index, 4); }
static inline F f_of_integers(I a) { return _mm256_cvtepi32_ps(a); }

static inline F f_load_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
static inline F f_load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline void f_store_bf16(uint16_t* p, F a) {
  I upper = _mm256_srli_epi32(round_bits_bf16(a), 16);
  I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
static inline F f_load_u8(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
static inline F f_load_i8(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
static inline F f_load_e8m0(const uint8_t* p) {
  I byte = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
  I power = _mm256_max_epu32(_mm256_slli_epi32(byte, 23), _mm256_set1_epi32(0x00400000));  // 2**-127 is a subnormal
  I nan = _mm256_and_si256(_mm256_cmpeq_epi32(byte, _mm256_set1_epi32(255)), _mm256_set1_epi32(0x7FC00000));
  return _mm256_castsi256_ps(_mm256_or_si256(power, nan));
}
static inline F f_load_e5m2(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p)), 8));
}
static inline F f_load_e4m3(const uint8_t* p) {  // the same exponent in half precision, 2**8 too small
  __m128i wide = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p)), 7);
  return _mm256_mul_ps(_mm256_cvtph_ps(_mm_and_si128(wide, _mm_set1_epi16((short)0xBFFF))), _mm256_set1_ps(256.0f));
}

static inline Lut lut_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline F lut_take(const Lut& lut, I index) {  // permutes read three bits; the fourth chooses the half
  F low = _mm256_permutevar8x32_ps(lut.low, index), high = _mm256_permutevar8x32_ps(lut.high, index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

template <int BITS> static inline I chunk_load(const uint8_t* p) {
  if constexpr (BITS == 1) return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
  if constexpr (BITS == 2) return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  if constexpr (BITS == 4) return _mm256_loadu_si256((const __m256i*)p);
  // three bytes a lane: 12 of each 16-byte piece; the second piece is read four bytes early to stay inside 24 bytes
  const __m256i spread = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1,
                                          4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14, 15, -1);
  __m128i low = _mm_loadu_si128((const __m128i*)p), high = _mm_loadu_si128((const __m128i*)(p + 8));
  return _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1), spread);
}

template <int BITS> static inline I codes_load(const uint8_t* p) {
  alignas(32) static constexpr struct Tables {
    int8_t spread[32];
    int32_t shift[8];
    constexpr Tables() : spread(), shift() {
      for (int i = 0; i < 8; i++) {
        for (int byte = 0; byte < 4; byte++) spread[4 * i + byte] = byte < 2 ? int8_t(BITS * i / 8 + byte) : int8_t(-1);
        shift[i] = BITS * i % 8;
      }
    }
  } tables;
  __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
  __m256i lanes = _mm256_shuffle_epi8(both, _mm256_load_si256((const __m256i*)tables.spread));
  return _mm256_srlv_epi32(lanes, _mm256_load_si256((const __m256i*)tables.shift));
}

// Lane i gets fields 4 i .. 4 i + 3 of a stream of W bits each, one a byte, with anything above them. Reads LANES * W / 2 bytes.
template <int W> static inline I quads_load(const uint8_t* p) {
  if constexpr (W == 8) return _mm256_loadu_si256((const __m256i*)p);
  I four;  // 4 W bits a lane
  if constexpr (W % 2 == 0) {
    four = chunk_load<W / 2>(p);
  } else {
    constexpr int BYTES = 2 * W;  // of every 128 bits; the second ones are read early, to stay inside
    alignas(32) static constexpr struct Tables {
      int8_t spread[32];
      int32_t shift[8];
      constexpr Tables() : spread(), shift() {
        for (int i = 0; i < 8; i++) {
          for (int byte = 0; byte < 4; byte++) spread[4 * i + byte] = int8_t(i % 4 * W / 2 + byte + (i < 4 ? 0 : 16 - BYTES));
          shift[i] = 4 * W * i % 8;
        }
      }
    } tables;
    __m128i low = _mm_loadu_si128((const __m128i*)p), high = _mm_loadu_si128((const __m128i*)(p + 2 * BYTES - 16));
    __m256i raw = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    raw = _mm256_shuffle_epi8(raw, _mm256_load_si256((const __m256i*)tables.spread));
    four = _mm256_srlv_epi32(raw, _mm256_load_si256((const __m256i*)tables.shift));
  }
  constexpr uint32_t MASK = (1u << W) - 1;
  return i_or(i_or(i_and(four, i_set(MASK)), i_and(i_left<8 - W>(four), i_set(MASK << 8))),
              i_or(i_and(i_left<2 * (8 - W)>(four), i_set(MASK << 16)), i_and(i_left<3 * (8 - W)>(four), i_set(MASK << 24))));
}

// LANES x LANES words: out[i * out_stride + j] = in[j * in_stride + i]
static inline void transpose(const uint32_t* in, int64_t in_stride, uint32_t* out, int64_t out_stride) {
  __m256 r[8], t[8];
  for (int j = 0; j < 8; j++) r[j] = _mm256_loadu_ps((const float*)(in + j * in_stride));
  for (int j = 0; j < 8; j += 2) {
    t[j] = _mm256_unpacklo_ps(r[j], r[j + 1]);
    t[j + 1] = _mm256_unpackhi_ps(r[j], r[j + 1]);
  }
  for (int j = 0; j < 8; j += 4) {
    r[j] = _mm256_shuffle_ps(t[j], t[j + 2], 0x44);
    r[j + 1] = _mm256_shuffle_ps(t[j], t[j + 2], 0xEE);
    r[j + 2] = _mm256_shuffle_ps(t[j + 1], t[j + 3], 0x44);
    r[j + 3] = _mm256_shuffle_ps(t[j + 1], t[j + 3], 0xEE);
  }
  for (int j = 0; j < 4; j++) {
    _mm256_storeu_ps((float*)(out + j * out_stride), _mm256_permute2f128_ps(r[j], r[j + 4], 0x20));
    _mm256_storeu_ps((float*)(out + (j + 4) * out_stride), _mm256_permute2f128_ps(r[j], r[j + 4], 0x31));
  }
}

}  // namespace

#endif
