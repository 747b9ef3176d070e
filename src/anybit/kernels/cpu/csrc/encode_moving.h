// Numbers that only change places: words of a matrix that is stored the other way round, and the halves of bytes.
#ifndef ANYBIT_ENCODE_MOVING_H
#define ANYBIT_ENCODE_MOVING_H

#include <string.h>

#include "encode.h"

namespace {

// Tiles of 16 x 16 words: sixteen whole cache lines in, sixteen out. Through a tile of its own, because the lines of `to` may
// all fall on one set of the cache. Strips of four tiles: four lines of a page are read while its address is known.
void encode_turn(void* data, int64_t first, int64_t last) {
  const anybit_turn* job = static_cast<const anybit_turn*>(data);
  constexpr int64_t SIDE = 16, STRIP = 4 * SIDE;
  uint32_t tile[SIDE][SIDE];
  for (int64_t strip = first; strip < last; strip += STRIP) {
    const int64_t end = strip + STRIP < last ? strip + STRIP : last;
    for (int64_t row = 0; row < job->rows; row += SIDE) {
      const int64_t down = job->rows - row < SIDE ? job->rows - row : SIDE;
      for (int64_t column = strip; column < end; column += SIDE) {
        const int64_t across = end - column < SIDE ? end - column : SIDE;
        const uint32_t* from = job->from + row * job->from_stride + column;
        uint32_t* to = job->to + column * job->rows + row;
        if (down == SIDE && across == SIDE) {
          for (int64_t i = 0; i < SIDE; i++)
            for (int64_t j = 0; j < SIDE; j++) tile[j][i] = from[i * job->from_stride + j];
          for (int64_t j = 0; j < SIDE; j++) memcpy(to + j * job->rows, tile[j], sizeof tile[j]);
          continue;
        }
        for (int64_t i = 0; i < down; i++)
          for (int64_t j = 0; j < across; j++) to[j * job->rows + i] = from[i * job->from_stride + j];
      }
    }
  }
}

void encode_swap_halves(void* data, int64_t first, int64_t last) {
  const anybit_swap_halves* job = static_cast<const anybit_swap_halves*>(data);
  const uint8_t* from = job->from;
  uint8_t* to = job->to;
  for (int64_t i = first; i < last; i++) to[i] = (uint8_t)(from[i] >> 4 | from[i] << 4);
}

}  // namespace

#endif
