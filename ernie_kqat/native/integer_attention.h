// Attention of one head on integers: scores are int32 sums of u8 queries and s8 keys, weights are rounded to u8 in units of the
// query's largest, the context is an int32 sum of these and of s8 values. What is float between the sums is one factor, the
// exponential and its rounding (ernie_kqat/quantizers/attention.py). Included by the kernels, whose `Sums` and `put` it uses.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace ernie_kqat {
namespace {

constexpr int COLUMNS = 2 * LANES;  // of a block of sums
constexpr float LARGEST_WEIGHT = 255.0f;
constexpr int32_t MASKED = INT32_MIN / 2;
#if defined(__AMX_INT8__)
constexpr int DEPTH = WIDTH;  // of a step of a sum, and so what its rows are padded to
#else
constexpr int DEPTH = 4;
#endif

// 16 x 4 bytes less 128, signed; those of lanes from `count` on are 0.
INLINE Ints signed_quads(const uint8_t* bytes, int count) {
#if defined(__AVX512F__)
  const __m512i middle = _mm512_set1_epi8(-128);
  const __mmask16 there = count >= LANES ? 0xffff : (1 << count) - 1;
  return (Ints)_mm512_xor_si512(_mm512_mask_loadu_epi32(middle, there, bytes), middle);
#else
  uint8_t all_bytes[4 * LANES];
  std::memset(all_bytes, 128, sizeof all_bytes);
  std::memcpy(all_bytes, bytes, 4 * (count < LANES ? count : LANES));
  for (uint8_t& byte : all_bytes) byte ^= 128;
  return load<Ints>(all_bytes);
#endif
}

// 128 x the sum of the four signed bytes of each lane.
INLINE Ints sums_of_quads(Ints quads) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(-128), (__m512i)quads);
#else
  Ints total = {};
  for (int byte = 0; byte < 4; byte++) total += quads << (24 - 8 * byte) >> 24;
  return total * 128;
#endif
}

// Keys [count, width] -> [columns / 16][depth / 4][16 keys][4], and what q + 128 in place of q adds to their scores, [columns].
void keys_to_panels(const IntegerHead& head, int columns, int depth, int8_t* to, int32_t* shifts) {
  for (int key = 0; key < columns; key += LANES, to += LANES * depth) {
    Ints added = {};
    for (int at = 0; at < depth; at += WIDTH) {
      Floats lines[LANES];
      for (int line = 0; line < LANES; line++) {
        const uint8_t* row = head.key + int64_t(key + line) * head.stride + at;
        lines[line] = key + line < head.keys ? (Floats)signed_quads(row, (head.width - at) / 4) : Floats{};
      }
      turn(lines);
      for (int quad = 0; quad < LANES && at + 4 * quad < depth; quad++) {
        added += sums_of_quads((Ints)lines[quad]);
        store(to + (at + 4 * quad) * LANES, lines[quad]);
      }
    }
    store(shifts + key, added);
  }
}

// Numbers of WIDE bytes of `a`'s lower or upper half, each before its like of `b`.
template <int WIDE, bool UPPER>
INLINE Bytes interleaved_bytes(Bytes a, Bytes b) {
  Bytes order;
  for (int lane = 0; lane < LANES; lane++) {
    const int from = lane / (2 * WIDE) * WIDE + lane % WIDE + (UPPER ? LANES / 2 : 0);
    order[lane] = uint8_t(lane / WIDE % 2 ? LANES + from : from);
  }
  return __builtin_shuffle(a, b, order);
}

// Four rows of 16 features -> of the lower or upper 8 of these, [8 features][4 rows].
template <bool UPPER>
INLINE void store_quads(const Bytes (&rows)[4], int8_t* to) {
  const Bytes first = interleaved_bytes<1, UPPER>(rows[0], rows[1]), second = interleaved_bytes<1, UPPER>(rows[2], rows[3]);
  store(to, interleaved_bytes<2, false>(first, second));
  store(to + LANES, interleaved_bytes<2, true>(first, second));
}

// Values [keys, width] -> [columns / 16][depth / 4][16 features][4 keys].
void values_to_panels(const IntegerHead& head, int columns, int depth, int8_t* to) {
  const Bytes middle = Bytes{} + uint8_t(128);
  for (int at = 0; at < columns; at += LANES)
    for (int key = 0; key < depth; key += 4, to += 4 * LANES) {
      Bytes rows[4];
      for (int line = 0; line < 4; line++) {
        const bool there = key + line < head.keys && at < head.width;
        rows[line] = there ? load<Bytes>(head.value + int64_t(key + line) * head.stride + at) ^ middle : Bytes{};
      }
      store_quads<false>(rows, to);
      store_quads<true>(rows, to + 2 * LANES);
    }
}

// sums[columns / 32][ROWS][32] = rows [count, depth] . panels.
INLINE void integer_products(const uint8_t* rows, int stride, int count, const int8_t* panels, int depth, int columns, int32_t* sums) {
  for (int column = 0; column < columns; column += COLUMNS, sums += ROWS * COLUMNS) {
    Sums block(rows, stride, count, panels + int64_t(column) * depth, depth, 2);
    for (int at = 0; at < depth; at += WIDTH) block.step(at);
    block.store(sums);
  }
}

// The 16 scores from a key on, of a query whose sums lie as integer_products leaves them; MASKED for what is no key.
INLINE Ints scores_at(const IntegerHead& head, const int32_t* sums, const int32_t* shifts, int key) {
  const Ints found = load<Ints>(sums + key / COLUMNS * ROWS * COLUMNS + key % COLUMNS) - load<Ints>(shifts + key);
  if (key + LANES <= head.keys && (key > 0 || !head.skip_first)) return found;
  Ints lanes;
  for (int lane = 0; lane < LANES; lane++) lanes[lane] = key + lane;
  return (lanes < head.keys) & (lanes >= int(head.skip_first)) ? found : Ints{} + MASKED;
}

// A query's weights, 0 for columns beyond the keys, and their sum.
INLINE float weigh(const IntegerHead& head, const int32_t* sums, const int32_t* shifts, int columns, uint8_t* weights) {
  constexpr float LOG2_E = 1.44269504f;
  Ints most = scores_at(head, sums, shifts, 0);
  for (int key = LANES; key < head.keys; key += LANES) most = larger(most, scores_at(head, sums, shifts, key));
  const int32_t peak = largest(most);
  const float step = head.score_step * LOG2_E;
  Ints total = {};
  int key = 0;
  for (; key < head.keys; key += LANES) {
    const Ints found = scores_at(head, sums, shifts, key);
    Floats shifted = power_of_two(__builtin_convertvector(found - peak, Floats) * step) * LARGEST_WEIGHT + ROUND;
    if (key + LANES > head.keys || head.skip_first) shifted = found == MASKED ? all(ROUND) : shifted;  // whatever the step
    total += (Ints)shifted - (Ints)all(ROUND);
    store(weights + key, low_bytes(shifted));
  }
  for (; key < columns; key += LANES) store(weights + key, Bytes{});
  return float(sum(total));
}

void attend_integers(const IntegerHead& head, uint8_t* scratch, const Sink& sink) {
  const int depth = padded(head.width, DEPTH), keys = padded(head.keys, DEPTH);  // of the first product, of the second
  const int columns = padded(head.keys, DEPTH > COLUMNS ? DEPTH : COLUMNS), features = padded(head.width, COLUMNS);
  int32_t* scores = reinterpret_cast<int32_t*>(scratch);
  int32_t* shifts = scores + ROWS * columns;
  int8_t* key_panels = reinterpret_cast<int8_t*>(shifts + columns);
  int8_t* value_panels = key_panels + int64_t(columns) * depth;
  uint8_t* weights = reinterpret_cast<uint8_t*>(value_panels) + int64_t(features) * keys;
  uint8_t* queries = weights + ROWS * columns;
  alignas(64) int32_t sums[ROWS * COLUMNS];
  keys_to_panels(head, columns, depth, key_panels, shifts);
  values_to_panels(head, features, keys, value_panels);
  const Roundings rounding(sink.rounding);
  for (int first = 0; first < head.queries; first += ROWS) {
    const int count = head.queries - first < ROWS ? head.queries - first : ROWS;
    const uint8_t* rows = head.query + int64_t(first) * head.stride;
    int stride = head.stride;
    if (DEPTH == WIDTH) {  // what lies beside a head is another one
      for (int r = 0; r < count; r++) {
        std::memcpy(queries + r * depth, rows + int64_t(r) * stride, head.width);
        std::memset(queries + r * depth + head.width, 0, depth - head.width);
      }
      rows = queries;
      stride = depth;
    }
    integer_products(rows, stride, count, key_panels, depth, columns, scores);
    float factors[ROWS];
    for (int r = 0; r < count; r++)
      factors[r] = head.value_step / weigh(head, scores + r * COLUMNS, shifts, keys, weights + r * columns);
    for (int at = 0; at < head.width; at += COLUMNS) {
      integer_products(weights, columns, count, value_panels + int64_t(at) * keys, keys, COLUMNS, sums);
      for (int r = 0; r < count; r++)
        for (int feature = at; feature < at + COLUMNS && feature < head.width; feature += LANES) {
          const Floats value = __builtin_convertvector(load<Ints>(sums + r * COLUMNS + feature - at), Floats) * factors[r];
          put(value, sink, rounding, int64_t(first + r) * sink.stride + feature);
        }
    }
  }
}

}  // namespace
}  // namespace ernie_kqat
