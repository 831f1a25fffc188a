// The kernels, compiled for each instruction set with KERNELS = its name. No std:: templates here: the linker would keep one
// instance of them for all, perhaps that for a CPU which this one is not.
#include "kernels.h"

#include "vector.h"
#if defined(__AMX_INT8__)
#include "amx.h"
#endif

namespace ernie_kqat {
namespace {

template <Activation activation>
INLINE Floats activated(Floats x) {
  if constexpr (activation == Activation::gelu) return gelu(x);
  if constexpr (activation == Activation::relu) return relu(x);
  if constexpr (activation == Activation::tanh) return hyperbolic_tangent(x);
  return x;
}

INLINE Floats smoothed(Floats x, const float* factors, int at) { return factors ? x * load<Floats>(factors + at) : x; }

INLINE void put(Floats value, const Sink& sink, const Roundings& rounding, int64_t index) {
  if (sink.bytes) {
    store(sink.bytes + index, quantized(value, rounding));
  } else if (sink.add) {
    store(sink.reals + index, load<Floats>(sink.reals + index) + value);
  } else {
    store(sink.reals + index, value);
  }
}

#if !defined(__AMX_INT8__)
#if defined(__AVX512VNNI__)
template <int ROWS_NOW, int PANELS>
INLINE void dots(const uint8_t* rows, int stride, const int8_t* panel, int in, int32_t* tile) {
  __m512i sums[ROWS_NOW][PANELS] = {};
  const int64_t panel_bytes = int64_t(in) * LANES;
  for (int quad = 0; quad < in; quad += 4) {
    __m512i weights[PANELS];
    for (int p = 0; p < PANELS; p++) weights[p] = _mm512_loadu_si512(panel + p * panel_bytes + quad * LANES);
    for (int r = 0; r < ROWS_NOW; r++) {
      int32_t four;
      std::memcpy(&four, rows + int64_t(r) * stride + quad, 4);
      __m512i bytes = _mm512_set1_epi32(four);
      for (int p = 0; p < PANELS; p++) sums[r][p] = _mm512_dpbusd_epi32(sums[r][p], bytes, weights[p]);
    }
  }
  for (int r = 0; r < ROWS_NOW; r++)
    for (int p = 0; p < PANELS; p++) _mm512_storeu_si512(tile + (r * PANELS + p) * LANES, sums[r][p]);
}
#else
template <int ROWS_NOW, int PANELS>
INLINE void dots(const uint8_t* rows, int stride, const int8_t* panel, int in, int32_t* tile) {
  for (int r = 0; r < ROWS_NOW; r++)
    for (int p = 0; p < PANELS; p++) {
      Ints sums = {};
      for (int quad = 0; quad < in; quad += 4)
        for (int byte = 0; byte < 4; byte++) {
          Ints weights;
          for (int lane = 0; lane < LANES; lane++) weights[lane] = panel[int64_t(p) * in * LANES + quad * LANES + lane * 4 + byte];
          sums += weights * int32_t(rows[int64_t(r) * stride + quad + byte]);
        }
      store(tile + (r * PANELS + p) * LANES, sums);
    }
}
#endif

template <int PANELS>
INLINE void all_dots(const uint8_t* rows, int stride, int count, const int8_t* panel, int in, int32_t* tile) {
  constexpr int MOST = PANELS == 2 ? 8 : 4;  // so that the sums stay in registers
  int row = 0;
  for (; row + MOST <= count; row += MOST)
    dots<MOST, PANELS>(rows + int64_t(row) * stride, stride, panel, in, tile + row * PANELS * LANES);
  for (; row < count; row++) dots<1, PANELS>(rows + int64_t(row) * stride, stride, panel, in, tile + row * PANELS * LANES);
}

// The sums of a block of bytes; see amx.h for the other one, which is why they are asked for step by step.
class Sums {
 public:
  Sums(const uint8_t* rows, int stride, int count, const int8_t* panel, int in, int panels)
      : rows_(rows), panel_(panel), stride_(stride), count_(count), in_(in), panels_(panels) {}
  void step(int) {}
  void store(int32_t* tile) const {
    if (panels_ == 2)
      all_dots<2>(rows_, stride_, count_, panel_, in_, tile);
    else
      all_dots<4>(rows_, stride_, count_, panel_, in_, tile);
  }

 private:
  const uint8_t* rows_;
  const int8_t* panel_;
  const int stride_, count_, in_, panels_;
};
#endif

// out[R][C x 16] = rows [R, depth] . matrix [depth, C x 16], whose next 16 columns are `next` values on.
template <int R, int C>
INLINE void block(const float* rows, int stride, const float* matrix, int64_t line, int64_t next, int depth, Floats (&out)[R][C]) {
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) out[r][c] = Floats{};
  for (int k = 0; k < depth; k++) {
    Floats columns[C];
    for (int c = 0; c < C; c++) columns[c] = load<Floats>(matrix + k * line + c * next);
    for (int r = 0; r < R; r++)
      for (int c = 0; c < C; c++) out[r][c] += rows[int64_t(r) * stride + k] * columns[c];
  }
}

template <int R>
INLINE void real_dots(const float* rows, int stride, const float* panel, int in, float* tile) {
  Floats sums[R][2];
  block<R, 2>(rows, stride, panel, LANES, int64_t(in) * LANES, in, sums);
  for (int r = 0; r < R; r++)
    for (int c = 0; c < 2; c++) store(tile + (r * 2 + c) * LANES, sums[r][c]);
}

void accumulate_reals(const float* rows, int stride, int count, const float* panel, int in, float* tile) {
  int row = 0;
  for (; row + 8 <= count; row += 8) real_dots<8>(rows + int64_t(row) * stride, stride, panel, in, tile + row * 2 * LANES);
  for (; row < count; row++) real_dots<1>(rows + int64_t(row) * stride, stride, panel, in, tile + row * 2 * LANES);
}

// A block whose sums are there and are yet to go to the sink, row by row.
template <Activation activation, bool EXACT>
class Pending {
 public:
  Pending(const Linear& linear, const Sink& sink) : linear_(linear), sink_(sink), rounding_(sink.rounding) {}

  void set(const void* tile, int rows, int panels, int column, int first) {
    tile_ = tile;
    rows_ = rows;
    panels_ = panels;
    column_ = column;
    first_ = first;
    done_ = 0;
  }

  // Up to `share` of `shares` of the rows.
  INLINE_METHOD void advance(int share, int shares) {
    for (const int end = rows_ * share / shares; done_ < end; done_++)
      for (int p = 0; p < panels_; p++) put_values(done_, p);
  }

 private:
  INLINE_METHOD void put_values(int row, int p) const {
    const int at = column_ + p * LANES, index = (row * panels_ + p) * LANES;
    Floats value;
    if constexpr (EXACT) {
      Ints sums = load<Ints>(static_cast<const int32_t*>(tile_) + index) - load<Ints>(linear_.shifts + at);
      value = __builtin_convertvector(sums, Floats) * load<Floats>(linear_.steps + at) + load<Floats>(linear_.bias + at);
    } else {
      value = load<Floats>(static_cast<const float*>(tile_) + index) + load<Floats>(linear_.bias + at);
    }
    value = smoothed(activated<activation>(value), sink_.rounding.smoothing, at);
    put(value, sink_, rounding_, int64_t(first_ + row) * sink_.stride + at);
  }

  const Linear linear_;
  const Sink sink_;
  const Roundings rounding_;
  const void* tile_ = nullptr;
  int rows_ = 0, panels_ = 0, column_ = 0, first_ = 0, done_ = 0;
};

// Columns outside, rows inside: the weights of a column block stay in the first cache for all rows. A block goes to the sink
// while the tile registers sum up the next one.
template <Activation activation, bool EXACT>
void product_of(const Linear& linear, const uint8_t* bytes, const float* reals, int rows, Part part, const Sink& sink) {
  alignas(64) int32_t tiles[2][TILE];
  Pending<activation, EXACT> pending(linear, sink);
  const int panels = rows <= ROWS / 2 && EXACT ? 4 : 2;
  const int most = TILE / (panels * LANES), blocks = linear.out / (panels * LANES), in = linear.in;
  const int first = int(int64_t(blocks) * part.part / part.parts), last = int(int64_t(blocks) * (part.part + 1) / part.parts);
  int turn = 0;
  for (int b = first; b < last; b++) {
    const int column = b * panels * LANES;
    const int64_t panel = int64_t(column) * in;
    for (int row = 0; row < rows; row += most) {
      const int count = rows - row < most ? rows - row : most;
      int32_t* tile = tiles[turn ^= 1];
      if constexpr (EXACT) {
        Sums sums(bytes + int64_t(row) * in, in, count, linear.integers + panel, in, panels);
        for (int at = 0; at < in; at += WIDTH) {
          sums.step(at);
          pending.advance(at / WIDTH + 1, in / WIDTH);
        }
        sums.store(tile);
      } else {
        pending.advance(1, 1);
        accumulate_reals(reals + int64_t(row) * in, in, count, linear.reals + panel, in, reinterpret_cast<float*>(tile));
      }
      pending.set(tile, count, panels, column, row);
    }
  }
  pending.advance(1, 1);
}

template <bool EXACT>
void product_by(const Linear& linear, const uint8_t* bytes, const float* reals, int rows, Part part, const Sink& sink) {
  switch (sink.activation) {
    case Activation::none: return product_of<Activation::none, EXACT>(linear, bytes, reals, rows, part, sink);
    case Activation::gelu: return product_of<Activation::gelu, EXACT>(linear, bytes, reals, rows, part, sink);
    case Activation::relu: return product_of<Activation::relu, EXACT>(linear, bytes, reals, rows, part, sink);
    case Activation::tanh: return product_of<Activation::tanh, EXACT>(linear, bytes, reals, rows, part, sink);
  }
}

void product(const Linear& linear, const uint8_t* bytes, const float* reals, int rows, Part part, const Sink& sink) {
  if (linear.integers)
    product_by<true>(linear, bytes, reals, rows, part, sink);
  else
    product_by<false>(linear, bytes, reals, rows, part, sink);
}

void quantize(const float* row, int width, const Rounding& rounding, uint8_t* bytes) {
  const Roundings all_lanes(rounding);
  for (int at = 0; at < width; at += LANES)
    store(bytes + at, quantized(smoothed(load<Floats>(row + at), rounding.smoothing, at), all_lanes));
}

INLINE Floats first_lanes(Floats x, int count) {
  Floats lanes;
  for (int lane = 0; lane < LANES; lane++) lanes[lane] = float(lane);
  return lanes < float(count) ? x : Floats{};
}

void normalize(float* row, int hidden, const Norm& norm) {
  Floats total = {};
  for (int at = 0; at < hidden; at += LANES) total += load<Floats>(row + at);
  const float mean = sum(total) / float(hidden);
  Floats squares = {};
  for (int at = 0; at < hidden; at += LANES) {
    Floats off = load<Floats>(row + at) - mean;
    if (hidden - at < LANES) off = first_lanes(off, hidden - at);
    squares += off * off;
  }
  const float factor = 1.0f / __builtin_sqrtf(sum(squares) / float(hidden) + norm.epsilon);
  for (int at = 0; at < hidden; at += LANES) {
    Floats off = (load<Floats>(row + at) - mean) * factor;
    store(row + at, off * load<Floats>(norm.weight + at) + load<Floats>(norm.bias + at));
  }
}

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

#if !defined(__AMX_INT8__)
void begin() {}
void end() {}
#endif

#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)
#define JOINED_OF(a, b) a##b
#define JOINED(a, b) JOINED_OF(a, b)

constexpr Kernels TABLE = {TEXT(KERNELS), begin, end, product, quantize, normalize, attend};

}  // namespace

const Kernels& JOINED(KERNELS, _kernels)() { return TABLE; }

}  // namespace ernie_kqat
