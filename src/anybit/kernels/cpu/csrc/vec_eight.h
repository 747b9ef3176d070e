// What codebooks are read with: eight floats, whatever the variant's own width, since vectors are short; codes spread to 16 bits.
#ifndef ANYBIT_VEC_EIGHT_H
#define ANYBIT_VEC_EIGHT_H

namespace {

struct Half { uint16_t bits; };    // float16
struct Brain { uint16_t bits; };   // bfloat16

#ifdef ANYBIT_EIGHT_X86
typedef __m256 E;
static ALWAYS_INLINE E e_zero() { return _mm256_setzero_ps(); }
static ALWAYS_INLINE E e_set(float a) { return _mm256_set1_ps(a); }
static ALWAYS_INLINE E e_load(const float* p) { return _mm256_loadu_ps(p); }
static ALWAYS_INLINE void e_store(float* p, E a) { _mm256_storeu_ps(p, a); }
static ALWAYS_INLINE E e_add(E a, E b) { return _mm256_add_ps(a, b); }
static ALWAYS_INLINE E e_mul(E a, E b) { return _mm256_mul_ps(a, b); }
static ALWAYS_INLINE E e_fma(E a, E b, E c) { return _mm256_fmadd_ps(a, b, c); }
static ALWAYS_INLINE E e_flip(E a, const uint32_t* signs) { return _mm256_xor_ps(a, _mm256_loadu_ps((const float*)signs)); }
static ALWAYS_INLINE float e_sum(E a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static ALWAYS_INLINE E e_of_halves(Half, __m128i a) { return _mm256_cvtph_ps(a); }
static ALWAYS_INLINE E e_of_halves(Brain, __m128i a) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16));
}
// Numbers of one, two or four vectors of a table, one behind the other.
template <class T> static ALWAYS_INLINE E e_one(const T* p) { return e_of_halves(T(), _mm_loadu_si128((const __m128i*)p)); }
template <> ALWAYS_INLINE E e_one(const float* p) { return _mm256_loadu_ps(p); }
template <class T> static ALWAYS_INLINE E e_two(const T* p, const T* q) {
  return e_of_halves(T(), _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i*)p), _mm_loadl_epi64((const __m128i*)q)));
}
template <> ALWAYS_INLINE E e_two(const float* p, const float* q) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(q), 1);
}
static ALWAYS_INLINE __m128i word_at(const void* p) {
  int32_t word;
  memcpy(&word, p, 4);
  return _mm_cvtsi32_si128(word);
}
static ALWAYS_INLINE __m128 pair_at(const float* p) { return _mm_castsi128_ps(_mm_loadl_epi64((const __m128i*)p)); }
template <class T> static ALWAYS_INLINE E e_four(const T* p, const T* q, const T* r, const T* s) {
  return e_of_halves(T(), _mm_unpacklo_epi64(_mm_unpacklo_epi32(word_at(p), word_at(q)), _mm_unpacklo_epi32(word_at(r), word_at(s))));
}
template <> ALWAYS_INLINE E e_four(const float* p, const float* q, const float* r, const float* s) {
  const __m128 low = _mm_loadh_pi(pair_at(p), (const __m64*)q), high = _mm_loadh_pi(pair_at(r), (const __m64*)s);
  return _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
}
// Columns 2 k and 2 k + 1 as one word each, two bfloat16.
#ifdef ANYBIT_DOTS
static ALWAYS_INLINE void e_store_pairs(uint32_t* p, E even, E odd) {
  const __m256i low = _mm256_cvtepu16_epi32((__m128i)_mm256_cvtneps_pbh(even));
  const __m256i high = _mm256_cvtepu16_epi32((__m128i)_mm256_cvtneps_pbh(odd));
  _mm256_storeu_si256((__m256i*)p, _mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
}
#endif
#else  // eight is the variant's own width
static_assert(LANES == 8, "eight lanes");
typedef F E;
static inline E e_set(float a) { return f_set(a); }
static inline E e_zero() { return f_zero(); }
static inline E e_load(const float* p) { return f_load(p); }
static inline void e_store(float* p, E a) { f_store(p, a); }
static inline E e_add(E a, E b) { return f_add(a, b); }
static inline E e_mul(E a, E b) { return f_mul(a, b); }
static inline E e_fma(E a, E b, E c) { return f_fma(a, b, c); }
static inline float e_sum(E a) { return f_sum(a); }
static inline E e_flip(E a, const uint32_t* signs) {
#ifdef ANYBIT_EIGHT_NEON
  return {vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(a.low), vld1q_u32(signs))),
          vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(a.high), vld1q_u32(signs + 4)))};
#else
  for (int i = 0; i < 8; i++) a.v[i] = float_of_bits(bits_of_float(a.v[i]) ^ signs[i]);
  return a;
#endif
}
static inline E e_one(const float* p) { return f_load(p); }
static inline E e_one(const Half* p) { return f_load_f16(&p->bits); }
static inline E e_one(const Brain* p) { return f_load_bf16(&p->bits); }
template <class T> static inline E e_two(const T* p, const T* q) {
  T found[8];
  memcpy(found, p, 4 * sizeof(T)), memcpy(found + 4, q, 4 * sizeof(T));
  return e_one(found);
}
template <class T> static inline E e_four(const T* p, const T* q, const T* r, const T* s) {
  T found[8];
  memcpy(found, p, 2 * sizeof(T)), memcpy(found + 2, q, 2 * sizeof(T));
  memcpy(found + 4, r, 2 * sizeof(T)), memcpy(found + 6, s, 2 * sizeof(T));
  return e_one(found);
}
#endif

// --- vectors of a table along the variant's lanes ------------------------------------------------------------------------------

// Numbers of LANES columns of one book; the codes of a tile are `apart` from one to the next. `odd`: of vectors of sixteen, where
// they are longer than the lanes, the second half.
template <class T, int WIDE> static ALWAYS_INLINE E eight_at(const T* table, const uint16_t* index, int64_t apart) {
  static_assert(WIDE == 2 || WIDE == 4 || WIDE == 8, "vectors of 2, 4, 8 or 16");
  if constexpr (WIDE == 8) return e_one(table + 8 * (int64_t)index[0]);
  else if constexpr (WIDE == 4) return e_two(table + 4 * (int64_t)index[0], table + 4 * (int64_t)index[apart]);
  else
    return e_four(table + 2 * (int64_t)index[0], table + 2 * (int64_t)index[apart], table + 2 * (int64_t)index[2 * apart],
                  table + 2 * (int64_t)index[3 * apart]);
}

template <class T, int WIDE> static ALWAYS_INLINE F lanes_at(const T* table, const uint16_t* index, int64_t apart, int odd) {
#ifdef ANYBIT_LANES_16
  (void)odd;
  E low, high;
  if constexpr (WIDE == 16) {
    low = e_one(table + 16 * (int64_t)index[0]), high = e_one(table + 16 * (int64_t)index[0] + 8);
  } else {
    low = eight_at<T, WIDE>(table, index, apart), high = eight_at<T, WIDE>(table, index + 8 / WIDE * apart, apart);
  }
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
#else
  if constexpr (WIDE == 16) return e_one(table + 16 * (int64_t)index[0] + 8 * odd);
  else return eight_at<T, WIDE>(table, index, apart);
#endif
}

// The sign bits of eight floats, for every byte.
struct SignTable {
  alignas(64) uint32_t of[256][8];
  constexpr SignTable() : of() {
    for (uint32_t byte = 0; byte < 256; byte++)
      for (int i = 0; i < 8; i++) of[byte][i] = (byte >> i & 1) << 31;
  }
};
static constexpr SignTable SIGNS;

// Signs flipped where bits of the bytes are set.
static ALWAYS_INLINE F flipped(F a, const uint8_t* bytes) {
#ifdef ANYBIT_LANES_16
  uint16_t mask;
  memcpy(&mask, bytes, 2);
  return _mm512_mask_xor_ps(a, mask, a, _mm512_set1_ps(-0.0f));
#else
  return e_flip(a, SIGNS.of[*bytes]);
#endif
}

// Eight codes of a stream, 16 bits each. Reads 20 bytes (BITS below 16).
template <int BITS> static ALWAYS_INLINE void spread_eight(const uint8_t* p, uint16_t* out) {
#ifdef ANYBIT_EIGHT_X86
  alignas(32) static constexpr struct Tables {
    int8_t spread[32];
    int32_t shift[8];
    constexpr Tables() : spread(), shift() {
      for (int i = 0; i < 8; i++) {
        for (int byte = 0; byte < 4; byte++) spread[4 * i + byte] = byte < 3 ? int8_t(BITS * i / 8 + byte) : int8_t(-1);
        shift[i] = BITS * i % 8;
      }
    }
  } tables;
  __m256i lanes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
  lanes = _mm256_shuffle_epi8(lanes, _mm256_load_si256((const __m256i*)tables.spread));
  lanes = _mm256_srlv_epi32(lanes, _mm256_load_si256((const __m256i*)tables.shift));
  lanes = _mm256_and_si256(lanes, _mm256_set1_epi32((1 << BITS) - 1));
  lanes = _mm256_permute4x64_epi64(_mm256_packus_epi32(lanes, lanes), 0x08);
  _mm_storeu_si128((__m128i*)out, _mm256_castsi256_si128(lanes));
#else
  UNROLLED for (int i = 0; i < 8; i++) {
    uint32_t word;
    memcpy(&word, p + BITS * i / 8, 4);
    out[i] = (uint16_t)(word >> (BITS * i % 8) & ((1u << BITS) - 1));
  }
#endif
}

// Bytes to 16 bits each.
static inline void spread_bytes(const uint8_t* p, int64_t count, uint16_t* out) {
  int64_t i = 0;
#ifdef ANYBIT_EIGHT_X86
  for (; i + 16 <= count; i += 16)
    _mm256_storeu_si256((__m256i*)(out + i), _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(p + i))));
#endif
  for (; i < count; i++) out[i] = p[i];
}

// Seven bits to a byte each, eight of them.
static ALWAYS_INLINE uint64_t sevens(uint64_t word) {
#ifdef ANYBIT_EIGHT_X86
  return _pdep_u64(word, 0x7F7F7F7F7F7F7F7Full);
#else
  uint64_t bytes = 0;
  UNROLLED for (int i = 0; i < 8; i++) bytes |= (word >> (7 * i) & 0x7F) << (8 * i);
  return bytes;
#endif
}

}  // namespace

#endif
