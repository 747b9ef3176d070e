// Eight numbers at a time in plain C++: the version that is always right, and what the compiler vectorises on machines that
// have no variant of their own (NEON on arm64, SSE2 on old x86).
#ifndef ANYBIT_VEC_H
#define ANYBIT_VEC_H

namespace {

static constexpr int LANES = 8;
static constexpr bool VECTORS = false;  // registers, worth tiling for

struct F { float v[LANES]; };
struct I { uint32_t v[LANES]; };
struct Lut { float v[16]; };

#define EACH for (int i = 0; i < LANES; i++)
static inline F f_zero() { F r; EACH r.v[i] = 0; return r; }
static inline F f_set(float a) { F r; EACH r.v[i] = a; return r; }
static inline F f_load(const float* p) { F r; EACH r.v[i] = p[i]; return r; }
static inline F f_load_four(const float* p) { F r; EACH r.v[i] = p[i % 4]; return r; }  // again and again
static inline void f_store(float* p, F a) { EACH p[i] = a.v[i]; }
static inline F f_add(F a, F b) { EACH a.v[i] += b.v[i]; return a; }
static inline F f_sub(F a, F b) { EACH a.v[i] -= b.v[i]; return a; }
static inline F f_mul(F a, F b) { EACH a.v[i] *= b.v[i]; return a; }
static inline F f_div(F a, F b) { EACH a.v[i] /= b.v[i]; return a; }
static inline F f_fma(F a, F b, F c) { EACH c.v[i] += a.v[i] * b.v[i]; return c; }
static inline float f_sum(F a) {
  return ((a.v[0] + a.v[4]) + (a.v[1] + a.v[5])) + ((a.v[2] + a.v[6]) + (a.v[3] + a.v[7]));
}
static inline F f_round_bf16(F a) { EACH a.v[i] = float_of_bf16(bf16_of_float(a.v[i])); return a; }
static inline F f_round_f16(F a) { EACH a.v[i] = float_of_f16(f16_of_float(a.v[i])); return a; }
static inline F f_permute(F a, I index) { F r; EACH r.v[i] = a.v[index.v[i]]; return r; }

static inline I i_load(const uint32_t* p) { I r; EACH r.v[i] = p[i]; return r; }
static inline void i_store(uint32_t* p, I a) { EACH p[i] = a.v[i]; }
static inline I i_and(I a, I b) { EACH a.v[i] &= b.v[i]; return a; }
static inline I i_xor(I a, uint32_t b) { EACH a.v[i] ^= b; return a; }
template <int N> static inline I i_right(I a) { EACH a.v[i] >>= N; return a; }
static inline I i_add(I a, I b) { EACH a.v[i] += b.v[i]; return a; }
static inline I i_field(I a, I mask, I flip) { EACH a.v[i] = (a.v[i] & mask.v[i]) ^ flip.v[i]; return a; }
static inline I i_or(I a, I b) { EACH a.v[i] |= b.v[i]; return a; }
template <int N> static inline I i_left(I a) { EACH a.v[i] <<= N; return a; }
static inline I i_set(uint32_t a) { I r; EACH r.v[i] = a; return r; }
static inline I i_zero() { return i_set(0); }
static inline I i_load_u8(const uint8_t* p) { I r; EACH r.v[i] = p[i]; return r; }
// Lane i of the sum gets bytes 4 i .. 4 i + 3 of u (unsigned) times those of x (signed).
static inline I i_dot8(I sum, I u, I x) {
  EACH for (int byte = 0; byte < 4; byte++)
    sum.v[i] += (uint32_t)((int32_t)(u.v[i] >> (8 * byte) & 255) * (int32_t)(int8_t)(x.v[i] >> (8 * byte) & 255));
  return sum;
}
static inline I i_dot7(I sum, I u, I x) { return i_dot8(sum, u, x); }
struct Bytes { uint8_t v[16]; };
static inline Bytes b_table(const uint8_t* p) { Bytes r; memcpy(r.v, p, 16); return r; }
static inline I b_take(const Bytes& table, I index) {  // of each byte, below 16
  EACH {
    uint32_t found = 0;
    for (int byte = 0; byte < 4; byte++) found |= (uint32_t)table.v[index.v[i] >> (8 * byte) & 15] << (8 * byte);
    index.v[i] = found;
  }
  return index;
}
static inline F f_gather(const float* table, I index) { F r; EACH r.v[i] = table[index.v[i]]; return r; }
static inline F f_of_integers(I a) { F r; EACH r.v[i] = (float)(int32_t)a.v[i]; return r; }

static inline F f_load_bf16(const uint16_t* p) { F r; EACH r.v[i] = float_of_bf16(p[i]); return r; }
static inline F f_load_f16(const uint16_t* p) { F r; EACH r.v[i] = float_of_f16(p[i]); return r; }
static inline void f_store_bf16(uint16_t* p, F a) { EACH p[i] = bf16_of_float(a.v[i]); }
static inline F f_load_u8(const uint8_t* p) { F r; EACH r.v[i] = (float)p[i]; return r; }
static inline F f_load_i8(const uint8_t* p) { F r; EACH r.v[i] = (float)(int8_t)p[i]; return r; }
static inline F f_load_e8m0(const uint8_t* p) {
  F r;
  EACH r.v[i] = float_of_bits(p[i] == 255 ? 0x7FC00000u : p[i] == 0 ? 0x00400000u : (uint32_t)p[i] << 23);
  return r;
}
static inline F f_load_e5m2(const uint8_t* p) { F r; EACH r.v[i] = float_of_f16((uint16_t)(p[i] << 8)); return r; }
static inline F f_load_e4m3(const uint8_t* p) {  // the same exponent in half precision, 2**8 too small
  F r;
  EACH r.v[i] = float_of_f16((uint16_t)((p[i] & 0x80) << 8 | (p[i] & 0x7F) << 7)) * 256.0f;
  return r;
}

static inline Lut lut_load(const float* p) { Lut r; memcpy(r.v, p, 64); return r; }
// The low four bits of every lane name an entry; the others are ignored.
static inline F lut_take(const Lut& lut, I index) { F r; EACH r.v[i] = lut.v[index.v[i] & 15]; return r; }

// Lane i gets codes 8 i .. 8 i + 7 of a chunk in its low 8 * BITS bits (BITS <= 4).
template <int BITS> static inline I chunk_load(const uint8_t* p) {
  I r;
  EACH {
    r.v[i] = 0;
    for (int byte = 0; byte < BITS; byte++) r.v[i] |= (uint32_t)p[BITS * i + byte] << (8 * byte);
  }
  return r;
}

// Lane i gets code i of the stream at p, with anything above it. Reads 16 bytes.
template <int BITS> static inline I codes_load(const uint8_t* p) {
  I r;
  EACH {
    int bit = BITS * i;
    r.v[i] = ((uint32_t)p[bit / 8] | (uint32_t)p[bit / 8 + 1] << 8) >> (bit % 8);
  }
  return r;
}

// Lane i gets fields 4 i .. 4 i + 3 of a stream of W bits each, one a byte. Reads LANES * W / 2 bytes.
template <int W> static inline I quads_load(const uint8_t* p) {
  I r;
  EACH {
    r.v[i] = 0;
    for (int field = 0; field < 4; field++) {
      const int bit = W * (4 * i + field);
      uint32_t found = (uint32_t)p[bit / 8] >> (bit % 8);
      if (bit % 8 + W > 8) found |= (uint32_t)p[bit / 8 + 1] << (8 - bit % 8);
      r.v[i] |= (found & ((1u << W) - 1)) << (8 * field);
    }
  }
  return r;
}

// LANES x LANES words: out[i * out_stride + j] = in[j * in_stride + i]
static inline void transpose(const uint32_t* in, int64_t in_stride, uint32_t* out, int64_t out_stride) {
  EACH for (int j = 0; j < LANES; j++) out[i * out_stride + j] = in[j * in_stride + i];
}
#undef EACH

}  // namespace

#endif
