// What one instruction-set variant offers to the driver. Each variant is the same source compiled with other flags.
#ifndef ANYBIT_VARIANT_H
#define ANYBIT_VARIANT_H

#include "grid.h"

// Inputs of one product, ready for the inner loops: padded with zeros, in the order the loops want.
struct Input {
  const float* values;  // [n, ...]
  const float* sums;    // [n, groups]; sums of x that zeros and offsets are multiplied with
  int64_t value_stride, sum_stride;
};

struct Variant {
  const char* name;
  // floats of scratch one row of x needs, for values and for sums
  void (*sizes)(const anybit_shape* shape, const anybit_tensors* tensors, const anybit_product* product, int64_t* values,
                int64_t* sums);
  void (*take_input)(const anybit_shape* shape, const anybit_tensors* tensors, const anybit_product* product, int64_t row,
                     float* values, float* sums);
  void (*multiply)(const anybit_shape* shape, const anybit_tensors* tensors, const anybit_product* product,
                   const Input* input, int64_t first_row, int64_t last_row);
  void (*decode)(const anybit_shape* shape, const anybit_tensors* tensors, int64_t row, void* out, int64_t out_kind);
  // Many rows of x (grid_blocks.h): words a row of x takes in panels; floats of scratch a thread needs.
  void (*block_sizes)(const anybit_shape* shape, const anybit_tensors* tensors, const anybit_product* product,
                      int64_t* row_of_x, int64_t* scratch);
  void (*take_block_input)(const anybit_shape* shape, const anybit_tensors* tensors, const anybit_product* product,
                           int64_t row, float* panels);
  void (*multiply_many)(const anybit_shape* shape, const anybit_tensors* tensors, const anybit_product* product,
                        const Input* input, int64_t row, float* scratch);
  int64_t tall;  // rows of the weight that multiply_many takes
};

extern const Variant anybit_variant_scalar;
extern const Variant anybit_variant_neon;
extern const Variant anybit_variant_avx2;
extern const Variant anybit_variant_avx512;
extern const Variant anybit_variant_avx512vbmi;

// The same for codebooks.
extern const Variant anybit_books_scalar;
extern const Variant anybit_books_neon;
extern const Variant anybit_books_avx2;
extern const Variant anybit_books_avx512;
extern const Variant anybit_books_avx512vbmi;

#endif
