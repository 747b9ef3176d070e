// Encoders for the "scalar" variant: the flags that setup.py compiles this file with decide the instructions.
#include "encode_variant.h"
//
#include "encode_dense.h"
#include "encode_ggml.h"
#include "encode_moving.h"
#include "encode_roundings.h"

extern const Encoders anybit_encoders_scalar = {
    "scalar",
    {encode_ranges, encode_integers, encode_small_floats, encode_table_blocks, encode_pack, encode_unpack, encode_search,
     encode_into_blocks, encode_from_blocks, encode_turn, encode_swap_halves,
     encode_dense},
};
