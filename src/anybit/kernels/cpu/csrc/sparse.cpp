// Products with CSR matrices, which are added to other products: few numbers, wherever they are.
#include <stdlib.h>

#include "grid.h"
//
#include "numbers.h"
#include "threads.h"

#ifdef _WIN32
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

struct Call {
  const int32_t* offsets;
  const int32_t* columns;
  const float* values;
  const void* x;
  int64_t x_kind, n, x_row, x_column;
  float* y;
  int64_t y_row;
};

void add_rows(void* data, int64_t first, int64_t last) {
  const Call* c = static_cast<const Call*>(data);
  for (int64_t row = first; row < last; row++)
    for (int64_t n = 0; n < c->n; n++) {
      float sum = 0.0f;
      for (int64_t i = c->offsets[row]; i < c->offsets[row + 1]; i++)
        sum += c->values[i] * read_float(c->x, c->x_kind, n * c->x_row + c->columns[i] * c->x_column);
      c->y[n * c->y_row + row] += sum;
    }
}

// Rows of x side by side, so that an outlier meets all of them at once.
const int64_t BESIDE = 64;

struct Columns {
  const Call* call;
  int64_t start, count;  // rows of x
  float* x;              // [columns, BESIDE]
};

void take_columns(void* data, int64_t first, int64_t last) {
  const Columns* q = static_cast<const Columns*>(data);
  const Call* c = q->call;
  for (int64_t n = 0; n < q->count; n++)
    for (int64_t column = first; column < last; column++)
      q->x[column * BESIDE + n] = read_float(c->x, c->x_kind, (q->start + n) * c->x_row + column * c->x_column);
  for (int64_t column = first; column < last; column++)
    for (int64_t n = q->count; n % 8; n++) q->x[column * BESIDE + n] = 0.0f;
}

void add_beside(void* data, int64_t first, int64_t last) {
  const Columns* q = static_cast<const Columns*>(data);
  const Call* c = q->call;
  const int64_t eights = (q->count + 7) / 8;
  for (int64_t row = first; row < last; row++) {
    float sums[BESIDE] = {0};
    for (int64_t i = c->offsets[row]; i < c->offsets[row + 1]; i++) {
      const float value = c->values[i];
      const float* x = q->x + c->columns[i] * BESIDE;
      for (int64_t n = 0; n < eights; n++)
        for (int64_t k = 0; k < 8; k++) sums[8 * n + k] += value * x[8 * n + k];
    }
    for (int64_t n = 0; n < q->count; n++) c->y[(q->start + n) * c->y_row + row] += sums[n];
  }
}

}  // namespace

// float32 y [n, rows] += x @ S.T; row r of S owns values offsets[r] .. offsets[r + 1] of x's `width` columns.
EXPORT void anybit_add_sparse(const int32_t* offsets, const int32_t* columns, const float* values, int64_t rows, int64_t width,
                              const void* x, int64_t x_kind, int64_t n, int64_t x_row, int64_t x_column, float* y,
                              int64_t y_row, int64_t threads) {
  Call call = {offsets, columns, values, x, x_kind, n, x_row, x_column, y, y_row};
  const int64_t products = (offsets[rows] - offsets[0]) * n;
  if (products < 1 << 16) threads = 1;
  float* beside = n < 4 ? nullptr : static_cast<float*>(malloc(static_cast<size_t>(width * BESIDE) * sizeof(float)));
  if (!beside) return anybit_parallel(rows, 16, threads, add_rows, &call);
  for (int64_t start = 0; start < n; start += BESIDE) {
    Columns q = {&call, start, n - start < BESIDE ? n - start : BESIDE, beside};
    anybit_parallel(width, 16, threads, take_columns, &q);
    anybit_parallel(rows, 16, threads, add_beside, &q);
  }
  free(beside);
}
