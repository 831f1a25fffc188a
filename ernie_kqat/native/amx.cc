// The sums of a block of an INT8 product in the tile registers of AMX: 16 rows x 16 columns x 64 values an instruction.
#include <immintrin.h>



#include "kernels.h"

namespace ernie_kqat {
namespace {

constexpr int TILE_ROWS = 16, TILE_BYTES = 64, PANEL_TILE = TILE_ROWS * TILE_BYTES;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Two tiles of rows times two panels: sums in tiles 0 to 3.
void square(const uint8_t* rows, int stride, const int8_t* panel, int in, int32_t* tile) {
  const uint8_t* below = rows + int64_t(TILE_ROWS) * stride;
  const int8_t* beside = panel + int64_t(in) * LANES;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int at = 0; at < in; at += TILE_BYTES) {
    _tile_loadd(4, rows + at, stride);
    _tile_loadd(6, panel + at * LANES, TILE_BYTES);
    _tile_loadd(5, below + at, stride);
    _tile_loadd(7, beside + at * LANES, TILE_BYTES);
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  constexpr int LINE = 2 * TILE_BYTES;  // bytes
  _tile_stored(0, tile, LINE);
  _tile_stored(1, tile + LANES, LINE);
  _tile_stored(2, tile + TILE_ROWS * 2 * LANES, LINE);
  _tile_stored(3, tile + TILE_ROWS * 2 * LANES + LANES, LINE);
}

// One tile of rows times four panels.
void wide(const uint8_t* rows, int stride, const int8_t* panel, int in, int32_t* tile) {
  const int64_t next = int64_t(in) * LANES;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int at = 0; at < in; at += TILE_BYTES) {
    const int8_t* weights = panel + at * LANES;
    _tile_loadd(4, rows + at, stride);
    _tile_loadd(5, weights, TILE_BYTES);
    _tile_loadd(6, weights + next, TILE_BYTES);
    _tile_dpbusd(0, 4, 5);
    _tile_loadd(7, weights + 2 * next, TILE_BYTES);
    _tile_dpbusd(1, 4, 6);
    _tile_loadd(5, weights + 3 * next, TILE_BYTES);
    _tile_dpbusd(2, 4, 7);
    _tile_dpbusd(3, 4, 5);
  }
  constexpr int LINE = 4 * TILE_BYTES;
  _tile_stored(0, tile, LINE);
  _tile_stored(1, tile + LANES, LINE);
  _tile_stored(2, tile + 2 * LANES, LINE);
  _tile_stored(3, tile + 3 * LANES, LINE);
}

void accumulate(const uint8_t* rows, int stride, int count, const int8_t* panel, int in, int panels, int32_t* tile) {
  if (panels == 4)
    wide(rows, stride, panel, in, tile);
  else
    square(rows, stride, panel, in, tile);
}

}  // namespace

Accumulate amx_accumulate() { return accumulate; }

// All eight tiles in full size. In static memory: GCC takes the instruction to read 8 bytes of it and drops the other stores.
void amx_begin() {
  static const TileConfig config;
  _tile_loadconfig(&config);
}

void amx_end() { _tile_release(); }

}  // namespace ernie_kqat
