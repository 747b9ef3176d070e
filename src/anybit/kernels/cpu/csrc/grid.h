// The C ABI shared by every instruction-set variant: what a Grid weight looks like in memory. Plain data, no C++ types.
//
//   weight[r, c] = (levels[code[r, c]] - zero[r / zero.down, c / group]) * scale[...] + offset[...]
//
// A codebook: one code names a tile of `high` x `wide` weights in each of `books` tables,
//
//   weight[r, c] = (+-sum_k table[k][code[r / high, c / wide, k]][r % high][c % wide] - zero) * scale
//
// Codes are anybit's canonical packing: one little-endian bit stream per row, `row_bytes` apart. Nothing is re-laid out, so a
// checkpoint's own bytes (or the page cache behind them) are multiplied as they are.
#ifndef ANYBIT_GRID_H
#define ANYBIT_GRID_H

#include <stdint.h>

// F32_POINTS: of tables alone; float32, and behind them the same numbers as words of indices (book_lattices.h).
enum anybit_float { ANYBIT_F32 = 0, ANYBIT_BF16 = 1, ANYBIT_F16 = 2, ANYBIT_F32_POINTS = 3 };

enum anybit_parameter_kind {
  ANYBIT_ABSENT = 0,
  ANYBIT_P_F32 = 1,
  ANYBIT_P_BF16 = 2,
  ANYBIT_P_F16 = 3,
  ANYBIT_P_U8 = 4,    // integers 0..255
  ANYBIT_P_I8 = 5,
  ANYBIT_P_E8M0 = 6,  // 2**(byte - 127), 255 is NaN
  ANYBIT_P_NESTED = 7,
};

enum anybit_levels {
  ANYBIT_UNSIGNED = 0,  // the code itself
  ANYBIT_SIGNED = 1,    // the code in two's complement
  ANYBIT_TABLE = 2,     // table[code], float32 [2**bits]
  ANYBIT_E4M3 = 3,      // OCP FP8 without NaN codes
  ANYBIT_E5M2 = 4,
  ANYBIT_VECTORS = 5,  // a code names a vector of a codebook
};

// One value per (row / down, group); width 1: the same for every group. Inverted: divide by it (scales only).
//
// Nested: the values are codes themselves, one stream over all of them, value i = levels[code[i]] * scale[i / group] + offset.
// `group` is a multiple of eight; where codes are narrower than a byte so is every row of values. `offset` is one number.
struct anybit_parameter {
  int64_t kind, down, row_stride, width, inverted, negated;
  int64_t bits, levels, group, count, scale_kind, scale_negated, offset_kind;
};

// The tensors of a nested parameter, whose codes are where another's values are.
struct anybit_nested {
  const float* table;
  const void* scale;
  const void* offset;
};

// What is behind `compute` is about codebooks alone. The K codes of a tile lie side by side; `table_kind`: anybit_float of the
// tables [books, entries, high, wide]. Signs: none, a bit a weight (1), or seven bits for eight weights of a row and their
// parity (7); rows of them are `sign_bytes` apart.
struct anybit_shape {
  int64_t rows, columns, row_bytes, bits, levels, group, compute;
  int64_t high, wide, books, entries, table_kind, sign_bits, sign_bytes;
  struct anybit_parameter scale, zero, offset;
};

// The tensors behind a shape. `permutation` (or null): column j of the codes meets input permutation[j]; -1 is no input.
struct anybit_tensors {
  const uint8_t* codes;
  const float* table;  // of a codebook: numbers of its `table_kind`
  const void* scale;
  const void* zero;
  const void* offset;
  const int32_t* permutation;
  const uint8_t* signs;
  struct anybit_nested nested[3];  // of scale, zero, offset
};

// x [n, columns], element strides; y [n, rows]. `accumulate`: add to y (float32 only) instead of writing. `fast`: x, and the
// numbers of tables, may be rounded to eight bits.
struct anybit_product {
  const void* x;
  int64_t x_kind, n, x_row, x_column;
  const void* bias;
  int64_t bias_kind;
  void* y;
  int64_t y_kind, y_row, accumulate, fast;
};

#endif
