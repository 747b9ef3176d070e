// Scales, zeros and offsets of a grid, as they are stored, made into float32: a run of groups of one row at a time.
#ifndef ANYBIT_GRID_PARAMETERS_H
#define ANYBIT_GRID_PARAMETERS_H

namespace {

static constexpr int64_t RUN = 256;  // groups of a row read at a time
static constexpr int64_t TOGETHER = 4 * RUN;  // and of several rows

struct Parameter {
  const anybit_parameter* p;
  const void* data;
  const anybit_nested* nested;
  int64_t row, total;  // offset of this weight row's values; all there are
};

static inline Parameter parameter_at(const anybit_parameter* p, const void* data, const anybit_nested* nested, int64_t row,
                                     int64_t rows) {
  if (p->kind == ANYBIT_ABSENT) return {p, data, nested, 0, 0};
  const int64_t down = p->down;  // mostly one, and division is slow
  const int64_t block = down == 1 ? row : row / down, last = down == 1 ? rows - 1 : (rows - 1) / down;
  return {p, data, nested, block * p->row_stride, last * p->row_stride + p->width};
}

static ALWAYS_INLINE F numbers_at(int64_t kind, const void* data, int64_t at) {
  switch (kind) {
    case ANYBIT_P_BF16: return f_load_bf16((const uint16_t*)data + at);
    case ANYBIT_P_F16: return f_load_f16((const uint16_t*)data + at);
    case ANYBIT_P_U8: return f_load_u8((const uint8_t*)data + at);
    case ANYBIT_P_I8: return f_load_i8((const uint8_t*)data + at);
    case ANYBIT_P_E8M0: return f_load_e8m0((const uint8_t*)data + at);
    default: return f_load((const float*)data + at);
  }
}

// The numbers that the next rows will want lie behind these: few bytes a row, fetched too late by themselves.
static inline void prefetch_next(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) prefetch(p + bytes + i);
}

static inline int64_t bytes_of(int64_t kind) { return kind == ANYBIT_P_F32 ? 4 : kind == ANYBIT_P_BF16 || kind == ANYBIT_P_F16 ? 2 : 1; }

// `count` of `total` numbers from `at` on as float32; writes up to LANES beyond them.
static void numbers_run(int64_t kind, int64_t negated, const void* data, int64_t at, int64_t count, int64_t total, float* out) {
  const int64_t whole = total - at >= ceil_div(count, LANES) * LANES ? count : count / LANES * LANES;
  int64_t i = 0;
  prefetch_next((const uint8_t*)data + at * bytes_of(kind), count * bytes_of(kind));
  switch (kind) {
    case ANYBIT_P_F32: for (; i < whole; i += LANES) f_store(out + i, f_load((const float*)data + at + i)); break;
    case ANYBIT_P_BF16: for (; i < whole; i += LANES) f_store(out + i, f_load_bf16((const uint16_t*)data + at + i)); break;
    case ANYBIT_P_F16: for (; i < whole; i += LANES) f_store(out + i, f_load_f16((const uint16_t*)data + at + i)); break;
    case ANYBIT_P_U8: for (; i < whole; i += LANES) f_store(out + i, f_load_u8((const uint8_t*)data + at + i)); break;
    case ANYBIT_P_I8: for (; i < whole; i += LANES) f_store(out + i, f_load_i8((const uint8_t*)data + at + i)); break;
    case ANYBIT_P_E8M0: for (; i < whole; i += LANES) f_store(out + i, f_load_e8m0((const uint8_t*)data + at + i)); break;
  }
  for (; i < count; i++) out[i] = read_number(kind, 0, data, at + i);
  if (negated)
    for (i = 0; i < count; i += LANES) f_store(out + i, f_sub(f_zero(), f_load(out + i)));
}

// --- nested ---------------------------------------------------------------------------------------------------------------

enum NestedKind { NESTED_INTEGER, NESTED_TABLE, NESTED_E4M3 };

template <int BITS, int KIND>
static ALWAYS_INLINE F nested_levels(bool is_signed, const float* table, const Lut& lut, const uint8_t* from) {
  if constexpr (KIND == NESTED_E4M3) return f_load_e4m3(from);
  if constexpr (KIND == NESTED_TABLE && BITS <= 4) return lut_take(lut, codes_load<BITS>(from));
  I codes;
  if constexpr (BITS == 8) codes = i_load_u8(from);
  else codes = i_and(codes_load<BITS>(from), i_set((1u << BITS) - 1));
  if constexpr (KIND == NESTED_TABLE) return f_gather(table, codes);
  if (!is_signed) return f_of_integers(codes);
  return f_sub(f_of_integers(i_xor(codes, 1u << (BITS - 1))), f_set((float)(1 << (BITS - 1))));
}

template <int BITS, int KIND> static void nested_run(const Parameter& q, int64_t first, int64_t count, float* out) {
  const anybit_parameter* p = q.p;
  const uint8_t* codes = (const uint8_t*)q.data;
  const uint8_t* end = codes + (p->count * BITS + 7) / 8;
  const bool is_signed = p->levels == ANYBIT_SIGNED, has_offset = p->offset_kind != ANYBIT_ABSENT;
  alignas(64) float numbers[16] = {0};  // a small table, again and again
  if (KIND == NESTED_TABLE && BITS <= 4)
    for (int i = 0; i < 16; i++) numbers[i] = q.nested->table[i % (1 << BITS)];
  const Lut lut = lut_load(numbers);
  const F offset = f_set(has_offset ? read_number(p->offset_kind, 0, q.nested->offset, 0) : 0.0f);
  const int64_t start = q.row + first, stop = start + count;
  // vectors before this one may read 16 bytes where they are
  const int64_t safe = end - codes < 16 ? 0 : ((end - codes - 16) * 8 / BITS) + 1;
  const auto put = [&](int64_t at, F scale) {
    const uint8_t* from = codes + at * BITS / 8;
    uint8_t spare[16];
    if (at >= safe) {
      memset(spare, 0, 16);
      memcpy(spare, from, (size_t)(end - from));
      from = spare;
    }
    F value = f_mul(nested_levels<BITS, KIND>(is_signed, q.nested->table, lut, from), scale);
    f_store(out + at - start, has_offset ? f_add(value, offset) : value);
  };
  const int64_t group = p->group > p->count ? p->count : p->group, all = ceil_div(p->count, group), g = start / group;
  alignas(64) float scales[(TOGETHER + 8) / 8 + 3 * LANES];
  prefetch_next(codes + start * BITS / 8, count * BITS / 8);
  numbers_run(p->scale_kind, p->scale_negated, q.nested->scale, g, (stop - 1) / group + 1 - g, all, scales);
  if (group == 8 && LANES == 16) {  // two groups in a vector
    alignas(64) static constexpr uint32_t halves[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
    const I pair = i_load(halves);
    const float* own = scales;
    for (int64_t at = start; at < stop; at += LANES, own += 2) put(at, f_permute(f_load(own), pair));
    return;
  }
  const float* own = scales;
  for (int64_t at = start, next = (g + 1) * group; at < stop; own++, next += group) {
    const F scale = f_set(*own);
    const int64_t last = least(stop, next);
    for (; at < last; at += LANES) put(at, scale);
    at = last;
  }
}

typedef void (*NestedRun)(const Parameter&, int64_t, int64_t, float*);
static const NestedRun NESTED_INTEGERS[9] = {nullptr,          nested_run<1, 0>, nested_run<2, 0>, nested_run<3, 0>, nested_run<4, 0>,
                                             nested_run<5, 0>, nested_run<6, 0>, nested_run<7, 0>, nested_run<8, 0>};
static const NestedRun NESTED_TABLES[9] = {nullptr,          nested_run<1, 1>, nested_run<2, 1>, nested_run<3, 1>, nested_run<4, 1>,
                                           nested_run<5, 1>, nested_run<6, 1>, nested_run<7, 1>, nested_run<8, 1>};

// --- runs -----------------------------------------------------------------------------------------------------------------

// `count` values of the groups from `first` on as float32, and LANES more that may be read: copies of the last. Writes up to
// 2 * LANES beyond `count`.
static NOINLINE void run_of(const Parameter& q, int64_t first, int64_t count, float* out) {
  const anybit_parameter* p = q.p;
  if (p->kind == ANYBIT_P_NESTED) {
    const int64_t from = p->width == 1 ? 0 : first, wanted = p->width == 1 ? 1 : count;
    const NestedRun read = p->levels == ANYBIT_E4M3    ? nested_run<8, NESTED_E4M3>
                           : p->levels == ANYBIT_TABLE ? NESTED_TABLES[p->bits]
                                                       : NESTED_INTEGERS[p->bits];
    const int64_t before = (q.row + from) % 8;  // codes start on bytes, groups on multiples of eight
    if (before) {
      float some[8 + RUN + 3 * LANES];
      read(q, from - before, wanted + before, some);
      memcpy(out, some + before, (size_t)wanted * sizeof(float));
    } else {
      read(q, from, wanted, out);
    }
    const F last = f_set(out[wanted - 1]);
    for (int64_t i = wanted; i < count + LANES; i += LANES) f_store(out + i, last);
    return;
  }
  if (p->width == 1) {
    const F value = f_set(read_number(p->kind, p->negated, q.data, q.row));
    for (int64_t i = 0; i < count + LANES; i += LANES) f_store(out + i, value);
    return;
  }
  numbers_run(p->kind, p->negated, q.data, q.row + first, count, q.total, out);
  f_store(out + count, f_set(out[count - 1]));
}

}  // namespace

#endif
