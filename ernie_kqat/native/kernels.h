// What is compiled once for each instruction set. Splits of work: `part` of `parts` is what one thread of a team does.
#pragma once

#include "encoder.h"

namespace ernie_kqat {

constexpr int ROWS = 32;            // of a block of a product; buffers that a product reads hold whole blocks
constexpr int TILE = ROWS * ROWS;   // values of a block: 32 x 32, or 16 x 64

struct Part {
  int part, parts;
};

// Where a kernel writes rows: floats (stored or added), or bytes by `rounding`.
struct Sink {
  float* reals = nullptr;
  uint8_t* bytes = nullptr;
  int stride = 0;  // values from row to row
  bool add = false;
  Activation activation = Activation::none;
  Rounding rounding = {};
};

// The queries, keys and values of one head of one sentence.
struct Head {
  const float *query, *key, *value;  // first row; rows are `stride` values apart
  int stride, queries, keys, width;  // width: a multiple of LANES
  bool skip_first;                   // the first key is masked
};

// The same, as bytes (integers + 128); the real value of 1 of a score, and of a value.
struct IntegerHead {
  const uint8_t *query, *key, *value;
  int stride, queries, keys, width;
  bool skip_first;
  float score_step, value_step;
};

struct Kernels {
  const char* name;
  void (*begin)();  // before the first and after the last product of a thread
  void (*end)();
  // sink = activation(rows . linear + bias); `bytes` or `reals` of `linear.in` values a row, as the Linear needs.
  void (*product)(const Linear& linear, const uint8_t* bytes, const float* reals, int rows, Part part, const Sink& sink);
  void (*quantize)(const float* row, int width, const Rounding& rounding, uint8_t* bytes);
  // LayerNorm of a row of `hidden` values, in place; padding stays 0.
  void (*normalize)(float* row, int hidden, const Norm& norm);
  // sink = softmax(query . key) . value; `scratch` holds attention_scratch(keys, width) floats.
  void (*attend)(const Head& head, float* scratch, const Sink& sink);
  // The same on integers; `scratch` holds integer_attention_scratch(keys, width) bytes on a cache line.
  void (*attend_integers)(const IntegerHead& head, uint8_t* scratch, const Sink& sink);
};

// Keys, and scores of 8 rows, in float; or, of keys and values and of 16 rows of scores, what bfloat16 takes of them (amx.h), with
// the scores, their queries and sums.
constexpr int attention_scratch(int keys, int width) {
  return (3 * padded(width, 2 * LANES) + 3 * LANES) * padded(keys, 2 * LANES) + 3 * LANES * padded(width, 2 * LANES);
}

// Panels of keys and of values, what the former add to scores, and of ROWS queries the bytes, scores and weights.
constexpr int64_t integer_attention_scratch(int keys, int width) {
  const int64_t columns = padded(keys, WIDTH), deep = padded(width, WIDTH);
  return columns * (2 * deep + 4) + ROWS * (deep + 4 * columns + columns);
}

const Kernels& portable_kernels();
const Kernels& avx512_kernels();
const Kernels& amx_kernels();

// The kernels of that name, or the best for ""; throws std::invalid_argument for a name that this CPU has not.
const Kernels& kernels(const std::string& isa);

}  // namespace ernie_kqat
