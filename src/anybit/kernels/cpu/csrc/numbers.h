// Small floats, one at a time. Included by every variant, so everything is static: no variant's code leaks into another.
#ifndef ANYBIT_NUMBERS_H
#define ANYBIT_NUMBERS_H

#include <stdint.h>
#include <string.h>

static inline float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

static inline float float_of_bf16(uint16_t half) { return float_of_bits((uint32_t)half << 16); }

static inline uint16_t bf16_of_float(float value) {  // nearest, ties to even
  uint32_t bits = bits_of_float(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0;
  return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16);
}

static inline float float_of_f16(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7FFF;
  if (magnitude >= 0x7C00) return float_of_bits(sign | 0x7F800000u | (magnitude & 0x3FF) << 13);
  if (magnitude < 0x400) {  // subnormal: a small integer times 2**-24
    float value = (float)magnitude * 5.9604644775390625e-8f;
    return float_of_bits(sign | bits_of_float(value));
  }
  return float_of_bits(sign | ((magnitude << 13) + 0x38000000u));
}

static inline uint16_t f16_of_float(float value) {  // nearest, ties to even
  uint32_t bits = bits_of_float(value);
  uint16_t sign = (uint16_t)((bits >> 16) & 0x8000);
  bits &= 0x7FFFFFFFu;
  if (bits > 0x7F800000u) return sign | 0x7E00;
  if (bits >= 0x47800000u) return sign | 0x7C00;  // 65536 and more
  if (bits < 0x38800000u) {                       // below 2**-14: let float addition round at 2**-24
    uint32_t rounded = bits_of_float(float_of_bits(bits) + 0.5f);
    return sign | (uint16_t)(rounded - 0x3F000000u);
  }
  return sign | (uint16_t)((bits - 0x38000000u + 0xFFFu + ((bits >> 13) & 1)) >> 13);
}

static inline float read_float(const void* data, int64_t kind, int64_t at) {
  switch (kind) {
    case ANYBIT_BF16: return float_of_bf16(((const uint16_t*)data)[at]);
    case ANYBIT_F16: return float_of_f16(((const uint16_t*)data)[at]);
    default: return ((const float*)data)[at];
  }
}

static inline void write_float(void* data, int64_t kind, int64_t at, float value) {
  switch (kind) {
    case ANYBIT_BF16: ((uint16_t*)data)[at] = bf16_of_float(value); break;
    case ANYBIT_F16: ((uint16_t*)data)[at] = f16_of_float(value); break;
    default: ((float*)data)[at] = value;
  }
}

// A number of a parameter as it is stored.
static inline float read_number(int64_t kind, int64_t negated, const void* data, int64_t at) {
  float value;
  switch (kind) {
    case ANYBIT_P_BF16: value = float_of_bf16(((const uint16_t*)data)[at]); break;
    case ANYBIT_P_F16: value = float_of_f16(((const uint16_t*)data)[at]); break;
    case ANYBIT_P_U8: value = (float)((const uint8_t*)data)[at]; break;
    case ANYBIT_P_I8: value = (float)((const int8_t*)data)[at]; break;
    case ANYBIT_P_E8M0: {
      uint32_t byte = ((const uint8_t*)data)[at];
      value = float_of_bits(byte == 255 ? 0x7FC00000u : byte == 0 ? 0x00400000u : byte << 23);
      break;
    }
    default: value = ((const float*)data)[at];
  }
  return negated ? -value : value;
}

#endif
