// Codebook products for the "avx512vbmi" variant: avx512, with bfloat16 multiplied in pairs, bytes in fours, and codes of
// any width spread to bytes at once.
#include <stdint.h>
#include <string.h>

#define ANYBIT_DOTS
#define ANYBIT_VBMI
#define ANYBIT_VNNI
#include "variant.h"
//
#include "numbers.h"
#include "vec_avx512.h"
//
#include "book_kernels.h"
//
#include "grid_blocks.h"

extern const Variant anybit_books_avx512vbmi = {"avx512vbmi", sizes,       take_input,       multiply,
                                            decode,       block_sizes, take_block_input, multiply_many,
                                            TALL};
