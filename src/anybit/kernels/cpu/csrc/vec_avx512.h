// AVX-512 F, BW, DQ and VL: sixteen lanes, and a table of sixteen floats in one register.
#ifndef ANYBIT_VEC_H
#define ANYBIT_VEC_H

#include <immintrin.h>

#define ANYBIT_EIGHT_X86  // vec_eight.h
#define ANYBIT_LANES_16

namespace {

static constexpr int LANES = 16;
static constexpr bool VECTORS = true;  // registers, worth tiling for

typedef __m512 F;
typedef __m512i I;
typedef __m512 Lut;

static inline F f_zero() { return _mm512_setzero_ps(); }
static inline F f_set(float a) { return _mm512_set1_ps(a); }
static inline F f_load(const float* p) { return _mm512_loadu_ps(p); }
static inline F f_load_four(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }  // again and again
static inline void f_store(float* p, F a) { _mm512_storeu_ps(p, a); }
static inline F f_add(F a, F b) { return _mm512_add_ps(a, b); }
static inline F f_sub(F a, F b) { return _mm512_sub_ps(a, b); }
static inline F f_mul(F a, F b) { return _mm512_mul_ps(a, b); }
static inline F f_div(F a, F b) { return _mm512_div_ps(a, b); }
static inline F f_fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
static inline float f_sum(F a) { return _mm512_reduce_add_ps(a); }
static inline I round_bits_bf16(F a) {  // nearest even, in the upper half of each lane
  I bits = _mm512_castps_si512(a);
  I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
}
static inline F f_round_bf16(F a) {
  return _mm512_castsi512_ps(_mm512_and_si512(round_bits_bf16(a), _mm512_set1_epi32((int)0xFFFF0000)));
}
static inline F f_round_f16(F a) { return _mm512_cvtph_ps(_mm512_cvtps_ph(a, 0)); }
static inline F f_permute(F a, I index) { return _mm512_permutexvar_ps(index, a); }

static inline I i_load(const uint32_t* p) { return _mm512_loadu_si512(p); }
static inline void i_store(uint32_t* p, I a) { _mm512_storeu_si512(p, a); }
static inline I i_and(I a, I b) { return _mm512_and_si512(a, b); }
static inline I i_xor(I a, uint32_t b) { return _mm512_xor_si512(a, _mm512_set1_epi32((int)b)); }
template <int N> static inline I i_right(I a) { return _mm512_srli_epi32(a, N); }
static inline I i_add(I a, I b) { return _mm512_add_epi32(a, b); }
static inline I i_field(I a, I mask, I flip) { return _mm512_ternarylogic_epi32(a, mask, flip, 0x6A); }  // (a & mask) ^ flip
static inline I i_or(I a, I b) { return _mm512_or_si512(a, b); }
template <int N> static inline I i_left(I a) { return _mm512_slli_epi32(a, N); }
static inline I i_set(uint32_t a) { return _mm512_set1_epi32((int)a); }
static inline I i_load_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
// Lane i of the sum gets bytes 4 i .. 4 i + 3 of u (unsigned, up to 7 bits) times those of x (signed).
static inline I i_dot7(I sum, I u, I x) {
#ifdef ANYBIT_VNNI
  return _mm512_dpbusd_epi32(sum, u, x);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(u, x), _mm512_set1_epi16(1)));
#endif
}
static inline I i_dot8(I sum, I u, I x) {  // of all eight bits
#ifdef ANYBIT_VNNI
  return _mm512_dpbusd_epi32(sum, u, x);
#else
  const I low = _mm512_set1_epi16(0xFF);
  sum = _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_and_si512(u, low), _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8)));
  return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_srli_epi16(u, 8), _mm512_srai_epi16(x, 8)));
#endif
}
static inline I i_zero() { return _mm512_setzero_si512(); }
static inline I b_table(const uint8_t* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)); }
static inline I b_take(I table, I index) { return _mm512_shuffle_epi8(table, index); }  // of each byte, below 16
static inline F f_gather(const float* table, I index) { return _mm512_i32gather_ps(index, table, 4); }
static inline F f_of_integers(I a) { return _mm512_cvtepi32_ps(a); }

static inline F f_load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
static inline F f_load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline void f_store_bf16(uint16_t* p, F a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bits_bf16(a), 16)));
}
static inline F f_load_u8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
static inline F f_load_i8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
static inline F f_load_e8m0(const uint8_t* p) {
  I byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  I power = _mm512_max_epu32(_mm512_slli_epi32(byte, 23), _mm512_set1_epi32(0x00400000));  // 2**-127 is a subnormal
  __mmask16 nan = _mm512_cmpeq_epi32_mask(byte, _mm512_set1_epi32(255));
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(power, nan, _mm512_set1_epi32(0x7FC00000)));
}
static inline F f_load_e5m2(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)), 8));
}
static inline F f_load_e4m3(const uint8_t* p) {  // the same exponent in half precision, 2**8 too small
  __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
  return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16((short)0xBFFF))), _mm512_set1_ps(256.0f));
}

static inline Lut lut_load(const float* p) { return _mm512_loadu_ps(p); }
static inline F lut_take(Lut lut, I index) { return _mm512_permutexvar_ps(index, lut); }

template <int BITS> static inline I chunk_load(const uint8_t* p) {
  if constexpr (BITS == 1) return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  if constexpr (BITS == 2) return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  if constexpr (BITS == 4) return _mm512_loadu_si512(p);
  // three bytes a lane: twelve to each 128 bits first, then each three to a lane
  const __m512i quarters = _mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11);
  const __m512i spread = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
  return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(quarters, _mm512_maskz_loadu_epi32(0x0FFF, p)), spread);
}

template <int BITS> static inline I codes_load(const uint8_t* p) {
  alignas(64) static constexpr struct Tables {
    int8_t spread[64];
    int32_t shift[16];
    constexpr Tables() : spread(), shift() {
      for (int i = 0; i < 16; i++) {
        for (int byte = 0; byte < 4; byte++) spread[4 * i + byte] = byte < 2 ? int8_t(BITS * i / 8 + byte) : int8_t(-1);
        shift[i] = BITS * i % 8;
      }
    }
  } tables;
  __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
  __m512i lanes = _mm512_shuffle_epi8(all, _mm512_load_si512(tables.spread));
  return _mm512_srlv_epi32(lanes, _mm512_load_si512(tables.shift));
}

// Lane i gets fields 4 i .. 4 i + 3 of a stream of W bits each, one a byte, with anything above them. Reads LANES * W / 2 bytes.
template <int W> static inline I quads_load(const uint8_t* p) {
  if constexpr (W == 8) return _mm512_loadu_si512(p);
#ifdef ANYBIT_VBMI
  alignas(64) static constexpr struct Tables {
    uint8_t spread[64], shift[64];
    constexpr Tables() : spread(), shift() {
      for (int i = 0; i < 64; i++) {
        spread[i] = i % 8 < W ? uint8_t(i / 8 * W + i % 8) : uint8_t(63);  // 63: beyond what is read, zero
        shift[i] = uint8_t(W * (i % 8));
      }
    }
  } tables;
  const I raw = _mm512_permutexvar_epi8(_mm512_load_si512(tables.spread), _mm512_maskz_loadu_epi8((1ull << (8 * W % 64)) - 1, p));
  return _mm512_multishift_epi64_epi8(_mm512_load_si512(tables.shift), raw);
#else
  I four;  // 4 W bits a lane
  if constexpr (W % 2 == 0) {
    four = chunk_load<W / 2>(p);
  } else {
    constexpr int BYTES = 2 * W;  // of every 128 bits; the last ones are read early, to stay inside
    alignas(64) static constexpr struct Tables {
      int8_t spread[64];
      int32_t shift[16];
      constexpr Tables() : spread(), shift() {
        for (int i = 0; i < 16; i++) {
          for (int byte = 0; byte < 4; byte++) spread[4 * i + byte] = int8_t(i % 4 * W / 2 + byte + (i < 12 ? 0 : 16 - BYTES));
          shift[i] = 4 * W * i % 8;
        }
      }
    } tables;
    __m512i raw = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)p));
    raw = _mm512_inserti32x4(raw, _mm_loadu_si128((const __m128i*)(p + BYTES)), 1);
    raw = _mm512_inserti32x4(raw, _mm_loadu_si128((const __m128i*)(p + 2 * BYTES)), 2);
    raw = _mm512_inserti32x4(raw, _mm_loadu_si128((const __m128i*)(p + 4 * BYTES - 16)), 3);
    four = _mm512_srlv_epi32(_mm512_shuffle_epi8(raw, _mm512_load_si512(tables.spread)), _mm512_load_si512(tables.shift));
  }
  constexpr uint32_t MASK = (1u << W) - 1;
  return i_or(i_or(i_and(four, i_set(MASK)), i_and(i_left<8 - W>(four), i_set(MASK << 8))),
              i_or(i_and(i_left<2 * (8 - W)>(four), i_set(MASK << 16)), i_and(i_left<3 * (8 - W)>(four), i_set(MASK << 24))));
#endif
}

// LANES x LANES words: out[i * out_stride + j] = in[j * in_stride + i]
static inline void transpose(const uint32_t* in, int64_t in_stride, uint32_t* out, int64_t out_stride) {
  __m512i r[16], t[16];
  for (int j = 0; j < 16; j++) r[j] = _mm512_loadu_si512(in + j * in_stride);
  for (int j = 0; j < 16; j += 2) {
    t[j] = _mm512_unpacklo_epi32(r[j], r[j + 1]);
    t[j + 1] = _mm512_unpackhi_epi32(r[j], r[j + 1]);
  }
  for (int j = 0; j < 16; j += 4) {  // r[j + i]: words i of every 128 bits of rows j .. j + 3
    r[j] = _mm512_unpacklo_epi64(t[j], t[j + 2]);
    r[j + 1] = _mm512_unpackhi_epi64(t[j], t[j + 2]);
    r[j + 2] = _mm512_unpacklo_epi64(t[j + 1], t[j + 3]);
    r[j + 3] = _mm512_unpackhi_epi64(t[j + 1], t[j + 3]);
  }
  for (int i = 0; i < 4; i++) {  // then the 128 bits themselves are a 4 x 4 matrix
    __m512i low = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), high = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    _mm512_storeu_si512(out + i * out_stride, _mm512_shuffle_i32x4(low, high, 0x88));
    _mm512_storeu_si512(out + (i + 8) * out_stride, _mm512_shuffle_i32x4(low, high, 0xDD));
    low = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD), high = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
    _mm512_storeu_si512(out + (i + 4) * out_stride, _mm512_shuffle_i32x4(low, high, 0x88));
    _mm512_storeu_si512(out + (i + 12) * out_stride, _mm512_shuffle_i32x4(low, high, 0xDD));
  }
}

}  // namespace

#endif
