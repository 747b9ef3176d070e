// Four bits in the format's own bfloat16 arithmetic (MLX): a group has sixteen weights, each operation rounded as the format
// does it; they are worked out once, looked up as bfloat16 and multiplied in pairs.
//
//   x   as for ByPairs, whose chunk is two halves of 64 columns here. A float32 x is the sum of three bfloat16, each the rest of
//       those before it: eight bits each, all of its 24.
#ifndef ANYBIT_GRID_TABLES_H
#define ANYBIT_GRID_TABLES_H

#ifdef ANYBIT_DOTS

namespace {

// Scales, zeros and offsets of R rows of a run of groups, rounded to bfloat16; rows `pitch` apart.
template <int R> struct RoundedLines {
  static constexpr int64_t ROW = RUN + 4 * LANES;
  int64_t pitch;
  alignas(64) float scale[R * ROW], zero[R * ROW], offset[R * ROW];
};

static inline void rounded_run(const Parameter& q, int64_t first, int64_t count, float* out) {
  if (q.p->kind == ANYBIT_ABSENT) return;
  run_of(q, first, count, out);
  if (q.p->kind == ANYBIT_P_BF16) return;
  for (int64_t i = 0; i < count; i += LANES) f_store(out + i, f_round_bf16(f_load(out + i)));
}

template <int R>
static NOINLINE void read_rounded(const anybit_shape* s, const anybit_tensors* t, int64_t row, int64_t first, int64_t count,
                                  RoundedLines<R>* lines) {
  const bool together = R > 1 && adjoins(&s->scale, count) && adjoins(&s->zero, count) && adjoins(&s->offset, count);
  const int64_t length = together ? R * count : count;
  lines->pitch = together ? count : RoundedLines<R>::ROW;
  for (int64_t i = 0; i < (together ? 1 : R); i++) {
    const RowParameters q = row_parameters(s, t, row + i);
    rounded_run(q.scale, first, length, lines->scale + i * lines->pitch);
    rounded_run(q.zero, first, length, lines->zero + i * lines->pitch);
    rounded_run(q.offset, first, length, lines->offset + i * lines->pitch);
  }
}

// R rows of the weight, B rows of x in X parts.
template <int X, int R, int B> static void product_tables(const Product& q, int64_t row, int64_t n) {
  const anybit_shape* s = q.s;
  const bool has_zero = s->zero.kind != ANYBIT_ABSENT, has_scale = s->scale.kind != ANYBIT_ABSENT;
  const bool has_offset = s->offset.kind != ANYBIT_ABSENT;
  const F numbers = f_round_bf16(f_add(f_load(q.levels.numbers), f_set(centre(s))));
  const int64_t part = padded_columns(s) * 2, stride = q.in->value_stride * (int64_t)sizeof(float), row_bytes = s->row_bytes;
  const char* x = (const char*)(q.in->values + n * q.in->value_stride) + (X > 1 ? 2 * part : 0);
  const uint8_t* codes = q.t->codes + row * row_bytes;
  __m256 acc[R][B][2];
  UNROLLED for (int r = 0; r < R; r++)
    UNROLLED for (int b = 0; b < B; b++) acc[r][b][0] = acc[r][b][1] = _mm256_setzero_ps();
  RoundedLines<R> lines;
  const int64_t group = least(s->group, s->columns), groups = ceil_div(s->columns, group);
  for (int64_t g = 0; g < groups; g++) {
    if (g % RUN == 0) read_rounded<R>(s, q.t, row, g, least(RUN, groups - g), &lines);
    __m256i table[R];
    UNROLLED for (int r = 0; r < R; r++) {
      const int64_t at = r * lines.pitch + g % RUN;
      F w = numbers;
      if (has_zero) w = f_round_bf16(f_sub(w, f_set(lines.zero[at])));
      if (has_scale) w = f_mul(w, f_set(lines.scale[at]));
      if (has_offset) w = f_add(f_round_bf16(w), f_set(lines.offset[at]));
      table[r] = (__m256i)_mm512_cvtneps_pbh(w);
    }
    for (int64_t column = g * group, stop = least(column + group, s->columns); column < stop; column += 64) {
      const int64_t left = row_bytes - column / 2;
      const uint8_t* p = codes + column / 2;
      const char* halves = x + column / CHUNK * (2 * CHUNK) + column / 64 % 2 * 32;
      __m256i raw[R];
      UNROLLED for (int r = 0; r < R; r++) {
        prefetch(p + (r + R) * row_bytes);
        raw[r] = left >= 32 ? _mm256_loadu_si256((const __m256i*)(p + r * row_bytes))
                            : _mm256_maskz_loadu_epi8((1u << left) - 1, p + r * row_bytes);
      }
      UNROLLED for (int k = 0; k < 4; k++) {
        __m256bh own[B][X];
        UNROLLED for (int b = 0; b < B; b++)
          UNROLLED for (int i = 0; i < X; i++)
            own[b][i] = (__m256bh)_mm256_loadu_si256((const __m256i*)(halves + b * stride + i * part + 64 * k));
        UNROLLED for (int r = 0; r < R; r++) {
          // five bits are looked at, of sixteen words four
          const __m256bh level = (__m256bh)_mm256_permutexvar_epi16(_mm256_srli_epi16(raw[r], 4 * k), table[r]);
          UNROLLED for (int b = 0; b < B; b++)
            UNROLLED for (int i = X - 1; i >= 0; i--) acc[r][b][k % 2] = _mm256_dpbf16_ps(acc[r][b][k % 2], level, own[b][i]);
        }
      }
    }
  }
  UNROLLED for (int r = 0; r < R; r++)
    UNROLLED for (int b = 0; b < B; b++)
      put(q.p, n + b, row + r, f_sum(_mm512_insertf32x8(_mm512_castps256_ps512(acc[r][b][0]), acc[r][b][1], 1)));
}

}  // namespace

#endif
#endif
