// The functions Python calls: choose a variant, prepare the inputs once, share the rows of the weight among threads.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <thread>

#include "encode_variant.h"
#include "threads.h"
#include "variant.h"

#ifdef _WIN32
#define EXPORT extern "C" __declspec(dllexport)
#include <malloc.h>
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

// A weight where it lies, and what its products are done with: `Place` of native.py.
struct anybit_bound {
  const anybit_shape* shape;
  const anybit_tensors* tensors;
  const void* bias;
  int64_t bias_kind, fast, many;

  anybit_product product_of(const void* x, int64_t kind, int64_t n, int64_t x_row, int64_t x_column, void* y) const {
    return {x, kind, n, x_row, x_column, bias, bias_kind, y, kind, shape->rows, 0, fast};
  }
};

namespace {

struct Level {
  const char* name;
  const Variant* grids;
  const Variant* books;
  bool (*runs_here)();
};

bool always() { return true; }
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // every such CPU has F16C too
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512vbmi() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

// Slowest first. A variant the compiler could not build is not in the list.
const Level LEVELS[] = {
    {"scalar", &anybit_variant_scalar, &anybit_books_scalar, always},
#ifdef ANYBIT_WITH_NEON
    {"neon", &anybit_variant_neon, &anybit_books_neon, always},
#endif
#ifdef ANYBIT_WITH_AVX2
    {"avx2", &anybit_variant_avx2, &anybit_books_avx2, has_avx2},
#endif
#ifdef ANYBIT_WITH_AVX512
    {"avx512", &anybit_variant_avx512, &anybit_books_avx512, has_avx512},
#endif
#ifdef ANYBIT_WITH_AVX512VBMI
    {"avx512vbmi", &anybit_variant_avx512vbmi, &anybit_books_avx512vbmi, has_avx512vbmi},
#endif
};
const int LEVEL_COUNT = sizeof LEVELS / sizeof LEVELS[0];

const Level* current = LEVELS;

const Variant* variant_of(const anybit_shape* shape) {
  return shape->levels == ANYBIT_VECTORS ? current->books : current->grids;
}

// Scratch of the calling thread; grows, and is given back when the thread ends.
struct Scratch {
  float* data = nullptr;
  size_t capacity = 0;
  float* need(size_t floats) {
    if (floats > capacity) {
      release();
#ifdef _WIN32
      data = static_cast<float*>(_aligned_malloc(floats * sizeof(float), 64));
#else
      void* found = nullptr;
      data = posix_memalign(&found, 64, floats * sizeof(float)) == 0 ? static_cast<float*>(found) : nullptr;
#endif
      capacity = data ? floats : 0;
    }
    return data;
  }
  void release() {
#ifdef _WIN32
    _aligned_free(data);
#else
    free(data);
#endif
    data = nullptr;
    capacity = 0;
  }
  ~Scratch() { release(); }
};
thread_local Scratch scratch;       // of the thread that calls: inputs
thread_local Scratch block_scratch;  // of every thread that multiplies blocks

struct Call {
  const anybit_shape* shape;
  const anybit_tensors* tensors;
  const anybit_product* product;
  const Variant* variant;
  Input input;
};

struct Blocks {
  Call call;
  int64_t scratch;            // floats
  std::atomic<int64_t> lost;  // threads that found no memory
};

void take_block_inputs(void* data, int64_t first, int64_t last) {
  const Call& call = static_cast<const Blocks*>(data)->call;
  for (int64_t n = first; n < last; n++)
    call.variant->take_block_input(call.shape, call.tensors, call.product, n, const_cast<float*>(call.input.values));
}

void multiply_blocks(void* data, int64_t first, int64_t last) {
  Blocks* blocks = static_cast<Blocks*>(data);
  const Call& call = blocks->call;
  float* space = block_scratch.need(static_cast<size_t>(blocks->scratch));
  if (!space) {
    blocks->lost++;
    return;
  }
  for (int64_t block = first; block < last; block++)
    call.variant->multiply_many(call.shape, call.tensors, call.product, &call.input, block * call.variant->tall, space);
}

const int64_t SMALL = 1 << 17;  // products of fewer multiplications are not worth waking a second thread

// A product with few rows of x, one launch: each thread prepares rows of x as long as there are any, then takes rows of the weight.
struct Launch {
  Call call;
  std::atomic<int64_t> taken, prepared;  // rows of x
  Pieces rows;                           // of the weight
};

void rest() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  __builtin_ia32_pause();
#elif defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
  __asm__ __volatile__("yield");
#endif
}

void work_on(void* data) {
  Launch* launch = static_cast<Launch*>(data);
  const Call& call = launch->call;
  const int64_t inputs = call.product->n;
  for (int64_t n; (n = launch->taken.fetch_add(1, std::memory_order_relaxed)) < inputs;) {
    call.variant->take_input(call.shape, call.tensors, call.product, n,
                             const_cast<float*>(call.input.values) + n * call.input.value_stride,
                             const_cast<float*>(call.input.sums) + n * call.input.sum_stride);
    launch->prepared.fetch_add(1, std::memory_order_release);
  }
  for (int64_t turn = 1; launch->prepared.load(std::memory_order_acquire) < inputs; turn++) {
    if (turn % 1024) rest();
    else std::this_thread::yield();  // whoever prepares may have lost its core to a neighbour
  }
  for (int64_t first, last; launch->rows.take(&first, &last);)
    call.variant->multiply(call.shape, call.tensors, call.product, &call.input, first, last);
}

int64_t multiply_few(const Call& call, int64_t threads) {
  const int64_t n = call.product->n, rows = call.shape->rows, grain = 16 * call.shape->high;
  const int64_t useful = n * call.shape->columns * rows < SMALL ? 1 : (rows + grain - 1) / grain;
  if (threads > useful) threads = useful;
  Launch launch = {call, {0}, {0}, {rows, grain, threads, {0}}};
  if (threads <= 1) launch.rows.grain = rows + 1, launch.rows.threads = 1;  // in one piece
  Input& input = launch.call.input;
  call.variant->sizes(call.shape, call.tensors, call.product, &input.value_stride, &input.sum_stride);
  float* space = scratch.need(static_cast<size_t>((input.value_stride + input.sum_stride) * n));
  if (!space) return 1;
  input.values = space;
  input.sums = space + input.value_stride * n;
  anybit_together(threads, work_on, &launch);
  return 0;
}

struct Decoding {
  const anybit_shape* shape;
  const anybit_tensors* tensors;
  const Variant* variant;
  const int64_t* rows;
  int64_t first;
  char* out;
  int64_t out_kind, out_bytes;
};

void decode_rows(void* data, int64_t first, int64_t last) {
  const Decoding* d = static_cast<const Decoding*>(data);
  for (int64_t i = first; i < last; i++)
    d->variant->decode(d->shape, d->tensors, d->rows ? d->rows[i] : d->first + i, d->out + i * d->out_bytes, d->out_kind);
}

}  // namespace

// Changes whenever grid.h, encode.h or a signature below does; native.py refuses a library of another number.
EXPORT int64_t anybit_abi(void) { return 10; }

// Names of the levels this machine runs, slowest first: writes up to `room` pointers, returns how many there are.
EXPORT int64_t anybit_levels(const char** names, int64_t room) {
  int64_t found = 0;
  for (int i = 0; i < LEVEL_COUNT; i++)
    if (LEVELS[i].runs_here() && found < room) names[found++] = LEVELS[i].name;
  return found;
}

// Choose a level by name; 0 if it is unknown or does not run here.
EXPORT int64_t anybit_use_level(const char* name) {
  for (int i = 0; i < LEVEL_COUNT; i++)
    if (strcmp(LEVELS[i].name, name) == 0 && LEVELS[i].runs_here()) {
      current = &LEVELS[i];
      anybit_use_encoders(name);
      return 1;
    }
  return 0;
}

// y = x @ W.T. Returns 0, or 1 when there is no memory for the scratch. From `many` rows of x on the weight is decoded once.
EXPORT int64_t anybit_linear(const anybit_shape* shape, const anybit_tensors* tensors, const anybit_product* product,
                             int64_t many, int64_t threads) {
  const Call call = {shape, tensors, product, variant_of(shape), {}};
  if (product->n < many) return multiply_few(call, threads);
  Blocks all = {call, 0, {0}};
  int64_t words = 0;
  call.variant->block_sizes(shape, tensors, product, &words, &all.scratch);
  float* space = scratch.need(static_cast<size_t>(words * product->n));
  if (!space) return 1;
  all.call.input = {space, nullptr, words, 0};
  const int64_t inputs = product->n * shape->columns;
  anybit_parallel(product->n, 1, inputs < SMALL ? 1 : threads, take_block_inputs, &all);
  const int64_t blocks = (shape->rows + call.variant->tall - 1) / call.variant->tall;
  anybit_parallel(blocks, 1, inputs * shape->rows < SMALL ? 1 : threads, multiply_blocks, &all);
  return all.lost != 0;
}

// The same with the places of a weight given once. y [n, rows] is contiguous and of x's kind, as every other of `kind`.
EXPORT int64_t anybit_linear_bound(const anybit_bound* bound, const void* x, int64_t kind, int64_t n, int64_t x_row,
                                   int64_t x_column, void* y, int64_t threads) {
  const anybit_product product = bound->product_of(x, kind, n, x_row, x_column, y);
  return anybit_linear(bound->shape, bound->tensors, &product, bound->many, threads);
}

// The same for a stack: expert e owns rows ends[e - 1] .. ends[e] of x and y. `strides`: bytes from one expert to the next of
// every pointer in `tensors`. Experts without rows are not touched.
EXPORT int64_t anybit_linear_experts(const anybit_shape* shape, const anybit_tensors* tensors, const int64_t* strides,
                                     const anybit_product* product, const int64_t* ends, int64_t experts, int64_t many,
                                     int64_t threads) {
  constexpr int64_t pointers = sizeof(anybit_tensors) / sizeof(void*);
  int64_t start = 0;
  for (int64_t expert = 0; expert < experts; start = ends[expert++]) {
    if (ends[expert] <= start) continue;
    const char* own[pointers];
    memcpy(own, tensors, sizeof own);
    for (int64_t i = 0; i < pointers; i++)
      if (own[i]) own[i] += expert * strides[i];
    anybit_tensors one;
    memcpy(&one, own, sizeof one);
    anybit_product part = *product;
    part.n = ends[expert] - start;
    part.x = static_cast<const char*>(product->x) + start * product->x_row * (product->x_kind == ANYBIT_F32 ? 4 : 2);
    part.y = static_cast<char*>(product->y) + start * product->y_row * (product->y_kind == ANYBIT_F32 ? 4 : 2);
    if (int64_t failed = anybit_linear(shape, &one, &part, many, threads)) return failed;
  }
  return 0;
}

// Rows of the weight in the order of the codes: `rows` [count] or, if null, first .. first + count.
EXPORT void anybit_decode(const anybit_shape* shape, const anybit_tensors* tensors, const int64_t* rows, int64_t first,
                          int64_t count, void* out, int64_t out_kind, int64_t out_stride, int64_t threads) {
  Decoding decoding = {shape, tensors, variant_of(shape), rows, first, static_cast<char*>(out), out_kind,
                       out_stride * (out_kind == ANYBIT_F32 ? 4 : 2)};
  anybit_parallel(count, 1, count * shape->columns < SMALL ? 1 : threads, decode_rows, &decoding);
}
