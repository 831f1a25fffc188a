// From a program's flat arrays to an Encoder, every length checked.
#include <cmath>
#include <stdexcept>

#include "encoder.h"

namespace ernie_kqat {
namespace {

void require(bool true_thing, const char* message) {
  if (!true_thing) throw std::invalid_argument(message);
}

// Hands out the arrays in the order in which they were written.
class Reader {
 public:
  explicit Reader(const Contents& contents) : c_(contents) {}

  Linear linear(int in, int out) {
    require(linears_ < c_.exact.size(), "the program holds too few Linears");
    const float* numbers = c_.rounding.data() + 4 * linears_;
    const int number = c_.exact[linears_++];
    require(number >= 0 && number <= int(Exact::smoothed_alike), "a Linear of the program is of a kind that is not known");
    const Exact exact = Exact(number);
    Linear linear = {in, out, nullptr, nullptr, nullptr, nullptr, nullptr, {numbers[0], numbers[1], numbers[2], numbers[3], nullptr}};
    if (exact == Exact::smoothed) {
      smoothing_ = floats(in);
      smoothed_ = in;
    }
    if (exact == Exact::smoothed || exact == Exact::smoothed_alike) {
      require(smoothed_ == in, "a Linear of the program is smoothed like one of another width");
      linear.rounding.smoothing = smoothing_;
    }
    if (exact != Exact::no) {
      linear.integers = take(c_.integers, c_.integer_count, integers_, int64_t(in) * out);
      linear.shifts = take(c_.shifts, c_.shift_count, shifts_, out);
      linear.steps = floats(out);
    } else {
      linear.reals = floats(int64_t(in) * out);
    }
    linear.bias = floats(out);
    return linear;
  }

  // Of integers of `bits` bits, as ernie_kqat/export/native.py's `_rounding`.
  IntegerAttention attention(int bits, int head_width) {
    const float* steps = floats(3);
    const float high = float((1 << (bits - 1)) - 1);
    for (int i = 0; i < 3; i++) require(steps[i] > 0, "a step of attention is not positive");
    const auto rounding = [&](float step) { return Rounding{1.0f / step, 0, -high - 1, high, nullptr}; };
    return {rounding(steps[0]), rounding(steps[1]), rounding(steps[2]), steps[0] * steps[1] / std::sqrt(float(head_width)), steps[2]};
  }

  Norm norm(int width) {
    require(norms_ < c_.epsilon.size(), "the program holds too few LayerNorms");
    Norm norm = {floats(width), floats(width), 0};
    norm.epsilon = c_.epsilon[norms_++];
    return norm;
  }

  void finish() const {
    require(linears_ == c_.exact.size() && norms_ == c_.epsilon.size() && integers_ == c_.integer_count &&
                floats_ == c_.float_count && shifts_ == c_.shift_count,
            "the program holds more than its shape needs");
  }

  const float* floats(int64_t count) { return take(c_.floats, c_.float_count, floats_, count); }

 private:
  template <class T>
  static const T* take(const T* from, int64_t total, int64_t& used, int64_t count) {
    require(count <= total - used, "the program holds less than its shape needs");
    const T* found = from + used;
    used += count;
    return found;
  }

  const Contents& c_;
  size_t linears_ = 0, norms_ = 0;
  int64_t integers_ = 0, floats_ = 0, shifts_ = 0;
  const float* smoothing_ = nullptr;
  int smoothed_ = 0;  // width of smoothing_
};

constexpr int MOST = 1 << 20;  // of any width: products of two of them stay far from overflow

}  // namespace

Encoder assemble(const Contents& c) {
  require(c.shape.size() == 8 || c.shape.size() == 9, "the program's shape has neither 8 numbers nor 9");
  require(c.rounding.size() == 4 * c.exact.size(), "the program has not 4 rounding numbers for each Linear");
  Encoder e = {};
  int layers = 0, activation = 0, pad_token = 0;
  int* numbers[] = {&e.hidden, &e.heads, &e.head_width, &e.intermediate, &e.classes, &layers, &activation, &pad_token};
  for (int i = 0; i < 8; i++) {
    *numbers[i] = c.shape[i];
    require(c.shape[i] >= (i >= 6 ? 0 : 1) && c.shape[i] <= (i == 7 ? INT32_MAX : MOST), "a number of the program's shape is out of range");
  }
  const int bits = c.shape.size() == 9 ? c.shape[8] : 8;
  require(bits >= 2 && bits <= 8, "the program's attention has not 2 to 8 bits");
  e.integer_attention = c.shape.size() == 9;
  require(activation == 1 || activation == 2, "the program's activation is neither GELU nor ReLU");
  require(int64_t(e.heads) * e.head_width <= MOST, "the program's attention is too wide");
  require(c.word_rows > 0 && c.place_rows > 0 && c.kind_rows > 0 && c.word_rows <= INT32_MAX && c.place_rows <= INT32_MAX &&
              c.kind_rows <= INT32_MAX,
          "a table of embeddings is empty or too large");
  e.pad_token = pad_token;
  e.activation = Activation(activation);
  e.vocabulary = int(c.word_rows);
  e.positions = int(c.place_rows);
  e.types = int(c.kind_rows);
  require((c.words == nullptr) != (c.word_integers == nullptr), "the program needs words as floats or as integers");
  e.words = c.words;
  e.word_integers = c.word_integers;
  e.places = c.places;
  e.kinds = c.kinds;
  const int hidden = padded(e.hidden, WIDTH), intermediate = padded(e.intermediate, WIDTH);
  const int attention = padded(e.heads * padded(e.head_width, LANES), WIDTH);
  Reader reader(c);
  if (e.word_integers) e.word_steps = reader.floats(e.vocabulary);
  e.embedded = reader.norm(hidden);
  for (int l = 0; l < layers; l++) {
    Layer layer = {};
    if (e.integer_attention) layer.attention = reader.attention(bits, e.head_width);
    layer.query = reader.linear(hidden, attention);
    layer.key = reader.linear(hidden, attention);
    layer.value = reader.linear(hidden, attention);
    layer.out = reader.linear(attention, hidden);
    layer.after_attention = reader.norm(hidden);
    layer.up = reader.linear(hidden, intermediate);
    layer.down = reader.linear(intermediate, hidden);
    layer.after_feed_forward = reader.norm(hidden);
    e.layers.push_back(layer);
  }
  e.pooler = reader.linear(hidden, hidden);
  e.classifier = reader.linear(hidden, padded(e.classes, WIDTH));
  reader.finish();
  return e;
}

}  // namespace ernie_kqat
