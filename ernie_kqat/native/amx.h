// The sums of a block of bytes in the tile registers of AMX: 16 rows x 16 columns x 64 values an instruction. Included by the
// kernels when they are compiled for it.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace ernie_kqat {
namespace {

constexpr int TILE_ROWS = 16, TILE_BYTES = 64;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// All eight tiles in full size. In static memory: GCC takes the instruction to read 8 bytes of it and drops the other stores.
void begin() {
  static const TileConfig config;
  _tile_loadconfig(&config);
}

void end() { _tile_release(); }

// to[16][blocks x 16] = a[16][depth x 32] . b in bfloat16: `b` has a tile for each block of 16 columns, `next` values from one to
// the next, and for each step of depth; every third step is followed by `gap` values. `stride`: pairs of a row of `a`; `line`:
// values of a row of `to`.
void products(const int32_t* a, int stride, const int32_t* b, int depth, int next, int gap, float* to, int line, int blocks) {
  constexpr int TILE_PAIRS = TILE_ROWS * LANES;
#if defined(__SANITIZE_ADDRESS__)  // which does not see what tile registers read and write
  volatile float seen = a[(TILE_ROWS - 1) * stride + depth * LANES - 1];
  seen = b[(blocks - 1) * next + depth * TILE_PAIRS + (depth / 3 - 1) * gap - 1];
  to[(TILE_ROWS - 1) * line + blocks * LANES - 1] = seen;
#endif
  for (int block = 0; block < blocks; block += 2) {
    const int32_t* tile = b + block * next;
    const bool two = block + 1 < blocks;
    _tile_zero(0);
    _tile_zero(1);
    for (int at = 0; at < depth; at++, tile += at % 3 ? TILE_PAIRS : TILE_PAIRS + gap) {
      _tile_loadd(4, a + at * LANES, stride * 4);
      _tile_loadd(6, tile, TILE_BYTES);
      _tile_dpbf16ps(0, 4, 6);
      if (two) {
        _tile_loadd(7, tile + next, TILE_BYTES);
        _tile_dpbf16ps(1, 4, 7);
      }
    }
    _tile_stored(0, to + block * LANES, line * 4);
    if (two) _tile_stored(1, to + (block + 1) * LANES, line * 4);
  }
}

// Sums in tiles 0 to 3, from the first step to `store`: 32 rows x 2 panels, or 16 rows x 4 panels.
class Sums {
 public:
  Sums(const uint8_t* rows, int stride, int, const int8_t* panel, int in, int panels)
      : rows_(rows), panel_(panel), stride_(stride), next_(int64_t(in) * LANES), wide_(panels == 4) {
#if defined(__SANITIZE_ADDRESS__)  // which does not see what tile registers read
    const int lines = wide_ ? TILE_ROWS : 2 * TILE_ROWS;
    for (int line = 0; line < lines; line++) seen_ = rows[line * int64_t(stride)] + rows[line * int64_t(stride) + in - 1];
    seen_ = panel[0] + panel[next_ * panels - 1];
#endif
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }

  INLINE_METHOD void step(int at) const {
    const uint8_t* rows = rows_ + at;
    const int8_t* weights = panel_ + at * LANES;
    _tile_loadd(4, rows, stride_);
    _tile_loadd(6, weights, TILE_BYTES);
    _tile_dpbusd(0, 4, 6);
    _tile_loadd(7, weights + next_, TILE_BYTES);
    _tile_dpbusd(1, 4, 7);
    if (wide_) {
      _tile_loadd(6, weights + 2 * next_, TILE_BYTES);
      _tile_dpbusd(2, 4, 6);
      _tile_loadd(7, weights + 3 * next_, TILE_BYTES);
      _tile_dpbusd(3, 4, 7);
    } else {
      _tile_loadd(5, rows + TILE_ROWS * int64_t(stride_), stride_);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
  }

  void store(int32_t* tile) const {
    if (wide_) {
      constexpr int LINE = 4 * TILE_BYTES;
      _tile_stored(0, tile, LINE);
      _tile_stored(1, tile + LANES, LINE);
      _tile_stored(2, tile + 2 * LANES, LINE);
      _tile_stored(3, tile + 3 * LANES, LINE);
    } else {
      constexpr int LINE = 2 * TILE_BYTES;
      _tile_stored(0, tile, LINE);
      _tile_stored(1, tile + LANES, LINE);
      _tile_stored(2, tile + TILE_ROWS * 2 * LANES, LINE);
      _tile_stored(3, tile + TILE_ROWS * 2 * LANES + LANES, LINE);
    }
  }

 private:
  const uint8_t* rows_;
  const int8_t* panel_;
  const int stride_;
  const int64_t next_;
  const bool wide_;
#if defined(__SANITIZE_ADDRESS__)
  volatile int seen_;
#endif
};

}  // namespace
}  // namespace ernie_kqat
