// Every level of the library against the scalar one, over random grids and codebooks. Built and run by native_levels.sh.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>

#include "grid.h"

extern "C" {
int64_t anybit_levels(const char** names, int64_t room);
int64_t anybit_use_level(const char* name);
int64_t anybit_linear(const anybit_shape*, const anybit_tensors*, const anybit_product*, int64_t many, int64_t threads);
void anybit_decode(const anybit_shape*, const anybit_tensors*, const int64_t*, int64_t, int64_t, void*, int64_t, int64_t, int64_t);
}

static uint64_t state = 1;
static uint32_t draw(uint32_t below) {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return (uint32_t)(state >> 33) % below;
}
static float number() { return (float)draw(2001) / 1000.0f - 1.0f; }

int main() {
  const char* names[16];
  const int64_t levels = anybit_levels(names, 16);
  int64_t checked = 0, wrong = 0;
  for (int trial = 0; trial < 1500; trial++) {
    anybit_shape s;
    memset(&s, 0, sizeof s);
    const bool book = trial % 3 == 0;
    const int64_t wides[] = {1, 2, 4, 8, 16}, groups[] = {8, 16, 24, 32, 64, 128, 4096};
    s.bits = 1 + draw(book ? 12 : 8);
    s.high = 1, s.wide = 1, s.books = 1;
    if (book) {
      if (draw(3) == 0) s.high = 1 + draw(16); else s.wide = wides[draw(5)];
      s.books = 1 + draw(3), s.levels = ANYBIT_VECTORS, s.entries = 1 << s.bits;
      s.table_kind = draw(3);
    } else {
      s.levels = draw(3);
      if (s.bits == 8 && draw(2)) s.levels = draw(2) ? ANYBIT_E4M3 : ANYBIT_E5M2;
      s.compute = draw(4) == 0 ? 1 + draw(2) : 0;
    }
    s.rows = s.high * (1 + draw(40)), s.columns = s.wide * (1 + draw(600 / s.wide));
    s.group = book && s.high > 1 ? 4096 : groups[draw(7)];
    if (s.group % s.wide) s.group = 4096;
    if (s.group >= s.columns) s.group = s.columns;
    if (book && s.high == 1 && s.wide <= 8 && draw(2)) s.books = 1, s.sign_bits = draw(2) ? 7 : 1;
    s.sign_bytes = s.sign_bits == 7 ? ((s.columns + 7) / 8 * 7 + 7) / 8 : (s.columns + 7) / 8;
    s.row_bytes = (s.columns / s.wide * s.books * s.bits + 7) / 8;
    const int64_t across = (s.columns + s.group - 1) / s.group;
    const bool nested = draw(3) == 0 && across % 8 == 0;
    s.scale.kind = nested ? (int64_t)ANYBIT_P_NESTED : 1 + draw(3), s.scale.down = 1, s.scale.row_stride = s.scale.width = across;
    s.scale.bits = 1 + draw(8), s.scale.levels = draw(3), s.scale.group = 8 << draw(3), s.scale.count = s.rows * across;
    s.scale.scale_kind = ANYBIT_P_F32;
    s.zero = s.offset = s.scale;
    if (draw(2)) s.zero.kind = ANYBIT_ABSENT; else s.zero.kind = ANYBIT_P_U8;
    s.offset.kind = ANYBIT_ABSENT;
    std::vector<uint8_t> signs(s.rows * s.sign_bytes);
    for (auto& byte : signs) byte = (uint8_t)draw(256);
    std::vector<uint8_t> codes(s.rows / s.high * s.row_bytes), scale_codes((s.rows * across * s.scale.bits + 7) / 8), zeros(s.rows * across);
    for (auto& byte : codes) byte = (uint8_t)(s.levels == ANYBIT_E4M3 ? draw(0x7F) : s.levels == ANYBIT_E5M2 ? draw(0x70) : draw(256));
    for (auto& byte : scale_codes) byte = (uint8_t)draw(256);
    for (auto& byte : zeros) byte = (uint8_t)draw(1 << (s.bits > 8 ? 8 : s.bits));
    const size_t entries = book ? s.books * s.entries * s.high * s.wide + 8 : 1 << s.bits;
    std::vector<float> table(entries), scales(s.rows * across), inner(s.rows * across), levels_of_scales(256);
    std::vector<uint16_t> halves(entries), half_scales(s.rows * across);
    for (auto& one : table) one = number();
    for (auto& one : halves) one = (uint16_t)(s.table_kind == ANYBIT_BF16 ? 0x3F00 + draw(0x80) : 0x3800 + draw(0x400)) | draw(2) << 15;
    for (auto& one : scales) one = 0.01f + 0.001f * draw(20);
    for (auto& one : half_scales) one = (uint16_t)(s.scale.kind == ANYBIT_P_BF16 ? 0x3C00 + draw(0x100) : 0x2000 + draw(0x400));
    for (auto& one : inner) one = 0.01f + 0.001f * draw(20);
    for (auto& one : levels_of_scales) one = number();
    anybit_tensors t;
    memset(&t, 0, sizeof t);
    t.codes = codes.data();
    t.table = book && s.table_kind != ANYBIT_F32 ? (const float*)halves.data() : table.data();
    t.scale = nested ? (const void*)scale_codes.data() : s.scale.kind == ANYBIT_P_F32 ? (const void*)scales.data() : half_scales.data();
    t.zero = zeros.data();
    t.signs = signs.data();
    t.nested[0] = {levels_of_scales.data(), inner.data(), nullptr};
    const int64_t counts[] = {1, 2, 5, 33};
    const int64_t n = counts[draw(4)], kind = draw(2);
    std::vector<float> x(n * s.columns);
    std::vector<uint16_t> short_x(n * s.columns);
    for (size_t i = 0; i < x.size(); i++) {
      x[i] = number();
      uint32_t bits;
      memcpy(&bits, &x[i], 4);
      short_x[i] = (uint16_t)(bits >> 16);
    }
    std::vector<float> wanted, dense;
    double largest = 0;
    for (int64_t level = 0; level < levels; level++) {
      if (!anybit_use_level(names[level])) return 2;
      std::vector<float> y(n * s.rows), own(s.rows * s.columns);
      anybit_product p = {kind ? (const void*)short_x.data() : x.data(), kind, n, s.columns, 1, nullptr, 0, y.data(), 0, s.rows, 0, 0};
      if (anybit_linear(&s, &t, &p, 28, 1)) return 3;
      anybit_decode(&s, &t, nullptr, 0, s.rows, own.data(), 0, s.columns, 1);
      if (level == 0) {
        wanted = y, dense = own;
        for (float one : wanted) largest = fabs(one) > largest ? fabs(one) : largest;
        double top = 0;  // a zero point is taken from sums as large as the codes
        for (float one : x) top += fabs(one);
        largest += (1 << (s.bits > 8 ? 0 : s.bits)) * 0.03 * top / n * 0.1;
        continue;
      }
      checked++;
      for (size_t i = 0; i < own.size(); i++)
        if (!(own[i] == dense[i])) {
          wrong++;
          printf("%s trial %d: weight %zu is %g, scalar %g (bits %d levels %d wide %d high %d group %d)\n", names[level], trial, i, own[i],
                 dense[i], (int)s.bits, (int)s.levels, (int)s.wide, (int)s.high, (int)s.group);
          break;
        }
      const double limit = (kind ? 1.0 / 256 : 2e-5) * largest;
      for (size_t i = 0; i < y.size(); i++)
        if (!(fabs((double)y[i] - wanted[i]) <= limit)) {
          wrong++;
          printf("%s trial %d: product %zu is %g, scalar %g (bits %d levels %d wide %d high %d group %d n %d compute %d)\n", names[level],
                 trial, i, y[i], wanted[i], (int)s.bits, (int)s.levels, (int)s.wide, (int)s.high, (int)s.group, (int)n, (int)s.compute);
          break;
        }
    }
  }
  printf("%d comparisons, %d wrong, levels:", (int)checked, (int)wrong);
  for (int64_t level = 0; level < levels; level++) printf(" %s", names[level]);
  printf("\n");
  return wrong != 0;
}
