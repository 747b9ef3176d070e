// A few floats or integers at a time: the compiler's own vectors, 16 lanes wide with AVX-512, 8 with AVX2, 4 elsewhere (SSE2,
// NEON), and arrays for compilers that have none. No operation is fused with another (-ffp-contract=off).
#ifndef ANYBIT_LANES_H
#define ANYBIT_LANES_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "numbers.h"

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

#if (defined(__GNUC__) || defined(__clang__)) && !defined(ANYBIT_PLAIN_LANES)
#define ANYBIT_VECTORS
typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t Small __attribute__((vector_size(LANES)));

inline F f_all(float a) { return F{} + a; }
inline I i_all(int32_t a) { return I{} + a; }
inline F pick(I mask, F a, F b) { return mask ? a : b; }
inline I pick(I mask, I a, I b) { return mask ? a : b; }
inline I bits_of(F a) { return (I)a; }
inline F float_of(I a) { return (F)a; }
inline I i_of(F a) { return __builtin_convertvector(a, I); }  // towards zero
inline F f_of(I a) { return __builtin_convertvector(a, F); }
inline I i_shift_right(I a, int bits) {  // without sign
  typedef uint32_t U __attribute__((vector_size(4 * LANES)));
  return (I)((U)a >> bits);
}
inline I i_shift_left(I a, int bits) {
  typedef uint32_t U __attribute__((vector_size(4 * LANES)));
  return (I)((U)a << bits);
}
inline I widened(Halves a) { return __builtin_convertvector(a, I); }
inline void store_bytes(uint8_t* p, I a) {
  const Small bytes = __builtin_convertvector(a, Small);
  memcpy(p, &bytes, sizeof bytes);
}
#else
struct F { float v[LANES]; float operator[](int i) const { return v[i]; } };
struct I { int32_t v[LANES]; int32_t operator[](int i) const { return v[i]; } };
struct Halves { uint16_t v[LANES]; };
#define EACH for (int i = 0; i < LANES; i++)
#define ARITHMETIC(T, op) \
  inline T operator op(T a, T b) { EACH a.v[i] = a.v[i] op b.v[i]; return a; }
ARITHMETIC(F, +) ARITHMETIC(F, -) ARITHMETIC(F, *) ARITHMETIC(F, /)
ARITHMETIC(I, +) ARITHMETIC(I, -) ARITHMETIC(I, &) ARITHMETIC(I, |)
#undef ARITHMETIC
inline F f_all(float a) { F r; EACH r.v[i] = a; return r; }
inline I i_all(int32_t a) { I r; EACH r.v[i] = a; return r; }
inline F operator*(F a, float b) { return a * f_all(b); }
inline F operator*(float a, F b) { return f_all(a) * b; }
inline F operator/(float a, F b) { return f_all(a) / b; }
inline F operator/(F a, float b) { return a / f_all(b); }
inline F operator+(F a, float b) { return a + f_all(b); }
inline F operator-(F a, float b) { return a - f_all(b); }
inline F operator-(F a) { EACH a.v[i] = -a.v[i]; return a; }
inline I operator&(I a, int32_t b) { return a & i_all(b); }
inline I operator|(I a, int32_t b) { return a | i_all(b); }
inline I operator+(I a, int32_t b) { return a + i_all(b); }
inline I operator-(I a, int32_t b) { return a - i_all(b); }
inline I operator-(int32_t a, I b) { return i_all(a) - b; }
inline I i_shift_left(I a, int bits) { EACH a.v[i] = (int32_t)((uint32_t)a.v[i] << bits); return a; }
#define COMPARISON(T, op)                                                             \
  inline I operator op(T a, T b) { I r; EACH r.v[i] = -(a.v[i] op b.v[i]); return r; }
COMPARISON(F, <) COMPARISON(F, >) COMPARISON(F, <=) COMPARISON(F, >=) COMPARISON(F, ==) COMPARISON(F, !=)
COMPARISON(I, <) COMPARISON(I, >) COMPARISON(I, ==) COMPARISON(I, !=)
#undef COMPARISON
inline I operator<(F a, float b) { return a < f_all(b); }
inline I operator>(F a, float b) { return a > f_all(b); }
inline I operator>=(F a, float b) { return a >= f_all(b); }
inline I operator==(F a, float b) { return a == f_all(b); }
inline I operator<(I a, int32_t b) { return a < i_all(b); }
inline I operator>(I a, int32_t b) { return a > i_all(b); }
inline I operator!=(I a, int32_t b) { return a != i_all(b); }
inline F pick(I mask, F a, F b) { EACH a.v[i] = mask.v[i] ? a.v[i] : b.v[i]; return a; }
inline I pick(I mask, I a, I b) { EACH a.v[i] = mask.v[i] ? a.v[i] : b.v[i]; return a; }
inline I bits_of(F a) { I r; memcpy(&r, &a, sizeof r); return r; }
inline F float_of(I a) { F r; memcpy(&r, &a, sizeof r); return r; }
inline I i_of(F a) {
  I r;
  EACH r.v[i] = a.v[i] >= -2147483648.0f && a.v[i] < 2147483648.0f ? (int32_t)a.v[i] : INT32_MIN;
  return r;
}
inline F f_of(I a) { F r; EACH r.v[i] = (float)a.v[i]; return r; }
inline I i_shift_right(I a, int bits) { EACH a.v[i] = (int32_t)((uint32_t)a.v[i] >> bits); return a; }
inline I widened(Halves a) { I r; EACH r.v[i] = a.v[i]; return r; }
inline void store_bytes(uint8_t* p, I a) { EACH p[i] = (uint8_t)a.v[i]; }
#undef EACH
#endif

inline F f_load(const float* p) { F r; memcpy(&r, p, sizeof r); return r; }
inline void f_store(float* p, F a) { memcpy(p, &a, sizeof a); }
inline F f_abs(F a) { return float_of(bits_of(a) & 0x7FFFFFFF); }
// NaN of `a` stays
inline F at_most(F a, F top) { return pick(a > top, top, a); }
inline F at_least(F a, F low) { return pick(a < low, low, a); }

#if defined(__AVX512F__)
inline F f_even(F a) { return (F)_mm512_roundscale_ps((__m512)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F f_trunc(F a) { return (F)_mm512_roundscale_ps((__m512)a, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC); }
inline F f_sqrt(F a) { return (F)_mm512_sqrt_ps((__m512)a); }
inline F f_of_f16(Halves a) { __m256i raw; memcpy(&raw, &a, sizeof raw); return (F)_mm512_cvtph_ps(raw); }
inline Halves f16_of(F a) {
  const __m256i raw = _mm512_cvtps_ph((__m512)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  Halves r;
  memcpy(&r, &raw, sizeof r);
  return r;
}
#elif defined(__AVX2__)
inline F f_even(F a) { return (F)_mm256_round_ps((__m256)a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F f_trunc(F a) { return (F)_mm256_round_ps((__m256)a, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC); }
inline F f_sqrt(F a) { return (F)_mm256_sqrt_ps((__m256)a); }
inline F f_of_f16(Halves a) { __m128i raw; memcpy(&raw, &a, sizeof raw); return (F)_mm256_cvtph_ps(raw); }
inline Halves f16_of(F a) {
  const __m128i raw = _mm256_cvtps_ph((__m256)a, _MM_FROUND_TO_NEAREST_INT);
  Halves r;
  memcpy(&r, &raw, sizeof r);
  return r;
}
#else
inline F f_even(F a) {  // from 2**23 on a float is whole
  const F size = f_abs(a), large = f_all(8388608.0f), whole = (size + large) - large;
  return float_of(bits_of(pick(size < large, whole, size)) | (bits_of(a) & INT32_MIN));
}
inline F f_trunc(F a) {
  const F size = f_abs(a);
  return float_of(bits_of(pick(size < 8388608.0f, f_of(i_of(size)), size)) | (bits_of(a) & INT32_MIN));
}
inline F f_sqrt(F a) {
  float v[LANES];
  f_store(v, a);
  for (int i = 0; i < LANES; i++) v[i] = sqrtf(v[i]);
  return f_load(v);
}
inline F f_of_f16(Halves a) {
  uint16_t raw[LANES];
  float v[LANES];
  memcpy(raw, &a, sizeof raw);
  for (int i = 0; i < LANES; i++) v[i] = float_of_f16(raw[i]);
  return f_load(v);
}
inline Halves f16_of(F a) {
  uint16_t raw[LANES];
  float v[LANES];
  f_store(v, a);
  for (int i = 0; i < LANES; i++) raw[i] = f16_of_float(v[i]);
  Halves r;
  memcpy(&r, raw, sizeof r);
  return r;
}
#endif

inline F rounded_f16(F a) { return f_of_f16(f16_of(a)); }
inline F rounded_bf16(F a) {
  const I raw = pick(a != a, i_all(0), bits_of(a));
  const I up = (raw + 0x7FFF + (i_shift_right(raw, 16) & 1)) & (int32_t)0xFFFF0000;
  return pick(a != a, a, float_of(up));
}
inline F f_half_up(F a) {  // half away from zero
  const F whole = f_trunc(a), rest = a - whole;
  return whole + pick(f_abs(rest) >= 0.5f, float_of((bits_of(rest) & INT32_MIN) | 0x3F800000), f_all(0.0f));
}

template <int KIND> inline F rounded(F a) {
  return KIND == ANYBIT_BF16 ? rounded_bf16(a) : KIND == ANYBIT_F16 ? rounded_f16(a) : a;
}
inline F rounded(F a, int64_t kind) {
  return kind == ANYBIT_BF16 ? rounded_bf16(a) : kind == ANYBIT_F16 ? rounded_f16(a) : a;
}

inline float largest_of(F a) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)a);
#endif
  float v[LANES], found;
  f_store(v, a);
  found = v[0];
  for (int i = 1; i < LANES; i++) found = v[i] > found ? v[i] : found;
  return found;
}
inline float smallest_of(F a) {
#if defined(__AVX512F__)
  return _mm512_reduce_min_ps((__m512)a);
#endif
  float v[LANES], found;
  f_store(v, a);
  found = v[0];
  for (int i = 1; i < LANES; i++) found = v[i] < found ? v[i] : found;
  return found;
}
// Some lane's mask is set.
inline bool any(I mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#endif
  int32_t v[LANES], found = 0;
  memcpy(v, &mask, sizeof v);
  for (int i = 0; i < LANES; i++) found |= v[i];
  return found != 0;
}

// LANES vectors of LANES floats, `apart` floats apart, turned: out[i] lane j = in[j] lane i.
inline void turned(const float* in, int64_t apart, F* out) {
#if defined(ANYBIT_VECTORS) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define ANYBIT_ZIPS
#endif
#endif
#ifdef ANYBIT_ZIPS
  F a[LANES], b[LANES];
  for (int i = 0; i < LANES; i++) a[i] = f_load(in + i * apart);
  // as often as LANES has bits: pairs of vectors half of them apart are interleaved
  for (int round = 1; round < LANES; round *= 2) {
    for (int i = 0; i < LANES / 2; i++) {
      const F one = a[i], two = a[i + LANES / 2];
#if defined(__AVX512F__)
      b[2 * i] = __builtin_shufflevector(one, two, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      b[2 * i + 1] = __builtin_shufflevector(one, two, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
      b[2 * i] = __builtin_shufflevector(one, two, 0, 8, 1, 9, 2, 10, 3, 11);
      b[2 * i + 1] = __builtin_shufflevector(one, two, 4, 12, 5, 13, 6, 14, 7, 15);
#else
      b[2 * i] = __builtin_shufflevector(one, two, 0, 4, 1, 5);
      b[2 * i + 1] = __builtin_shufflevector(one, two, 2, 6, 3, 7);
#endif
    }
    for (int i = 0; i < LANES; i++) a[i] = b[i];
  }
  for (int i = 0; i < LANES; i++) out[i] = a[i];
#else
  float found[LANES][LANES];
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < LANES; j++) found[i][j] = in[j * apart + i];
  for (int i = 0; i < LANES; i++) out[i] = f_load(found[i]);
#endif
}

}  // namespace

#endif
