// The INT8 ERNIE classifier as plain data, and the one function that runs it. Knows nothing of Paddle.
//
// Every width (columns of a row of activations, outputs of a Linear) is padded to a multiple of WIDTH with zeros, and each
// attention head to a multiple of LANES, so that no kernel has a remainder of columns.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ernie_kqat {

constexpr int LANES = 16;  // floats of the widest vector
constexpr int WIDTH = 64;  // bytes of it: what one step of an INT8 kernel reads of a row

constexpr int padded(int count, int multiple) { return (count + multiple - 1) / multiple * multiple; }

// q = clip(round half to even((x * smoothing - offset) * inverse_step), low, high); kept in memory as q + 128, a byte.
struct Rounding {
  float inverse_step, offset, low, high;
  const float* smoothing;  // [in] of each feature; null: all 1
  bool operator==(const Rounding& other) const {
    return inverse_step == other.inverse_step && offset == other.offset && low == other.low && high == other.high &&
           smoothing == other.smoothing;
  }
};

// y = (q . integers) * steps + bias, or y = x . reals + bias where the Linear is left in float.
struct Linear {
  int in, out;               // padded
  const int8_t* integers;    // [out / 16][in / 4][16][4]; null: float
  const int32_t* shifts;     // [out] (128 - whole steps of the offset) x the sum of a column of integers: products have q + 128
  const float* steps;        // [out] real value of 1 of the product: step of the input x step of the weight
  const float* reals;        // [out / 16][in][16]
  const float* bias;         // [out]
  Rounding rounding;         // of the input
};

struct Norm {
  const float *weight, *bias;  // [padded hidden]
  float epsilon;
};

// Attention on integers: how queries, keys and values are rounded, and the real value of 1 of a score, and of a value.
struct IntegerAttention {
  Rounding query, key, value;
  float score_step, value_step;
};

struct Layer {
  IntegerAttention attention;  // where the encoder's is on integers
  Linear query, key, value, out, up, down;
  Norm after_attention, after_feed_forward;
};

enum class Activation { none, gelu, relu, tanh };

struct Encoder {
  int hidden, heads, head_width, intermediate, classes;  // as in the model, not padded
  int vocabulary, positions, types;
  int64_t pad_token;
  Activation activation;
  bool integer_attention;
  const float *words, *places, *kinds;  // embeddings [vocabulary, hidden], [positions, hidden], [types, hidden]
  const int8_t* word_integers;          // words in place of `words`: integers x the step of a row
  const float* word_steps;              // [vocabulary]
  Norm embedded;
  std::vector<Layer> layers;
  Linear pooler, classifier;
};

// How a Linear computes: in floats; in INT8; in INT8 on an input that is smoothed, by factors of its own or those of the Linear before.
enum class Exact { no, yes, smoothed, smoothed_alike };

// What a program holds: every number of the model, in the order in which `assemble` reads it (ernie_kqat/export/native.py).
struct Contents {
  // hidden, heads, head_width, intermediate, classes, layers, activation, pad_token, and where attention is on integers, their
  // bits; `floats` then has the steps of queries, keys and values before a layer's Linears
  std::vector<int> shape;
  std::vector<int> exact;       // of each Linear, query, key, value, out, up, down of a layer, ...: a value of Exact
  std::vector<float> rounding;  // 4 for each Linear
  std::vector<float> epsilon;   // 1 for each Norm
  const float *words, *places, *kinds;
  const int8_t* word_integers;  // or null; then `words` is null, and `floats` begins with the step of each row
  int64_t word_rows, place_rows, kind_rows;
  const int8_t* integers;
  const float* floats;
  const int32_t* shifts;
  int64_t integer_count, float_count, shift_count;
};

// An Encoder that points into the contents. Throws std::invalid_argument unless they are whole.
Encoder assemble(const Contents& contents);

// Logits [batch, classes] of int64 ids [batch, tokens]. `isa`: "" (the best of this CPU) or a name of `isas()`. Throws
// std::invalid_argument for ids that have no embedding and for what `isa` or the shape cannot be.
void run(const Encoder& encoder, const int64_t* ids, const int64_t* types, int batch, int tokens, int threads,
         float* logits, const std::string& isa = "");

// The instruction sets that both this library and this CPU have, the best first: of "amx", "avx512", "portable".
std::vector<std::string> isas();

}  // namespace ernie_kqat
