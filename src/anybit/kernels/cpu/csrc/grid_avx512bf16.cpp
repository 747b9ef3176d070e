// Grid products for the "avx512bf16" variant: avx512, with bfloat16 inputs multiplied in pairs.
#include <stdint.h>
#include <string.h>

#define ANYBIT_DOTS
#include "variant.h"
//
#include "numbers.h"
#include "vec_avx512.h"
//
#include "grid_kernels.h"
//
#include "grid_blocks.h"

extern const Variant anybit_variant_avx512bf16 = {"avx512bf16",       sizes,            take_input,    multiply,
                                           decode,           block_sizes,      take_block_input, multiply_many,
                                           TALL};
