// Codebook products for the "avx512" variant: the flags that setup.py compiles this file with decide the instructions.
#include <stdint.h>
#include <string.h>

#include "variant.h"
//
#include "numbers.h"
#include "vec_avx512.h"
//
#include "book_kernels.h"
//
#include "grid_blocks.h"

extern const Variant anybit_books_avx512 = {"avx512",       sizes,            take_input,    multiply,
                                           decode,           block_sizes,      take_block_input, multiply_many,
                                           TALL};
