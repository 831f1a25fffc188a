// AMX's tile registers as memory, for tests on CPUs that have none: included before the sources, in place of the instructions.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace tiles_in_memory {

constexpr int ROWS = 16, BYTES = 64;
struct Tile {
  uint8_t bytes[ROWS][BYTES];
};
inline thread_local Tile tiles[8];

template <class T>
T at(int tile, int row, int index) {
  T value;
  std::memcpy(&value, tiles[tile].bytes[row] + index * sizeof(T), sizeof(T));
  return value;
}

inline float bfloat16(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void load(int tile, const void* from, int64_t stride) {
  for (int row = 0; row < ROWS; row++) std::memcpy(tiles[tile].bytes[row], static_cast<const char*>(from) + row * stride, BYTES);
}

inline void store(int tile, void* to, int64_t stride) {
  for (int row = 0; row < ROWS; row++) std::memcpy(static_cast<char*>(to) + row * stride, tiles[tile].bytes[row], BYTES);
}

// c += a . b: of rows of a and lines of b that hold `count` numbers for each column.
template <class Sum, int count, class Term>
void add(int c, Term term) {
  for (int row = 0; row < ROWS; row++)
    for (int column = 0; column < BYTES / 4; column++) {
      Sum sum = at<Sum>(c, row, column);
      for (int k = 0; k < ROWS * count; k++) sum += term(row, k, k / count, column * count + k % count);
      std::memcpy(tiles[c].bytes[row] + 4 * column, &sum, sizeof sum);
    }
}

inline void add_bytes(int c, int a, int b) {
  add<int32_t, 4>(c, [=](int row, int k, int line, int index) { return at<uint8_t>(a, row, k) * at<int8_t>(b, line, index); });
}

inline void add_halves(int c, int a, int b) {
  add<float, 2>(c, [=](int row, int k, int line, int index) {
    return bfloat16(at<uint16_t>(a, row, k)) * bfloat16(at<uint16_t>(b, line, index));
  });
}

}  // namespace tiles_in_memory

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbusd
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) ((void)(config))
#define _tile_release() ((void)0)
#define _tile_zero(tile) (tiles_in_memory::tiles[tile] = {})
#define _tile_loadd(tile, from, stride) tiles_in_memory::load(tile, from, stride)
#define _tile_stored(tile, to, stride) tiles_in_memory::store(tile, to, stride)
#define _tile_dpbusd(c, a, b) tiles_in_memory::add_bytes(c, a, b)
#define _tile_dpbf16ps(c, a, b) tiles_in_memory::add_halves(c, a, b)
