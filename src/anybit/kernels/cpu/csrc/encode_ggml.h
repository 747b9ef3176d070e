// Rows of floats -> the fields of llama.cpp's block types, and fields <-> blocks as they are stored.
//
// A tile of a row goes through three steps: scales of its blocks by a search (lane = block), scales of scales by super-block,
// then codes for the scales as they are stored (lane = element), packed from one byte a code.
#ifndef ANYBIT_ENCODE_GGML_H
#define ANYBIT_ENCODE_GGML_H

#include "encode_block_bytes.h"
#include "encode_packing.h"
#include "encode_searches.h"
#include "encode_source.h"

namespace {

struct Tile {
  const float* x;                             // numbers; of a whole tile, the source's own
  alignas(64) float space[TILE + 32 * LANES];  // zeros behind the last number
  alignas(64) float w[TILE + 32 * LANES];  // weights of the error, where importance is known
  uint8_t first[TILE + 32 * LANES];        // codes of the search: [group][element][lane]
  uint8_t codes[TILE + LANES];             // codes as stored, in order
  alignas(64) float scale[TILE / 16 + LANES], minimum[TILE / 16 + LANES], heavy[TILE / 16 + LANES];
  uint8_t parts[2][TILE / 16];             // scales and minimums as they are stored
  uint16_t d[TILE / 32], m[TILE / 32];
  int64_t count;  // numbers
  I strange;      // set where a block was not ordinary
};

// W vectors of the blocks of a group.
template <int W> inline void lanes_of(const float* numbers, int64_t group, F* x) {
  const float* first = numbers + group * W * LANES;
  for (int part = 0; part < W / LANES; part++) turned(first + part * LANES, W, x + part * LANES);
}

// Whether a block's largest magnitude is neither 0 nor of a size that keeps quotients and squares in float32.
inline I strange(F largest) {
  return ((largest != f_all(0.0f)) & (largest < f_all(1e-30f))) | (largest > f_all(1e10f)) | (largest != largest);
}

// The same of the numbers; the largest magnitudes, which are looked at.
template <int W> inline F numbers_of(Tile& tile, int64_t group, F* x) {
  lanes_of<W>(tile.x, group, x);
  I largest = bits_of(x[0]) & 0x7FFFFFFF;  // compared as integers, NaN is the largest of all
  for (int e = 1; e < W; e++) {
    const I own = bits_of(x[e]) & 0x7FFFFFFF;
    largest = pick(own > largest, own, largest);
  }
  tile.strange = tile.strange | strange(float_of(largest));
  return float_of(largest);
}

inline float f16_read(uint16_t half) { return float_of_f16(half); }
inline float whole_between(float a, float low, float high) {  // ties to even
  const float found = nearbyintf(a);
  return found < low ? low : found > high ? high : found;
}
inline float inverse_of(float a) { return a == 0 ? 0.0f : 1 / a; }
inline float half_away(float a) {
  const float size = fabsf(a), whole = floorf(size);
  return copysignf(whole + (size - whole >= 0.5f ? 1.0f : 0.0f), a);
}

// --- weights of the error -------------------------------------------------------------------------------------------------

// Sixteen running sums, folded in halves: the order of `_sum_across` in ggml_search.py.
inline float folded(float* sums) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) sums[i] = sums[i] + sums[i + half];
  return sums[0];
}
inline void add_squares(const float* x, int64_t count, float* sums) {
  for (int64_t at = 0; at < count; at += 16)
    for (int i = 0; i < 16; i++) sums[i] = sums[i] + x[at + i] * x[at + i];
}

// importance * sqrt(factor * mean + x * x)
inline void weigh(const float* x, const float* importance, int64_t count, float mean, float factor, float* w) {
  const F common = f_all(factor * mean);
  for (int64_t i = 0; i < count; i += LANES) {
    const F own = f_load(x + i);
    f_store(w + i, f_load(importance + i) * f_sqrt(common + own * own));
  }
}
inline void weigh_blocks(Tile& tile, const float* importance, int64_t over, float factor) {
  for (int64_t at = 0; at < tile.count; at += over) {
    float sums[16] = {0};
    add_squares(tile.x + at, over, sums);
    weigh(tile.x + at, importance + at, over, folded(sums) / (float)over, factor, tile.w + at);
  }
}

// --- steps ----------------------------------------------------------------------------------------------------------------

template <int W> inline int64_t groups_of(const Tile& tile) { return (tile.count + W * LANES - 1) / (W * LANES); }

template <int W> inline void keep(Tile& tile, int64_t group, const F* codes) {
  for (int e = 0; e < W; e++) store_bytes(tile.first + (group * W + e) * LANES, i_of(codes[e]));
}
// The search's code of an element.
template <int W> inline int first_code(const Tile& tile, int64_t block, int e) {
  return tile.first[(block / LANES * W + e) * LANES + block % LANES];
}

// Codes once more for `effective` scales: round((x + below) / effective); those of the search less `middle` where it is 0.
template <int W>
inline void again(Tile& tile, int64_t block, float effective, float below, float low, float high, int middle) {
  uint8_t* out = tile.codes + block * W;
  if (effective == 0) {
    for (int e = 0; e < W; e++) out[e] = (uint8_t)(first_code<W>(tile, block, e) - middle);
    return;
  }
  const F scale = f_all(effective), apart = f_all(below);
  for (int e = 0; e < W; e += LANES) {
    F x = f_load(tile.x + block * W + e);
    if (middle == 0) x = x + apart;
    store_bytes(out + e, i_of(f_code(x / scale, low, high)));
  }
}

template <int W, bool ABSOLUTE> inline void search_ranged(Tile& tile, bool weighted, int highest, Ladder ladder) {
  F x[W], w[W], codes[W], minimum;
  for (int64_t group = 0; group < groups_of<W>(tile); group++) {
    numbers_of<W>(tile, group, x);
    if (weighted) {
      lanes_of<W>(tile.w, group, w);
      f_store(tile.heavy + group * LANES, summed<W>([&](int e) { return w[e]; }));
    } else if (ABSOLUTE) {
      for (int e = 0; e < W; e++) w[e] = f_abs(x[e]);
    } else {
      const F rms = f_sqrt(summed<W>([&](int e) { return x[e] * x[e]; }) / (float)W);
      for (int e = 0; e < W; e++) w[e] = f_abs(x[e]) + rms;
    }
    const F scale = ranged<W, ABSOLUTE>(x, w, highest, ladder, codes, &minimum);
    f_store(tile.scale + group * LANES, scale);
    f_store(tile.minimum + group * LANES, minimum);
    keep<W>(tile, group, codes);
  }
}

// The largest is exact; codes up to `limit`.
template <int MANY> inline float largest_first(const float* scales, int limit, uint8_t* codes) {
  float largest = scales[0];
  for (int i = 1; i < MANY; i++) largest = scales[i] > largest ? scales[i] : largest;
  largest = largest < 0 ? 0 : largest;
  const float inverse = largest > 0 ? (1 / largest) * (float)limit : 0.0f;
  for (int i = 0; i < MANY; i++) codes[i] = (uint8_t)whole_between(inverse * scales[i], 0, (float)limit);
  return largest / (float)limit;
}
template <int MANY> inline float extreme_first(const float* scales, float* sign_extreme) {
  float found = scales[0];
  for (int i = 1; i < MANY; i++) found = fabsf(scales[i]) > fabsf(found) ? scales[i] : found;
  return *sign_extreme = found;
}
// The same for scales of both signs, and codes from -half.
inline float signed_first(const float* scales, int half, int8_t* codes) {
  float largest;
  extreme_first<16>(scales, &largest);
  const float inverse = fabsf(largest) < EMPTY ? 0.0f : (1 / largest) * (float)-half;
  for (int i = 0; i < 16; i++) codes[i] = (int8_t)whole_between(inverse * scales[i], (float)-half, (float)(half - 1));
  return inverse_of(inverse);
}

// A search over the scales of LANES super-blocks; MANY of each.
template <int MANY, class Search>
inline void over_scales(const float* scales, const float* heavy, int64_t blocks, Search search, float* d, uint8_t* codes) {
  F x[MANY], w[MANY], found[MANY];
  for (int64_t start = 0; start < blocks; start += LANES) {
    float column[LANES], weight[LANES];
    for (int e = 0; e < MANY; e++) {
      for (int lane = 0; lane < LANES; lane++) {
        const bool real = start + lane < blocks;
        column[lane] = real ? scales[(start + lane) * MANY + e] : 0.0f;
        weight[lane] = real ? heavy[(start + lane) * MANY + e] : 0.0f;
      }
      x[e] = f_load(column);
      w[e] = f_load(weight);
    }
    float own[LANES];
    f_store(own, search(x, w, found));
    for (int lane = 0; lane < LANES && start + lane < blocks; lane++) d[start + lane] = own[lane];
    for (int e = 0; e < MANY; e++) {
      f_store(column, found[e]);
      for (int lane = 0; lane < LANES && start + lane < blocks; lane++)
        codes[(start + lane) * MANY + e] = (uint8_t)(int)column[lane];
    }
  }
}

// --- types ----------------------------------------------------------------------------------------------------------------

// Where a tile's fields begin.
struct Fields {
  uint8_t *q, *sc, *mn, *d, *m, *fours;
};

inline bool put_halves(const uint16_t* halves, int64_t count, uint8_t* to) {
  bool finite = true;
  for (int64_t i = 0; i < count; i++) finite = finite && (halves[i] & 0x7C00) != 0x7C00;
  memcpy(to, halves, (size_t)count * 2);
  return finite;
}
inline uint16_t half_of(float number) { return f16_of_float(number + 0.0f); }

template <int W, int BITS, int LIMIT_BITS>
bool with_minimum(Tile& tile, const float* importance, Ladder ladder, float factor, const Fields& out) {
  constexpr int MANY = 256 / W, highest = (1 << BITS) - 1, limit = (1 << LIMIT_BITS) - 1;
  constexpr bool ABSOLUTE = BITS == 2;
  const int64_t blocks = tile.count / 256;
  float d[TILE / 256 + LANES], dmin[TILE / 256 + LANES];
  if (importance) {
    weigh_blocks(tile, importance, 256, factor);
    search_ranged<W, false>(tile, true, highest, {-0.9, 0.05, 36});
    const auto search = [](const F* x, const F* w, F* codes) { return positive<MANY>(x, w, limit, codes); };
    over_scales<MANY>(tile.scale, tile.heavy, blocks, search, d, tile.parts[0]);
    over_scales<MANY>(tile.minimum, tile.heavy, blocks, search, dmin, tile.parts[1]);
  } else {
    search_ranged<W, ABSOLUTE>(tile, false, highest, ladder);
    for (int64_t block = 0; block < blocks; block++) {
      d[block] = largest_first<MANY>(tile.scale + block * MANY, limit, tile.parts[0] + block * MANY);
      dmin[block] = largest_first<MANY>(tile.minimum + block * MANY, limit, tile.parts[1] + block * MANY);
    }
  }
  for (int64_t block = 0; block < blocks; block++) {
    tile.d[block] = half_of(d[block]);
    tile.m[block] = half_of(dmin[block]);
    const float wide = f16_read(tile.d[block]), wide_min = f16_read(tile.m[block]);
    for (int own = 0; own < MANY; own++) {
      const int64_t place = block * MANY + own;
      again<W>(tile, place, wide * tile.parts[0][place], wide_min * tile.parts[1][place], 0, (float)highest, 0);
    }
  }
  pack_codes(BITS, tile.codes, tile.count, out.q);
  pack_codes(LIMIT_BITS, tile.parts[0], blocks * MANY, out.sc);
  pack_codes(LIMIT_BITS, tile.parts[1], blocks * MANY, out.mn);
  const bool one = put_halves(tile.d, blocks, out.d), two = put_halves(tile.m, blocks, out.m);
  return one && two;
}

template <int W> inline void search_symmetric(Tile& tile, bool weighted, int half) {
  F x[W], w[W], codes[W];
  for (int64_t group = 0; group < groups_of<W>(tile); group++) {
    numbers_of<W>(tile, group, x);
    if (weighted) {
      lanes_of<W>(tile.w, group, w);
      f_store(tile.heavy + group * LANES, summed<W>([&](int e) { return w[e]; }));
    } else {
      for (int e = 0; e < W; e++) w[e] = x[e] * x[e];
    }
    f_store(tile.scale + group * LANES, symmetric<W>(x, w, half, codes));
    keep<W>(tile, group, codes);
  }
}

// Codes again, for blocks of sixteen whose scales are the signed codes of tile.parts[0].
template <int BITS> inline bool signed_fields(Tile& tile, const float* d, int scale_bits, const Fields& out) {
  constexpr int half = 1 << (BITS - 1);
  const int64_t blocks = tile.count / 256;
  for (int64_t block = 0; block < blocks; block++) {
    tile.d[block] = half_of(d[block]);
    const float wide = f16_read(tile.d[block]);
    for (int own = 0; own < 16; own++) {
      const int64_t place = block * 16 + own;
      again<16>(tile, place, wide * (float)(int8_t)tile.parts[0][place], 0, (float)-half, (float)(half - 1), half);
    }
  }
  pack_codes(BITS, tile.codes, tile.count, out.q);
  pack_codes(scale_bits, tile.parts[0], blocks * 16, out.sc);
  return put_halves(tile.d, blocks, out.d);
}

bool q3_k(Tile& tile, const float* importance, const Fields& out) {
  const int64_t blocks = tile.count / 256;
  float d[TILE / 256 + LANES];
  if (importance) {
    weigh_blocks(tile, importance, 256, 2.0f);
    search_symmetric<16>(tile, true, 4);
    over_scales<16>(
        tile.scale, tile.heavy, blocks, [](const F* x, const F* w, F* codes) { return symmetric<16>(x, w, 32, codes); }, d,
        tile.parts[0]);
    for (int64_t i = 0; i < blocks * 16; i++) tile.parts[0][i] = (uint8_t)(tile.parts[0][i] - 32);
  } else {
    F x[16], codes[16];
    for (int64_t group = 0; group < groups_of<16>(tile); group++) {
      numbers_of<16>(tile, group, x);
      f_store(tile.scale + group * LANES, descent<16>(x, 4, codes));
      keep<16>(tile, group, codes);
    }
    for (int64_t block = 0; block < blocks; block++) {
      uint8_t* own = tile.parts[0] + block * 16;
      d[block] = signed_first(tile.scale + block * 16, 32, (int8_t*)own);
      if (d[block] == 0) memset(own, -32, 16);  // as llama.cpp leaves it
    }
  }
  return signed_fields<3>(tile, d, 6, out);
}

bool q6_k(Tile& tile, const float* importance, const Fields& out) {
  float d[TILE / 256 + LANES];
  if (importance) memcpy(tile.w, importance, (size_t)tile.count * sizeof(float));
  search_symmetric<16>(tile, importance != nullptr, 32);
  for (int64_t block = 0; block < tile.count / 256; block++) {
    d[block] = signed_first(tile.scale + block * 16, 128, (int8_t*)tile.parts[0] + block * 16);
    if (d[block] == 0)
      for (int64_t place = block * 16; place < block * 16 + 16; place++)
        for (int e = 0; e < 16; e++) tile.first[(place / LANES * 16 + e) * LANES + place % LANES] = 0;
  }
  return signed_fields<6>(tile, d, 8, out);
}

inline void iq4_codes(Tile& tile, int64_t block, float inverse) {
  const F doubled = f_all(2 * inverse);
  for (int e = 0; e < 32; e += LANES)
    store_bytes(tile.codes + block * 32 + e, iq4_code(f_load(tile.x + block * 32 + e), doubled));
}
inline void search_table(Tile& tile, bool weighted) {
  F x[32], w[32];
  for (int64_t group = 0; group < groups_of<32>(tile); group++) {
    numbers_of<32>(tile, group, x);
    if (weighted) lanes_of<32>(tile.w, group, w);
    else
      for (int e = 0; e < 32; e++) w[e] = x[e] * x[e];
    f_store(tile.scale + group * LANES, in_table<32>(x, w));
  }
}

bool iq4_nl(Tile& tile, const float* importance, const Fields& out) {
  if (importance) weigh_blocks(tile, importance, 32, 2.0f);
  search_table(tile, importance != nullptr);
  for (int64_t block = 0; block < tile.count / 32; block++) {
    iq4_codes(tile, block, inverse_of(tile.scale[block]));
    tile.d[block] = f16_of_float(tile.scale[block]);
  }
  pack_codes(4, tile.codes, tile.count, out.q);
  return put_halves(tile.d, tile.count / 32, out.d);
}

bool iq4_xs(Tile& tile, const float* importance, const Fields& out) {
  if (importance) weigh_blocks(tile, importance, 256, 2.0f);
  search_table(tile, importance != nullptr);
  for (int64_t block = 0; block < tile.count / 256; block++) {
    float largest;
    extreme_first<8>(tile.scale + block * 8, &largest);
    const float d = -largest / 32, inverse = inverse_of(d);
    for (int own = 0; own < 8; own++) {
      const int64_t place = block * 8 + own;
      const float code = whole_between(inverse * tile.scale[place], -32, 31);
      tile.parts[0][place] = (uint8_t)(int)code;
      iq4_codes(tile, place, inverse_of(d * code));
    }
    tile.d[block] = f16_of_float(d);
  }
  pack_codes(4, tile.codes, tile.count, out.q);
  pack_codes(6, tile.parts[0], tile.count / 32, out.sc);
  return put_halves(tile.d, tile.count / 256, out.d);
}

// --- blocks of 32 with one scale, or scale and minimum ----------------------------------------------------------------------

template <int BITS> bool weighted_largest(Tile& tile, const Fields& out) {
  constexpr int half = 1 << (BITS - 1);
  search_symmetric<32>(tile, true, half);
  for (int64_t block = 0; block < tile.count / 32; block++) {
    for (int e = 0; e < 32; e++) tile.codes[block * 32 + e] = (uint8_t)(first_code<32>(tile, block, e) - half);
    tile.d[block] = f16_of_float(tile.scale[block]);
  }
  pack_codes(BITS, tile.codes, tile.count, out.q);
  return put_halves(tile.d, tile.count / 32, out.d);
}

template <int BITS> bool weighted_range(Tile& tile, const Fields& out) {
  search_ranged<32, false>(tile, true, (1 << BITS) - 1, {-0.9, 0.05, 36});
  for (int64_t block = 0; block < tile.count / 32; block++) {
    for (int e = 0; e < 32; e++) tile.codes[block * 32 + e] = (uint8_t)first_code<32>(tile, block, e);
    tile.d[block] = f16_of_float(tile.scale[block]);
    tile.m[block] = f16_of_float(-tile.minimum[block]);
  }
  pack_codes(BITS, tile.codes, tile.count, out.q);
  const bool one = put_halves(tile.d, tile.count / 32, out.d), two = put_halves(tile.m, tile.count / 32, out.m);
  return one && two;
}

// Scales and reciprocals of all blocks of the tile by `rule(x, largest magnitude, minimum)`, lane = block; then lane = element.
template <class Rule> inline void scales_by(Tile& tile, Rule rule) {
  F x[32], minimum = f_none();
  for (int64_t group = 0; group < groups_of<32>(tile); group++) {
    const F largest = numbers_of<32>(tile, group, x), scale = rule(x, largest, &minimum);
    f_store(tile.scale + group * LANES, scale);
    f_store(tile.heavy + group * LANES, pick(scale == 0.0f, f_none(), 1.0f / scale));
    f_store(tile.minimum + group * LANES, minimum);
    const Halves d = f16_of(scale), m = f16_of(minimum);
    const int64_t room = (int64_t)(sizeof tile.d / 2) - group * LANES;
    memcpy(tile.d + group * LANES, &d, (size_t)(room < LANES ? room : LANES) * 2);
    memcpy(tile.m + group * LANES, &m, (size_t)(room < LANES ? room : LANES) * 2);
  }
}

template <int BITS> bool largest(Tile& tile, const Fields& out) {
  constexpr int half = 1 << (BITS - 1);
  scales_by(tile, [](const F* x, F largest, F*) {
    F found = x[31];  // the first one of that magnitude
    for (int e = 30; e >= 0; e--) found = pick(f_abs(x[e]) == largest, x[e], found);
    return found / (float)-half;
  });
  const F top = f_all((float)(2 * half - 1));
  for (int64_t block = 0; block < tile.count / 32; block++) {
    const F inverse = f_all(tile.heavy[block]);
    for (int e = 0; e < 32; e += LANES) {
      const F x = f_load(tile.x + block * 32 + e);
      store_bytes(tile.codes + block * 32 + e, (i_of(at_most(x * inverse + (half + 0.5f), top)) & 0xFF) - half);
    }
  }
  pack_codes(BITS, tile.codes, tile.count, out.q);
  return put_halves(tile.d, tile.count / 32, out.d);
}

template <int BITS> bool range(Tile& tile, const Fields& out) {
  constexpr float highest = (float)((1 << BITS) - 1);
  scales_by(tile, [](const F* x, F, F* minimum) {
    F low = x[0], high = x[0];
    for (int e = 1; e < 32; e++) {
      low = pick(x[e] < low, x[e], low);
      high = pick(x[e] > high, x[e], high);
    }
    *minimum = low = low + 0.0f;
    return (high - low) / highest + 0.0f;
  });
  for (int64_t block = 0; block < tile.count / 32; block++) {
    const F inverse = f_all(tile.heavy[block]), low = f_all(tile.minimum[block]), top = f_all(highest);
    for (int e = 0; e < 32; e += LANES) {
      const F x = f_load(tile.x + block * 32 + e);
      store_bytes(tile.codes + block * 32 + e, i_of(at_most((x - low) * inverse + 0.5f, top)));
    }
  }
  pack_codes(BITS, tile.codes, tile.count, out.q);
  const bool one = put_halves(tile.d, tile.count / 32, out.d), two = put_halves(tile.m, tile.count / 32, out.m);
  return one && two;
}

bool q8_0(Tile& tile, const Fields& out) {
  scales_by(tile, [](const F*, F largest, F*) { return largest / 127.0f; });
  for (int64_t block = 0; block < tile.count / 32; block++) {
    const F inverse = f_all(tile.heavy[block]);
    for (int e = 0; e < 32; e += LANES)
      store_bytes(out.q + block * 32 + e, i_of(f_half_up(f_load(tile.x + block * 32 + e) * inverse)));
  }
  return put_halves(tile.d, tile.count / 32, out.d);
}

bool mxfp4(Tile& tile, const Fields& out) {
  scales_by(tile, [](const F*, F largest, F*) { return largest; });
  const float borders[7] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f};
  for (int64_t block = 0; block < tile.count / 32; block++) {
    const float largest = tile.scale[block];
    // just below a power of two a float32 logarithm is whole, and llama.cpp takes the power
    float exponent = largest > 0 ? floorf((float)log2((double)largest)) + 125 : 0.0f;
    exponent = exponent < 0 ? 0.0f : exponent > 254 ? 254.0f : exponent;
    const int code = (int)exponent;
    const F factor = f_all(ldexpf(1.0f, 127 - code));
    for (int e = 0; e < 32; e += LANES) {
      const F x = f_load(tile.x + block * 32 + e), size = f_abs(x) * factor;
      I place = i_all(0);
      for (int k = 0; k < 7; k++) place = place - (size > borders[k]);
      store_bytes(tile.codes + block * 32 + e, place + pick((x < 0.0f) & (place > 0), i_all(8), i_all(0)));
    }
    out.d[block] = (uint8_t)code;
  }
  pack_codes(4, tile.codes, tile.count, out.q);
  return true;
}

// Digits 0, 1, 2 of blocks of 256 into tile.codes.
inline void digits(Tile& tile) {
  for (int64_t block = 0; block < tile.count / 256; block++) {
    const float* x = tile.x + block * 256;
    I found = i_all(0);
    for (int e = 0; e < 256; e += LANES) {
      const I size = bits_of(f_load(x + e)) & 0x7FFFFFFF;
      found = pick(size > found, size, found);
    }
    // a lane with NaN must not be lost in the comparison of the lanes
    tile.strange = tile.strange | (float_of(found) != float_of(found));
    const float scale = largest_of(float_of(found));
    tile.strange = tile.strange | strange(f_all(scale));
    const F inverse = f_all(inverse_of(scale));
    for (int e = 0; e < 256; e += LANES)
      store_bytes(tile.codes + block * 256 + e, i_of(f_half_up(f_load(x + e) * inverse)) + 1);
    tile.d[block] = f16_of_float(scale);
  }
}

bool tq2_0(Tile& tile, const Fields& out) {
  digits(tile);
  pack_codes(2, tile.codes, tile.count, out.q);
  return put_halves(tile.d, tile.count / 256, out.d);
}

inline void in_base_three(const uint8_t* digits, int start, int apart, int count, uint8_t* out) {
  static const int powers[5] = {81, 27, 9, 3, 1};
  for (int i = 0; i < apart; i++) {
    int number = 0;
    for (int place = 0; place < count; place++) number += digits[start + place * apart + i] * powers[place];
    out[i] = (uint8_t)((number * 256 + 242) / 243);
  }
}

bool tq1_0(Tile& tile, const Fields& out) {
  digits(tile);
  for (int64_t block = 0; block < tile.count / 256; block++) {
    in_base_three(tile.codes + block * 256, 0, 32, 5, out.q + block * 48);
    in_base_three(tile.codes + block * 256, 160, 16, 5, out.q + block * 48 + 32);
    in_base_three(tile.codes + block * 256, 240, 4, 4, out.fours + block * 4);
  }
  return put_halves(tile.d, tile.count / 256, out.d);
}

bool encode_tile(int64_t type, Tile& tile, const float* importance, const Fields& out) {
  switch (type) {
    case ANYBIT_Q4_0: return importance ? weighted_largest<4>(tile, out) : largest<4>(tile, out);
    case ANYBIT_Q5_0: return importance ? weighted_largest<5>(tile, out) : largest<5>(tile, out);
    case ANYBIT_Q4_1: return importance ? weighted_range<4>(tile, out) : range<4>(tile, out);
    case ANYBIT_Q5_1: return importance ? weighted_range<5>(tile, out) : range<5>(tile, out);
    case ANYBIT_Q8_0: return q8_0(tile, out);
    case ANYBIT_Q2_K: return with_minimum<16, 2, 4>(tile, importance, {-0.5, 0.1, 15}, 1.0f, out);
    case ANYBIT_Q3_K: return q3_k(tile, importance, out);
    case ANYBIT_Q4_K: return with_minimum<32, 4, 6>(tile, importance, {-1.0, 0.1, 20}, 2.0f, out);
    case ANYBIT_Q5_K: return with_minimum<32, 5, 6>(tile, importance, {-0.5, 0.1, 15}, 2.0f, out);
    case ANYBIT_Q6_K: return q6_k(tile, importance, out);
    case ANYBIT_IQ4_NL: return iq4_nl(tile, importance, out);
    case ANYBIT_IQ4_XS: return iq4_xs(tile, importance, out);
    case ANYBIT_MXFP4: return mxfp4(tile, out);
    case ANYBIT_TQ1_0: return tq1_0(tile, out);
    default: return tq2_0(tile, out);
  }
}

void encode_search(void* data, int64_t first, int64_t last) {
  const anybit_search* job = static_cast<const anybit_search*>(data);
  const int64_t columns = job->source.columns, type = job->type;
  const BlockShape& block = BLOCK_SHAPES[type];
  const bool as_it_is = job->source.kind == ANYBIT_F32 && job->source.casts[0] < 0;
  const bool by_row = job->importance && type <= ANYBIT_Q5_1;  // the mean square is the row's
  Tile tile;
  memset(&tile, 0, sizeof tile);
  for (int64_t row = first; row < last; row++) {
    float sums[16] = {0};
    bool fine = true;
    if (by_row) {
      for (int64_t start = 0; start < columns; start += TILE) {
        const int64_t count = columns - start < TILE ? columns - start : TILE;
        take(&job->source, row, start, count, tile.space);
        add_squares(tile.space, count, sums);
      }
      folded(sums);
    }
    for (int64_t start = 0; start < columns && fine; start += TILE) {
      tile.count = columns - start < TILE ? columns - start : TILE;
      if (as_it_is && tile.count == TILE) {
        tile.x = static_cast<const float*>(job->source.data) + row * job->source.stride + start;
      } else {
        take(&job->source, row, start, tile.count, tile.space);
        memset(tile.space + tile.count, 0, 32 * LANES * sizeof(float));
        tile.x = tile.space;
      }
      const int64_t at = (row * columns + start) / block.elements;
      const Fields out = {job->fields.q + at * block.q,   job->fields.sc + at * block.sc, job->fields.mn + at * block.mn,
                          job->fields.d + at * block.d,   job->fields.m + at * block.m,   job->fields.fours + at * block.fours};
      const float* importance = job->importance ? job->importance + start : nullptr;
      if (by_row) weigh(tile.x, importance, tile.count, sums[0] / (float)columns, 1.0f, tile.w);
      if (importance) memset(tile.w + tile.count, 0, 32 * LANES * sizeof(float));
      tile.strange = i_all(0);
      fine = encode_tile(type, tile, importance, out) && !any(tile.strange);
    }
    job->odd[row] = !fine;
  }
}

}  // namespace

#endif
