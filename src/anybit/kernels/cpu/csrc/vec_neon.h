// NEON (every 64-bit Arm processor has it): eight lanes in two registers.
#ifndef ANYBIT_VEC_H
#define ANYBIT_VEC_H

#include <arm_neon.h>

#define ANYBIT_EIGHT_NEON  // vec_eight.h

namespace {

static constexpr int LANES = 8;
static constexpr bool VECTORS = true;  // registers, worth tiling for

struct F { float32x4_t low, high; };
struct I { uint32x4_t low, high; };
typedef uint8x16x4_t Lut;  // sixteen floats, byte by byte

static inline F f_set(float a) { return {vdupq_n_f32(a), vdupq_n_f32(a)}; }
static inline F f_zero() { return f_set(0.0f); }
static inline F f_load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
static inline F f_load_four(const float* p) { return {vld1q_f32(p), vld1q_f32(p)}; }  // again and again
static inline void f_store(float* p, F a) { vst1q_f32(p, a.low), vst1q_f32(p + 4, a.high); }
static inline F f_add(F a, F b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
static inline F f_sub(F a, F b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
static inline F f_mul(F a, F b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
static inline F f_div(F a, F b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
static inline F f_fma(F a, F b, F c) { return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }
static inline float f_sum(F a) { return vaddvq_f32(vaddq_f32(a.low, a.high)); }

static inline I i_load(const uint32_t* p) { return {vld1q_u32(p), vld1q_u32(p + 4)}; }
static inline I i_set(uint32_t a) { return {vdupq_n_u32(a), vdupq_n_u32(a)}; }
static inline I i_zero() { return i_set(0); }
static inline void i_store(uint32_t* p, I a) { vst1q_u32(p, a.low), vst1q_u32(p + 4, a.high); }
static inline I i_and(I a, I b) { return {vandq_u32(a.low, b.low), vandq_u32(a.high, b.high)}; }
static inline I i_or(I a, I b) { return {vorrq_u32(a.low, b.low), vorrq_u32(a.high, b.high)}; }
static inline I i_xor(I a, uint32_t b) { return {veorq_u32(a.low, vdupq_n_u32(b)), veorq_u32(a.high, vdupq_n_u32(b))}; }
static inline I i_add(I a, I b) { return {vaddq_u32(a.low, b.low), vaddq_u32(a.high, b.high)}; }
static inline I i_field(I a, I mask, I flip) {  // (a & mask) ^ flip
  return {veorq_u32(vandq_u32(a.low, mask.low), flip.low), veorq_u32(vandq_u32(a.high, mask.high), flip.high)};
}
template <int N> static inline I i_right(I a) {
  if constexpr (N == 0) return a;
  else return {vshrq_n_u32(a.low, N), vshrq_n_u32(a.high, N)};
}
template <int N> static inline I i_left(I a) { return {vshlq_n_u32(a.low, N), vshlq_n_u32(a.high, N)}; }
static inline I i_of_shorts(uint16x8_t a) { return {vmovl_u16(vget_low_u16(a)), vmovl_high_u16(a)}; }
static inline I i_load_u8(const uint8_t* p) { return i_of_shorts(vmovl_u8(vld1_u8(p))); }
static inline F f_of_bits(I a) { return {vreinterpretq_f32_u32(a.low), vreinterpretq_f32_u32(a.high)}; }
static inline I i_of_bits(F a) { return {vreinterpretq_u32_f32(a.low), vreinterpretq_u32_f32(a.high)}; }
static inline F f_of_integers(I a) {
  return {vcvtq_f32_s32(vreinterpretq_s32_u32(a.low)), vcvtq_f32_s32(vreinterpretq_s32_u32(a.high))};
}
// Lane i of the sum gets bytes 4 i .. 4 i + 3 of u (unsigned) times those of x (signed).
static inline uint32x4_t dot_of(uint32x4_t sum, uint32x4_t u, uint32x4_t x) {
  const uint8x16_t own = vreinterpretq_u8_u32(u);
  const int8x16_t other = vreinterpretq_s8_u32(x);
  const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(own))), high = vreinterpretq_s16_u16(vmovl_high_u8(own));
  const int16x8_t x_low = vmovl_s8(vget_low_s8(other)), x_high = vmovl_high_s8(other);
  const int32x4_t first = vpaddq_s32(vmull_s16(vget_low_s16(low), vget_low_s16(x_low)), vmull_high_s16(low, x_low));
  const int32x4_t second = vpaddq_s32(vmull_s16(vget_low_s16(high), vget_low_s16(x_high)), vmull_high_s16(high, x_high));
  return vaddq_u32(sum, vreinterpretq_u32_s32(vpaddq_s32(first, second)));
}
static inline I i_dot8(I sum, I u, I x) { return {dot_of(sum.low, u.low, x.low), dot_of(sum.high, u.high, x.high)}; }
static inline uint32x4_t small_dot_of(uint32x4_t sum, uint32x4_t u, uint32x4_t x) {  // two products of seven bits fit into sixteen
  const int8x16_t own = vreinterpretq_s8_u32(u), other = vreinterpretq_s8_u32(x);
  const int16x8_t pairs = vpaddq_s16(vmull_s8(vget_low_s8(own), vget_low_s8(other)), vmull_high_s8(own, other));
  return vreinterpretq_u32_s32(vpadalq_s16(vreinterpretq_s32_u32(sum), pairs));
}
static inline I i_dot7(I sum, I u, I x) { return {small_dot_of(sum.low, u.low, x.low), small_dot_of(sum.high, u.high, x.high)}; }
static inline uint8x16_t b_table(const uint8_t* p) { return vld1q_u8(p); }
static inline uint32x4_t taken(uint8x16_t table, uint32x4_t index) {
  return vreinterpretq_u32_u8(vqtbl1q_u8(table, vreinterpretq_u8_u32(index)));
}
static inline I b_take(uint8x16_t table, I index) { return {taken(table, index.low), taken(table, index.high)}; }  // of each byte
static inline F f_gather(const float* table, I index) {
  uint32_t at[8];
  vst1q_u32(at, index.low), vst1q_u32(at + 4, index.high);
  const float found[8] = {table[at[0]], table[at[1]], table[at[2]], table[at[3]],
                          table[at[4]], table[at[5]], table[at[6]], table[at[7]]};
  return f_load(found);
}
// Bytes of a word's lane: lane n of a table of words.
static inline I i_bytes_of_lanes(I index) {
  const I four = {vmulq_n_u32(index.low, 0x04040404u), vmulq_n_u32(index.high, 0x04040404u)};
  return i_add(four, i_set(0x03020100u));
}
static inline F f_permute(F a, I index) {  // three bits name a lane
  const uint8x16x2_t table = {{vreinterpretq_u8_f32(a.low), vreinterpretq_u8_f32(a.high)}};
  const I bytes = i_bytes_of_lanes(i_and(index, i_set(7)));
  return {vreinterpretq_f32_u8(vqtbl2q_u8(table, vreinterpretq_u8_u32(bytes.low))),
          vreinterpretq_f32_u8(vqtbl2q_u8(table, vreinterpretq_u8_u32(bytes.high)))};
}

// --- floats of other sizes ----------------------------------------------------------------------------------------------------

static inline I round_bits_bf16(F a) {  // nearest even, in the upper half of each lane
  const I bits = i_of_bits(a);
  return i_add(bits, i_add(i_and(i_right<16>(bits), i_set(1)), i_set(0x7FFF)));
}
static inline F f_round_bf16(F a) { return f_of_bits(i_and(round_bits_bf16(a), i_set(0xFFFF0000u))); }
static inline F f_round_f16(F a) { return {vcvt_f32_f16(vcvt_f16_f32(a.low)), vcvt_f32_f16(vcvt_f16_f32(a.high))}; }
static inline F f_of_bf16(uint16x8_t a) { return f_of_bits({vshll_n_u16(vget_low_u16(a), 16), vshll_high_n_u16(a, 16)}); }
static inline F f_of_f16(uint16x8_t a) {
  const float16x8_t halves = vreinterpretq_f16_u16(a);
  return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
}
static inline F f_load_bf16(const uint16_t* p) { return f_of_bf16(vld1q_u16(p)); }
static inline F f_load_f16(const uint16_t* p) { return f_of_f16(vld1q_u16(p)); }
static inline void f_store_bf16(uint16_t* p, F a) {
  const I bits = round_bits_bf16(a);
  vst1q_u16(p, vshrn_high_n_u32(vshrn_n_u32(bits.low, 16), bits.high, 16));
}
static inline F f_load_u8(const uint8_t* p) { return f_of_integers(i_load_u8(p)); }
static inline F f_load_i8(const uint8_t* p) {
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_u8(vld1_u8(p)));
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_high_s16(wide))};
}
static inline uint32x4_t power_of(uint32x4_t byte) {
  const uint32x4_t power = vmaxq_u32(vshlq_n_u32(byte, 23), vdupq_n_u32(0x00400000));  // 2**-127 is a subnormal
  return vbslq_u32(vceqq_u32(byte, vdupq_n_u32(255)), vdupq_n_u32(0x7FC00000), power);
}
static inline F f_load_e8m0(const uint8_t* p) {
  const I byte = i_load_u8(p);
  return f_of_bits({power_of(byte.low), power_of(byte.high)});
}
static inline F f_load_e5m2(const uint8_t* p) { return f_of_f16(vshll_n_u8(vld1_u8(p), 8)); }
static inline F f_load_e4m3(const uint8_t* p) {  // the same exponent in half precision, 2**8 too small
  const int16x8_t wide = vshlq_n_s16(vmovl_s8(vreinterpret_s8_u8(vld1_u8(p))), 7);
  return f_mul(f_of_f16(vandq_u16(vreinterpretq_u16_s16(wide), vdupq_n_u16(0xBFFF))), f_set(256.0f));
}

static inline Lut lut_load(const float* p) { return vld1q_u8_x4((const uint8_t*)p); }
// The low four bits of every lane name an entry; the others are ignored.
static inline F lut_take(const Lut& lut, I index) {
  const I bytes = i_bytes_of_lanes(i_and(index, i_set(15)));
  return {vreinterpretq_f32_u8(vqtbl4q_u8(lut, vreinterpretq_u8_u32(bytes.low))),
          vreinterpretq_f32_u8(vqtbl4q_u8(lut, vreinterpretq_u8_u32(bytes.high)))};
}

// --- codes --------------------------------------------------------------------------------------------------------------------

static inline uint32x4_t shuffled(uint8x16_t bytes, const uint8_t* places) {
  return vreinterpretq_u32_u8(vqtbl1q_u8(bytes, vld1q_u8(places)));
}

// Lane i gets codes 8 i .. 8 i + 7 of a chunk in its low 8 * BITS bits (BITS <= 4).
template <int BITS> static inline I chunk_load(const uint8_t* p) {
  if constexpr (BITS == 1) return i_load_u8(p);
  else if constexpr (BITS == 2) return i_of_shorts(vld1q_u16((const uint16_t*)p));
  else if constexpr (BITS == 4) return i_load((const uint32_t*)p);
  else {  // three bytes a lane; the second piece is read four bytes early to stay inside 24 bytes
    static constexpr uint8_t LOW[16] = {0, 1, 2, 255, 3, 4, 5, 255, 6, 7, 8, 255, 9, 10, 11, 255};
    static constexpr uint8_t HIGH[16] = {4, 5, 6, 255, 7, 8, 9, 255, 10, 11, 12, 255, 13, 14, 15, 255};
    return {shuffled(vld1q_u8(p), LOW), shuffled(vld1q_u8(p + 8), HIGH)};
  }
}

// Lane i gets code i of the stream at p, with anything above it. Reads 16 bytes.
template <int BITS> static inline I codes_load(const uint8_t* p) {
  static constexpr struct Tables {
    uint8_t spread[32];
    int32_t shift[8];
    constexpr Tables() : spread(), shift() {
      for (int i = 0; i < 8; i++) {
        for (int byte = 0; byte < 4; byte++) spread[4 * i + byte] = byte < 2 ? uint8_t(BITS * i / 8 + byte) : uint8_t(255);
        shift[i] = -(BITS * i % 8);
      }
    }
  } tables;
  const uint8x16_t both = vld1q_u8(p);
  return {vshlq_u32(shuffled(both, tables.spread), vld1q_s32(tables.shift)),
          vshlq_u32(shuffled(both, tables.spread + 16), vld1q_s32(tables.shift + 4))};
}

// Lane i gets fields 4 i .. 4 i + 3 of a stream of W bits each, one a byte, with anything above them. Reads LANES * W / 2 bytes.
template <int W> static inline I quads_load(const uint8_t* p) {
  if constexpr (W == 8) return i_load((const uint32_t*)p);
  else {
    I four;  // 4 W bits a lane
    if constexpr (W % 2 == 0) {
      four = chunk_load<W / 2>(p);
    } else {
      constexpr int BYTES = 2 * W;  // of every 128 bits; the second ones are read early, to stay inside
      static constexpr struct Tables {
        uint8_t spread[32];
        int32_t shift[8];
        constexpr Tables() : spread(), shift() {
          for (int i = 0; i < 8; i++) {
            for (int byte = 0; byte < 4; byte++) {
              const int place = i % 4 * W / 2 + byte + (i < 4 ? 0 : 16 - BYTES);
              spread[4 * i + byte] = uint8_t(place > 15 ? 255 : place);
            }
            shift[i] = -(4 * W * i % 8);
          }
        }
      } tables;
      four = {vshlq_u32(shuffled(vld1q_u8(p), tables.spread), vld1q_s32(tables.shift)),
              vshlq_u32(shuffled(vld1q_u8(p + 2 * BYTES - 16), tables.spread + 16), vld1q_s32(tables.shift + 4))};
    }
    constexpr uint32_t MASK = (1u << W) - 1;
    return i_or(i_or(i_and(four, i_set(MASK)), i_and(i_left<8 - W>(four), i_set(MASK << 8))),
                i_or(i_and(i_left<2 * (8 - W)>(four), i_set(MASK << 16)), i_and(i_left<3 * (8 - W)>(four), i_set(MASK << 24))));
  }
}

// LANES x LANES words: out[i * out_stride + j] = in[j * in_stride + i]
static inline void transpose(const uint32_t* in, int64_t in_stride, uint32_t* out, int64_t out_stride) {
  for (int down = 0; down < 8; down += 4)
    for (int across = 0; across < 8; across += 4) {
      const uint32_t* from = in + down * in_stride + across;
      uint32x4_t r[4];
      for (int j = 0; j < 4; j++) r[j] = vld1q_u32(from + j * in_stride);
      const uint32x4x2_t a = vtrnq_u32(r[0], r[1]), b = vtrnq_u32(r[2], r[3]);
      uint32_t* to = out + across * out_stride + down;
      for (int half = 0; half < 2; half++) {
        const uint64x2_t first = vreinterpretq_u64_u32(a.val[half]), second = vreinterpretq_u64_u32(b.val[half]);
        vst1q_u32(to + half * out_stride, vreinterpretq_u32_u64(vtrn1q_u64(first, second)));
        vst1q_u32(to + (2 + half) * out_stride, vreinterpretq_u32_u64(vtrn2q_u64(first, second)));
      }
    }
}

}  // namespace

#endif
