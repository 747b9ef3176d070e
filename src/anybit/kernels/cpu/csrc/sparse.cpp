// Products with CSR matrices, which are added to other products: few numbers, wherever they are.
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

}  // namespace

// float32 y [n, rows] += x @ S.T; row r of S owns values offsets[r] .. offsets[r + 1].
EXPORT void anybit_add_sparse(const int32_t* offsets, const int32_t* columns, const float* values, int64_t rows, const void* x,
                              int64_t x_kind, int64_t n, int64_t x_row, int64_t x_column, float* y, int64_t y_row,
                              int64_t threads) {
  Call call = {offsets, columns, values, x, x_kind, n, x_row, x_column, y, y_row};
  const int64_t products = (offsets[rows] - offsets[0]) * n;
  anybit_parallel(rows, 16, products < 1 << 16 ? 1 : threads, add_rows, &call);
}
