// Products of a few rows of input with a dense matrix: what a model's head costs while it generates.
#ifndef ANYBIT_ENCODE_DENSE_H
#define ANYBIT_ENCODE_DENSE_H

#include "encode.h"
#include "lanes.h"

namespace {

template <int KIND> inline F dense_load(const char* row, int64_t at) {
  if (KIND == ANYBIT_F32) return f_load(reinterpret_cast<const float*>(row) + at);
  Halves raw;
  memcpy(&raw, row + 2 * at, sizeof raw);
  return KIND == ANYBIT_F16 ? f_of_f16(raw) : float_of(i_shift_left(widened(raw), 16));
}

inline float sum_of(F a) {
  float v[LANES];
  f_store(v, a);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) v[i] += v[i + width];
  return v[0];
}

// One row of the weight with N rows of x: a vector of weights is read and widened once for all of them.
template <int KIND, int N>
inline void dense_row(const anybit_dense* job, const float* x, int64_t n, int64_t row) {
  constexpr int MANY = N == 1 ? 4 : 2;  // sums that do not wait for each other
  const int64_t columns = job->columns;
  const char* weight = static_cast<const char*>(job->weight) + row * columns * (KIND == ANYBIT_F32 ? 4 : 2);
  F sums[N][MANY];
  for (int j = 0; j < N; j++)
    for (int k = 0; k < MANY; k++) sums[j][k] = f_all(0.0f);
  int64_t i = 0;
  for (; i + MANY * LANES <= columns; i += MANY * LANES)
    for (int k = 0; k < MANY; k++) {
      const F own = dense_load<KIND>(weight, i + k * LANES);
      for (int j = 0; j < N; j++) sums[j][k] = sums[j][k] + own * f_load(x + j * columns + i + k * LANES);
    }
  const float bias = job->bias ? read_float(job->bias, KIND, row) : 0.0f;
  for (int j = 0; j < N; j++) {
    F all = sums[j][0] + sums[j][1];
    for (int k = 2; k < MANY; k += 2) all = all + (sums[j][k] + sums[j][k + 1]);
    float found = sum_of(all);
    for (int64_t rest = i; rest < columns; rest++) found += read_float(weight, KIND, rest) * x[j * columns + rest];
    write_float(job->y, KIND, (n + j) * job->rows + row, found + bias);
  }
}

template <int KIND> inline void dense_rows(const anybit_dense* job, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; row++)
    for (int64_t n = 0; n < job->n;) {
      const int64_t left = job->n - n;
      const float* x = job->x + n * job->columns;
      if (left >= 4) dense_row<KIND, 4>(job, x, n, row), n += 4;
      else if (left >= 2) dense_row<KIND, 2>(job, x, n, row), n += 2;
      else dense_row<KIND, 1>(job, x, n, row), n += 1;
    }
}

void encode_dense(void* data, int64_t first, int64_t last) {
  const anybit_dense* job = static_cast<const anybit_dense*>(data);
  switch (job->kind) {
    case ANYBIT_BF16: return dense_rows<ANYBIT_BF16>(job, first, last);
    case ANYBIT_F16: return dense_rows<ANYBIT_F16>(job, first, last);
    default: return dense_rows<ANYBIT_F32>(job, first, last);
  }
}

}  // namespace

#endif
