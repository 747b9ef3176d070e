// The C ABI of the encoders, jobs that turn rows of floats into codes, and of other jobs over rows. Plain data, no C++ types.
//
// `anybit_encode(what, job, count, grain, threads)` shares 0 .. count among threads: rows, blocks or bytes, see each job.
// Every encoder gives the bits of the torch code beside its Python caller; what that code is needed for (numbers that are not
// finite, or so small or large that quotients overflow) is not encoded but reported.
#ifndef ANYBIT_ENCODE_H
#define ANYBIT_ENCODE_H

#include "grid.h"

enum anybit_encoder {
  ANYBIT_RANGES = 0,
  ANYBIT_INTEGERS = 1,
  ANYBIT_SMALL_FLOATS = 2,
  ANYBIT_TABLE_BLOCKS = 3,
  ANYBIT_PACK = 4,
  ANYBIT_UNPACK = 5,
  ANYBIT_SEARCH = 6,
  ANYBIT_INTO_BLOCKS = 7,
  ANYBIT_FROM_BLOCKS = 8,
  ANYBIT_TURN = 9,
  ANYBIT_SWAP_HALVES = 10,
  ANYBIT_DENSE = 11,
  ANYBIT_ENCODERS = 12,
};

// A matrix of floats whose rows are `stride` elements apart; each number is rounded to the kinds of `casts` first (-1: none).
struct anybit_source {
  const void* data;
  int64_t kind, rows, columns, stride;
  int64_t casts[2];
};

// Rows: the smallest and largest number of every `across` columns, [rows, ceil(columns / across)]; zeros lose their sign.
// `high` alone (low null): the largest magnitude. NaN where a block holds a number that is not finite.
struct anybit_ranges {
  struct anybit_source source;
  int64_t across;
  float* low;
  float* high;
};

// Rows: code = round((x - offset) / scale + zero), or the zero added after rounding; `multiply`: by the scale, not divided.
// Parameters [ceil(rows / down), ceil(columns / across)], zero and offset may be null. Each operation is rounded to
// `arithmetic`, codes lie between first and last and are packed.
struct anybit_integers {
  struct anybit_source source;
  int64_t down, across, arithmetic, multiply, zero_after, away, first, last, bits, row_bytes;
  const float* scale;
  const float* zero;
  const float* offset;
  uint8_t* codes;
};

// Rows: the nearest small float of x / scale (or x * scale), rounded to `quotient` first. A divisor of 0 gives 0.
// ties: 0 even, 1 away from zero, 2 towards zero. zeros: 0 signed, 1 below, 2 plain (minifloat.py).
struct anybit_small_floats {
  struct anybit_source source;
  int64_t down, across, multiply, quotient, exponent_bits, mantissa_bits, ties, zeros, bits, row_bytes;
  double top;
  const float* scale;
  uint8_t* codes;
};

// Blocks of `size` numbers (a multiple of 16) of a matrix of one row: the largest magnitude, and 4-bit codes of the nearest
// level of number / largest. `pairs`: byte of two places among the sorted levels.
struct anybit_table_blocks {
  struct anybit_source source;
  int64_t size;
  const float* middles;  // [15], ascending
  const uint8_t* pairs;  // [256]
  float* scales;
  uint8_t* codes;
};

// Rows: one byte a code <-> the canonical stream. `start`: first code that is unpacked.
struct anybit_packing {
  const uint8_t* from;
  uint8_t* to;
  int64_t columns, from_stride, to_stride, bits, start;
};

// Columns: words [rows, columns], rows `from_stride` apart -> [columns, rows].
struct anybit_turn {
  const uint32_t* from;
  uint32_t* to;
  int64_t rows, from_stride;
};

// Bytes: the low four bits become the high ones and the other way round.
struct anybit_swap_halves {
  const uint8_t* from;
  uint8_t* to;
};

// Rows of a matrix of numbers of `kind`: y [n, rows] = x [n, columns] @ W.T + bias, summed in float32. bias and y have its kind.
struct anybit_dense {
  const void* weight;
  const float* x;
  const void* bias;
  void* y;
  int64_t kind, rows, columns, n;
};

// A block type of GGUF. Fields as in _gguf_blocks.py.
enum anybit_block_type {
  ANYBIT_Q4_0 = 0, ANYBIT_Q4_1, ANYBIT_Q5_0, ANYBIT_Q5_1, ANYBIT_Q8_0, ANYBIT_Q2_K, ANYBIT_Q3_K, ANYBIT_Q4_K, ANYBIT_Q5_K,
  ANYBIT_Q6_K, ANYBIT_IQ4_NL, ANYBIT_IQ4_XS, ANYBIT_MXFP4, ANYBIT_TQ1_0, ANYBIT_TQ2_0,
};

struct anybit_fields {
  uint8_t* q;
  uint8_t* sc;
  uint8_t* mn;
  uint8_t* d;
  uint8_t* m;  // dmin of k-quants too
  uint8_t* fours;
};

// Rows: the fields that llama.cpp's rules give. importance [columns] or null. odd [rows]: 1 where the row was left alone.
struct anybit_search {
  struct anybit_source source;
  int64_t type;
  const float* importance;
  struct anybit_fields fields;
  uint8_t* odd;
};

// Blocks: fields <-> bytes as they are stored.
struct anybit_blocks {
  int64_t type;
  struct anybit_fields fields;
  uint8_t* blocks;
};

#endif
