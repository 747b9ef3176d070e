// Grid products for the "neon" variant (64-bit Arm).
#include <stdint.h>
#include <string.h>

#include "variant.h"
//
#include "numbers.h"
#include "vec_neon.h"
//
#include "grid_kernels.h"
//
#include "grid_blocks.h"

extern const Variant anybit_variant_neon = {"neon",       sizes,            take_input,    multiply,
                                           decode,           block_sizes,      take_block_input, multiply_many,
                                           TALL};
