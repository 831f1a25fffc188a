// Attention of one head in float, or where that pays by bfloat16 halves in the tile registers. Included by the kernels, whose
// `block` and `put` it uses.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace ernie_kqat {
namespace {

// 16 x 16 values, transposed: four rounds that exchange halves, quarters, ...
template <int HALF>
INLINE void exchange(Floats (&lines)[LANES]) {
  Ints low, high;
  for (int lane = 0; lane < LANES; lane++) {
    low[lane] = lane & HALF ? LANES + lane - HALF : lane;
    high[lane] = lane & HALF ? LANES + lane : lane + HALF;
  }
  for (int line = 0; line < LANES; line++)
    if (!(line & HALF)) {
      Floats a = lines[line], b = lines[line + HALF];
      lines[line] = __builtin_shuffle(a, b, low);
      lines[line + HALF] = __builtin_shuffle(a, b, high);
    }
}

INLINE void turn(Floats (&lines)[LANES]) {
  exchange<8>(lines);
  exchange<4>(lines);
  exchange<2>(lines);
  exchange<1>(lines);
}

// keys [count, width] -> [width, columns], the columns beyond `count` 0.
void transpose(const float* keys, int stride, int count, int width, int columns, float* to) {
  for (int column = 0; column < columns; column += LANES)
    for (int at = 0; at < width; at += LANES) {
      Floats lines[LANES];
      for (int line = 0; line < LANES; line++)
        lines[line] = column + line < count ? load<Floats>(keys + int64_t(column + line) * stride + at) : Floats{};
      turn(lines);
      for (int line = 0; line < LANES; line++) store(to + int64_t(at + line) * columns + column, lines[line]);
    }
}

// In place; returns 1 / the sum, by which the values are still to be multiplied.
INLINE float exponentials(float* scores, int keys, int columns, bool skip_first) {
  constexpr float NEVER = -1e30f;
  for (int key = keys; key < columns; key++) scores[key] = NEVER;
  if (skip_first) scores[0] = NEVER;
  Floats most = all(NEVER);
  for (int at = 0; at < columns; at += LANES) most = larger(most, load<Floats>(scores + at));
  const float peak = largest(most);
  Floats total = {};
  for (int at = 0; at < columns; at += LANES) {
    Floats value = exponential(load<Floats>(scores + at) - peak);
    total += value;
    store(scores + at, value);
  }
  return 1.0f / sum(total);
}

#if defined(__AMX_BF16__)
constexpr int KEYS_FOR_TILES = 64;  // with fewer, making the tiles takes longer than they save

using Pairs = Ints;  // 16 pairs of bfloat16 numbers, the first of each in the lower half

// Numbers as sums of two of bfloat16.
struct Halves {
  Pairs high, low;
};

INLINE Pairs paired(Floats first, Floats second) { return (Pairs)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first); }

// Of 32 numbers in order.
INLINE Halves halves(Floats first, Floats second) {
  return {paired(first, second), paired(first - rounded(first), second - rounded(second))};
}

// Each of the first 16 numbers beside one of the second.
INLINE Pairs interleaved(Floats first, Floats second) {
  return (Pairs)_mm512_or_si512(_mm512_srli_epi32((__m512i)rounded(first), 16), (__m512i)rounded(second));
}

INLINE Floats row_of(const float* rows, int stride, int index, int count, int at, int end) {
  return index < count && at < end ? load<Floats>(rows + int64_t(index) * stride + at) : Floats{};
}

// high, low, high: what `second_of` is multiplied by.
INLINE void store_first(int32_t* to, const Halves& both) {
  store(to, both.high);
  store(to + LANES, both.low);
  store(to + 2 * LANES, both.high);
}

// high, high, low: of the four products of halves, the smallest is left out.
INLINE void store_second(int32_t* to, int line, Pairs high, Pairs low) {
  store(to + line * LANES, high);
  store(to + (LANES + line) * LANES, high);
  store(to + (2 * LANES + line) * LANES, low);
}

// [columns / 16][width / 32][3][16 pairs of features][16 keys]
void keys_to_tiles(const Head& head, int columns, int tiles, int32_t* to) {
  for (int key = 0; key < columns; key += LANES)
    for (int tile = 0; tile < tiles; tile++, to += 3 * LANES * LANES) {
      const int at = tile * 2 * LANES;
      Floats high[LANES], low[LANES];
      for (int line = 0; line < LANES; line++) {
        const Halves both = halves(row_of(head.key, head.stride, key + line, head.keys, at, head.width),
                                   row_of(head.key, head.stride, key + line, head.keys, at + LANES, head.width));
        high[line] = (Floats)both.high;
        low[line] = (Floats)both.low;
      }
      turn(high);
      turn(low);
      for (int line = 0; line < LANES; line++) store_second(to, line, (Pairs)high[line], (Pairs)low[line]);
    }
}

// [columns / 32][head.width / 16][3][16 pairs of keys][16 features]
void values_to_tiles(const Head& head, int columns, int blocks, int32_t* to) {
  for (int key = 0; key < columns; key += 2)
    for (int block = 0; block < blocks; block++) {
      const Floats first = row_of(head.value, head.stride, key, head.keys, block * LANES, head.width);
      const Floats second = row_of(head.value, head.stride, key + 1, head.keys, block * LANES, head.width);
      store_second(to + (key / (2 * LANES) * blocks + block) * 3 * LANES * LANES, key % (2 * LANES) / 2, interleaved(first, second),
                   interleaved(first - rounded(first), second - rounded(second)));
    }
}

// By the tile registers, 16 queries at once, every number taken in halves: as exact as float. Plain bfloat16 moves so many
// activations to the next of 255 levels that the answers differ by as much as INT8's own noise.
void attend_in_tiles(const Head& head, float* scratch, const Sink& sink) {
  constexpr int TRIPLE = 3 * LANES * LANES;
  const int columns = padded(head.keys, 2 * LANES), tiles = padded(head.width, 2 * LANES) / (2 * LANES);
  const int steps = columns / (2 * LANES), blocks = head.width / LANES;
  int32_t* keys = reinterpret_cast<int32_t*>(scratch);
  int32_t* values = keys + columns / LANES * tiles * TRIPLE;
  int32_t* queries = values + steps * blocks * TRIPLE;                                // [16][tiles][3][16 pairs of features]
  int32_t* weights = queries + LANES * tiles * 3 * LANES;                             // [16][steps][3][16 pairs of keys]
  float* scores = reinterpret_cast<float*>(weights + LANES * steps * 3 * LANES);      // [16][columns]
  float* sums = scores + LANES * columns;                                             // [16][head.width]
  keys_to_tiles(head, columns, tiles, keys);
  values_to_tiles(head, columns, blocks, values);
  const Roundings rounding(sink.rounding);
  for (int first = 0; first < head.queries; first += LANES) {
    const int count = head.queries - first < LANES ? head.queries - first : LANES;
    for (int line = 0; line < LANES; line++)
      for (int tile = 0; tile < tiles; tile++) {
        const int at = tile * 2 * LANES, query = first + line;
        store_first(queries + (line * tiles + tile) * 3 * LANES,
                    halves(row_of(head.query, head.stride, query, head.queries, at, head.width),
                           row_of(head.query, head.stride, query, head.queries, at + LANES, head.width)));
      }
    products(queries, tiles * 3 * LANES, keys, 3 * tiles, tiles * TRIPLE, 0, scores, columns, columns / LANES);
    float factors[LANES];
    for (int line = 0; line < count; line++) {
      float* mine = scores + line * columns;
      factors[line] = exponentials(mine, head.keys, columns, head.skip_first);
      for (int step = 0; step < steps; step++)
        store_first(weights + (line * steps + step) * 3 * LANES,
                    halves(load<Floats>(mine + step * 2 * LANES), load<Floats>(mine + step * 2 * LANES + LANES)));
    }
    products(weights, steps * 3 * LANES, values, 3 * steps, TRIPLE, (blocks - 1) * TRIPLE, sums, head.width, blocks);
    for (int line = 0; line < count; line++)
      for (int at = 0; at < head.width; at += LANES)
        put(load<Floats>(sums + line * head.width + at) * factors[line], sink, rounding, int64_t(first + line) * sink.stride + at);
  }
}
#endif

template <int R>
INLINE void attend_rows(const Head& head, int row, const float* keys, int columns, float* scores, const Sink& sink) {
  const Roundings rounding(sink.rounding);
  for (int at = 0; at < columns; at += 2 * LANES) {
    Floats out[R][2];
    block<R, 2>(head.query + int64_t(row) * head.stride, head.stride, keys + at, columns, LANES, head.width, out);
    for (int r = 0; r < R; r++)
      for (int c = 0; c < 2; c++) store(scores + r * columns + at + c * LANES, out[r][c]);
  }
  float factors[R];
  for (int r = 0; r < R; r++) factors[r] = exponentials(scores + r * columns, head.keys, columns, head.skip_first);
  int at = 0;
  for (; at + 2 * LANES <= head.width; at += 2 * LANES) {
    Floats out[R][2];
    block<R, 2>(scores, columns, head.value + at, head.stride, LANES, head.keys, out);
    for (int r = 0; r < R; r++)
      for (int c = 0; c < 2; c++) put(out[r][c] * factors[r], sink, rounding, int64_t(row + r) * sink.stride + at + c * LANES);
  }
  if (at < head.width) {
    Floats out[R][1];
    block<R, 1>(scores, columns, head.value + at, head.stride, LANES, head.keys, out);
    for (int r = 0; r < R; r++) put(out[r][0] * factors[r], sink, rounding, int64_t(row + r) * sink.stride + at);
  }
}

void attend(const Head& head, float* scratch, const Sink& sink) {
#if defined(__AMX_BF16__)
  if (head.keys >= KEYS_FOR_TILES && head.queries > 1) return attend_in_tiles(head, scratch, sink);
#endif
  const int columns = padded(head.keys, 2 * LANES);
  float* scores = scratch + head.width * columns;
  transpose(head.key, head.stride, head.keys, head.width, columns, scratch);
  int row = 0;
  for (; row + 8 <= head.queries; row += 8) attend_rows<8>(head, row, scratch, columns, scores, sink);
  for (; row + 4 <= head.queries; row += 4) attend_rows<4>(head, row, scratch, columns, scores, sink);
  for (; row < head.queries; row++) attend_rows<1>(head, row, scratch, columns, scores, sink);
}

}  // namespace
}  // namespace ernie_kqat
