// llama.cpp's searches for scales, LANES blocks at a time: lane = block, one vector for each element. The operations and their
// order are those of algorithms/ggml_search.py, which explains them.
#ifndef ANYBIT_ENCODE_SEARCHES_H
#define ANYBIT_ENCODE_SEARCHES_H

#include "lanes.h"

namespace {

constexpr float EMPTY = 1e-15f;

inline F f_none() { return f_all(0.0f); }
inline F f_clamped(F a, float low, float high) { return at_most(at_least(a, f_all(low)), f_all(high)); }
inline F f_code(F a, float low, float high) { return f_clamped(f_even(a), low, high); }
// A Python number over a tensor is its reciprocal times the number.
inline F over(double number, F a) { return (1.0f / a) * (float)number; }

template <int W> inline F extreme(const F* x) {
  F found = x[0];
  for (int e = 1; e < W; e++) found = pick(f_abs(x[e]) > f_abs(found), x[e], found);
  return found;
}

// Sixteen terms after one another, then the next sixteen.
template <int W, class Term> inline auto summed(Term term) {
  decltype(term(0)) total = {};
  for (int start = 0; start < W; start += 16) {
    decltype(term(0)) part = {};
    for (int e = start; e < W && e < start + 16; e++) part = part + term(e);
    total = total + part;
  }
  return total;
}

struct Fit {
  F first, second;  // sum w x q, sum w q q
};
inline Fit operator+(const Fit& a, const Fit& b) { return {a.first + b.first, a.second + b.second}; }

template <int W> inline Fit refit(const F* x, const F* wx, const F* w, F inverse, float low, float high) {
  return summed<W>([&](int e) {
    const F code = f_code(x[e] * inverse, low, high);
    return Fit{wx[e] * code, w[e] * code * code};
  });
}

// Scales; codes from 0 to 2 half - 1 go to `codes`.
template <int W> inline F symmetric(const F* x, const F* w, int half, F* codes) {
  const float low = (float)-half, high = (float)(half - 1);
  F largest = extreme<W>(x), wx[W];
  const I empty = f_abs(largest) < EMPTY;
  largest = pick(empty, f_all(1.0f), largest);
  for (int e = 0; e < W; e++) wx[e] = w[e] * x[e];
  F best_inverse = over(-half, largest);
  Fit fit = refit<W>(x, wx, w, best_inverse, low, high);
  F scale = pick(fit.second > 0.0f, fit.first / fit.second, f_none()), best = scale * fit.first;
  for (int step = -9; step < 10; step++) {
    if (step == 0) continue;
    const F inverse = over(-(half + 0.1 * step), largest);
    fit = refit<W>(x, wx, w, inverse, low, high);
    const I better = (fit.second > 0.0f) & (fit.first * fit.first > best * fit.second);
    scale = pick(better, fit.first / fit.second, scale);
    best = pick(better, scale * fit.first, best);
    best_inverse = pick(better, inverse, best_inverse);
  }
  for (int e = 0; e < W; e++)
    codes[e] = pick(empty, f_none(), f_code(x[e] * best_inverse, low, high) + (float)half);
  return pick(empty, f_none(), scale);
}

// Codes are moved one by one while that lowers the error. `one_way`: only codes whose second sum stays above zero are left.
template <int W> inline void descend(const F* x, const F* w, const F* wx, F* codes, Fit& fit, float low, float high, bool one_way) {
  const F none = f_none();
  for (int round = 0; round < 5; round++) {
    I changed = i_all(0);
    for (int e = 0; e < W; e++) {
      const F own = codes[e];
      const F one = fit.first - wx[e] * own, two = fit.second - w[e] * own * own;
      const F moved = f_code(x[e] * two / one, low, high);
      const F one_moved = one + wx[e] * moved, two_moved = two + w[e] * moved * moved;
      const I better = (one > none) & (moved != own) & ((one_way ? two : two_moved) > none) &
                       (one_moved * one_moved * fit.second > fit.first * fit.first * two_moved);
      changed = changed | better;
      codes[e] = pick(better, moved, own);
      fit.first = pick(better, one_moved, fit.first);
      fit.second = pick(better, two_moved, fit.second);
    }
    if (!any(changed)) break;
  }
}

template <int W> inline F descent(const F* x, int half, F* codes) {
  const float low = (float)-half, high = (float)(half - 1);
  const F largest = extreme<W>(x);
  const I empty = f_abs(largest) < EMPTY;
  const F inverse = over(-half, pick(empty, f_all(1.0f), largest));
  F w[W], wx[W];
  Fit fit = summed<W>([&](int e) {
    codes[e] = f_code(x[e] * inverse, low, high);
    w[e] = x[e] * x[e];
    wx[e] = w[e] * x[e];
    return Fit{wx[e] * codes[e], w[e] * codes[e] * codes[e]};
  });
  descend<W>(x, w, wx, codes, fit, low, high, false);
  for (int e = 0; e < W; e++) codes[e] = pick(empty, f_none(), codes[e] + (float)half);
  return pick(empty, f_none(), pick(fit.second > 0.0f, fit.first / fit.second, f_none()));
}

struct Ladder {
  double start, step;
  int steps;
};

struct RangeSums {
  F one, two, cross;
};
inline RangeSums operator+(const RangeSums& a, const RangeSums& b) {
  return {a.one + b.one, a.two + b.two, a.cross + b.cross};
}

// Scales, and minimums times -1; codes from 0 to `highest`.
template <int W, bool ABSOLUTE> inline F ranged(const F* x, const F* w, int highest, Ladder ladder, F* codes, F* minimum) {
  const F none = f_none(), top = f_all((float)highest);
  F low = x[0], high = x[0];
  for (int e = 1; e < W; e++) {
    low = pick(x[e] < low, x[e], low);
    high = pick(x[e] > high, x[e], high);
  }
  low = at_most(low, none);
  const I empty = high <= low;
  const F width = pick(empty, f_all(1.0f), high - low);
  F above[W], wa[W];
  for (int e = 0; e < W; e++) {
    above[e] = x[e] - low;
    wa[e] = w[e] * above[e];
  }
  const F total = summed<W>([&](int e) { return w[e]; }), total_above = summed<W>([&](int e) { return wa[e]; });
  const F energy = summed<W>([&](int e) { return wa[e] * above[e]; });
  const auto code = [&](int e, F inverse, F offset) {
    return at_most(at_least(f_even((above[e] - offset) * inverse), none), top);
  };
  const auto rounded = [&](F inverse, F offset) {
    return summed<W>([&](int e) {
      const F own = code(e, inverse, offset), weighted = w[e] * own;
      return RangeSums{weighted, weighted * own, wa[e] * own};
    });
  };
  const auto error = [&](F scale, F offset, const RangeSums& sums, F inverse, F start) {
    if (!ABSOLUTE)
      return energy + scale * (scale * sums.two - 2.0f * sums.cross + 2.0f * offset * sums.one) +
             offset * (offset * total - 2.0f * total_above);
    return summed<W>([&](int e) { return f_abs(code(e, inverse, start) * scale + offset - above[e]) * w[e]; });
  };
  F inverse = over(highest, width), offset = none, scale = 1.0f / inverse;
  F best = error(scale, offset, rounded(inverse, offset), inverse, offset);
  F chosen_inverse = inverse, chosen_offset = offset;
  for (int number = 0; number <= ladder.steps; number++) {
    inverse = over(ladder.start + ladder.step * number + highest, width - offset);
    const RangeSums sums = rounded(inverse, offset);
    const F spread = total * sums.two - sums.one * sums.one;
    F fitted = (total * sums.cross - total_above * sums.one) / spread;
    F moved = (sums.two * total_above - sums.one * sums.cross) / spread;
    const I positive = moved + low > none;
    fitted = pick(positive, (sums.cross + low * sums.one) / sums.two, fitted);
    moved = pick(positive, -low, moved);
    const F found = error(fitted, moved, sums, inverse, offset);
    const I better = (spread > none) & (found < best);
    best = pick(better, found, best);
    scale = pick(better, fitted, scale);
    chosen_inverse = pick(better, inverse, chosen_inverse);
    chosen_offset = pick(better, offset, chosen_offset);
    offset = pick(better, moved, offset);
  }
  for (int e = 0; e < W; e++) codes[e] = pick(empty, none, code(e, chosen_inverse, chosen_offset));
  *minimum = -(low + pick(empty, none, offset));
  return pick(empty, none, scale);
}

// One scale for numbers that are not negative, and codes from 0 to `highest`.
template <int W> inline F positive(const F* x, const F* w, int highest, F* codes) {
  const F none = f_none();
  const float top = (float)highest;
  F largest = x[0], wx[W];
  for (int e = 1; e < W; e++) largest = pick(x[e] > largest, x[e], largest);
  largest = at_least(largest, none);
  const I empty = largest < EMPTY;
  largest = pick(empty, f_all(1.0f), largest);
  F best_inverse = over(highest, largest), best = none;
  for (int number = 0; number < 9; number++) {
    const int step = number == 0 ? 0 : number < 5 ? number - 5 : number - 4;
    const F inverse = over(0.1 * step + highest, largest);
    const F error = summed<W>([&](int e) {
      const F apart = x[e] - at_most(f_even(x[e] * inverse), f_all(top)) / inverse;
      return w[e] * (apart * apart);
    });
    if (number == 0) {
      best = error;
      continue;
    }
    const I better = error < best;
    best = pick(better, error, best);
    best_inverse = pick(better, inverse, best_inverse);
  }
  Fit fit = summed<W>([&](int e) {
    codes[e] = f_code(x[e] * best_inverse, 0.0f, top);
    wx[e] = w[e] * x[e];
    return Fit{wx[e] * codes[e], w[e] * codes[e] * codes[e]};
  });
  descend<W>(x, w, wx, codes, fit, 0.0f, top, true);
  for (int e = 0; e < W; e++) codes[e] = pick(empty, none, codes[e]);
  return pick(empty, none, pick(fit.second > none, fit.first / fit.second, none));
}

// --- IQ4's table -----------------------------------------------------------------------------------------------------------

alignas(64) const float IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
// the sums of neighbours: what lies on half of one belongs to the upper
alignas(64) const float IQ4_BORDERS[16] = {-231, -187, -148, -114, -84, -57, -32, -9, 14, 38, 63, 91, 122, 158, 202, 0};

// The code nearest to x * inverse; `doubled`: two times the inverse.
inline I iq4_code(F x, F doubled) {
  const F number = x * doubled;
#if defined(__AVX512F__)
  const __m512 borders = _mm512_load_ps(IQ4_BORDERS);
  __m512i place = _mm512_setzero_si512();
  for (int half = 8; half; half /= 2) {
    const __m512 border = _mm512_permutexvar_ps(_mm512_add_epi32(place, _mm512_set1_epi32(half - 1)), borders);
    const __mmask16 above = _mm512_cmp_ps_mask(border, (__m512)number, _CMP_LE_OQ);
    place = _mm512_mask_add_epi32(place, above, place, _mm512_set1_epi32(half));
  }
  return (I)place;
#else
  I place = i_all(0);
  for (int k = 0; k < 15; k++) place = place - (number >= f_all(IQ4_BORDERS[k]));
  return place;
#endif
}

inline F iq4_value(F x, F doubled) {
#if defined(__AVX512F__)
  return (F)_mm512_permutexvar_ps((__m512i)iq4_code(x, doubled), _mm512_load_ps(IQ4_VALUES));
#else
  const F number = x * doubled;
  F value = f_all(IQ4_VALUES[0]);
  for (int k = 0; k < 15; k++)  // whole numbers: sums are exact
    value = value + pick(number >= f_all(IQ4_BORDERS[k]), f_all(IQ4_VALUES[k + 1] - IQ4_VALUES[k]), f_none());
  return value;
#endif
}

template <int W> inline F in_table(const F* x, const F* w) {
  F largest = extreme<W>(x), wx[W], scale = f_none(), best = f_none();
  const I empty = f_abs(largest) < EMPTY;
  largest = pick(empty, f_all(1.0f), largest);
  for (int e = 0; e < W; e++) wx[e] = w[e] * x[e];
  for (int number = 0; number < 16; number++) {
    const F doubled = 2.0f * over(number == 0 ? 127 : -127 + (number - 8), largest);
    const Fit fit = summed<W>([&](int e) {
      const F value = iq4_value(x[e], doubled);
      return Fit{wx[e] * value, w[e] * value * value};
    });
    if (number == 0) {
      scale = pick(fit.second > 0.0f, fit.first / fit.second, f_none());
      best = scale * fit.first;
      continue;
    }
    const I better = (fit.second > 0.0f) & (fit.first * fit.first > best * fit.second);
    scale = pick(better, fit.first / fit.second, scale);
    best = pick(better, scale * fit.first, best);
  }
  return pick(empty, f_none(), scale);
}

}  // namespace

#endif
