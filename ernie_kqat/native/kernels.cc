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
constexpr int AT_ONCE = 768;  // bytes of a row at once, so that two panels of as many weights stay in the first cache
constexpr int SUMS = 24;      // vectors at once, so that they stay in registers

// tile[ROWS_NOW][PANELS x 16] = (or, unless from = 0, +=) the sums over bytes [from, to) of the rows.
#if defined(__AVX512VNNI__)
template <int ROWS_NOW, int PANELS>
INLINE void dots(const uint8_t* rows, int stride, const int8_t* panel, int in, int from, int to, int32_t* tile) {
  __m512i sums[ROWS_NOW][PANELS];
  for (int r = 0; r < ROWS_NOW; r++)
    for (int p = 0; p < PANELS; p++)
      sums[r][p] = from ? _mm512_loadu_si512(tile + (r * PANELS + p) * LANES) : _mm512_setzero_si512();
  const int64_t panel_bytes = int64_t(in) * LANES;
  for (int quad = from; quad < to; quad += 4) {
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
INLINE void dots(const uint8_t* rows, int stride, const int8_t* panel, int in, int from, int to, int32_t* tile) {
  for (int r = 0; r < ROWS_NOW; r++)
    for (int p = 0; p < PANELS; p++) {
      Ints sums = from ? load<Ints>(tile + (r * PANELS + p) * LANES) : Ints{};
      for (int quad = from; quad < to; quad += 4)
        for (int byte = 0; byte < 4; byte++) {
          Ints weights;
          for (int lane = 0; lane < LANES; lane++) weights[lane] = panel[int64_t(p) * in * LANES + quad * LANES + lane * 4 + byte];
          sums += weights * int32_t(rows[int64_t(r) * stride + quad + byte]);
        }
      store(tile + (r * PANELS + p) * LANES, sums);
    }
}
#endif

// dots of `count` rows, 1..MOST.
template <int MOST, int PANELS>
INLINE void some_dots(int count, const uint8_t* rows, int stride, const int8_t* panel, int in, int from, int to, int32_t* tile) {
  if constexpr (MOST > 0) {
    if (count == MOST) return dots<MOST, PANELS>(rows, stride, panel, in, from, to, tile);
    some_dots<MOST - 1, PANELS>(count, rows, stride, panel, in, from, to, tile);
  }
}

// Turns of about as many rows each: a few rows have too few sums to hide how long each of them takes.
template <int PANELS>
void all_dots(const uint8_t* rows, int stride, int count, const int8_t* panel, int in, int32_t* tile) {
  constexpr int MOST = SUMS / PANELS;
  const int turns = (count + MOST - 1) / MOST, parts = (in + AT_ONCE - 1) / AT_ONCE, quads = in / 4;
  for (int part = 0; part < parts; part++)
    for (int turn = 0; turn < turns; turn++) {
      const int first = count * turn / turns, last = count * (turn + 1) / turns;
      some_dots<MOST, PANELS>(last - first, rows + int64_t(first) * stride, stride, panel, in, quads * part / parts * 4,
                              quads * (part + 1) / parts * 4, tile + first * PANELS * LANES);
    }
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

}  // namespace
}  // namespace ernie_kqat

#include "attention.h"
#include "integer_attention.h"

namespace ernie_kqat {
namespace {

#if !defined(__AMX_INT8__)
void begin() {}
void end() {}
#endif

#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)
#define JOINED_OF(a, b) a##b
#define JOINED(a, b) JOINED_OF(a, b)

constexpr Kernels TABLE = {TEXT(KERNELS), begin, end, product, quantize, normalize, attend, attend_integers};

}  // namespace

const Kernels& JOINED(KERNELS, _kernels)() { return TABLE; }

}  // namespace ernie_kqat
