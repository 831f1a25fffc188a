// The order of the work. Rows of tokens lie one after another without padding: a padded token would get a weight of
// exp(-1e4) = 0 in every softmax, so leaving it out changes nothing.
#include "encoder.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>
#include <stdexcept>

#include "kernels.h"

namespace ernie_kqat {
namespace {

constexpr int BLOCK_TOKENS = 1024;  // through all layers at once: the weights come from memory once for as many
constexpr int GROUP_TOKENS = 192;   // through one layer at once: its activations stay in the second cache
constexpr int BLOCKS_A_THREAD = 2;

struct Sentence {
  int first, count;  // rows of its block
  bool skip_first;   // the first token is padding, though others are not
  int index;         // row of the batch
};

struct Block {
  std::vector<Sentence> sentences;
  std::vector<int> ids, types, positions;
  int rows() const { return int(ids.size()); }
};

template <class T>
class Buffer {
 public:
  // At least `count` values, on a cache line; what was there is lost when it grows. New memory is 0.
  T* get(int64_t count) {
    if (count > size_) {
      const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
      memory_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
      size_ = memory_ ? count : 0;
      if (!memory_) throw std::bad_alloc();
      std::memset(memory_.get(), 0, bytes);
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };
  std::unique_ptr<T, Free> memory_;
  int64_t size_ = 0;
};

// The memory of one thread, or of a team that shares a block; kept from call to call.
struct Scratch {
  Buffer<float> rows, first_rows, query, key, value, context, inner, pooled, logits, attention;
  Buffer<uint8_t> bytes, first_bytes, context_bytes, inner_bytes, pooled_bytes;
  Buffer<uint8_t> query_bytes, key_bytes, value_bytes, integer_attention;
};

// One block through the encoder, done by a team of threads that each make one of these over the same scratch.
class Pass {
 public:
  Pass(const Encoder& encoder, const Kernels& kernels, const Block& block, Scratch& scratch, Part part)
      : e_(encoder), k_(kernels), block_(block), s_(scratch), part_(part), hidden_(padded(e_.hidden, WIDTH)),
        head_(padded(e_.head_width, LANES)), attention_(padded(e_.heads * head_, WIDTH)),
        intermediate_(padded(e_.intermediate, WIDTH)) {}

  // Every buffer as large as this block needs. By one thread, before the others start.
  void reserve() {
    const int64_t rows = padded(block_.rows(), ROWS) + ROWS, firsts = padded(int(block_.sentences.size()), ROWS);
    const int64_t group = std::min<int64_t>(rows, GROUP_TOKENS + longest() + 2 * ROWS), wide = std::max(group, firsts);
    s_.rows.get(rows * hidden_);
    s_.bytes.get(rows * hidden_);
    s_.first_rows.get(firsts * hidden_);
    s_.first_bytes.get(firsts * hidden_);
    s_.pooled.get(firsts * hidden_);
    s_.pooled_bytes.get(firsts * hidden_);
    s_.logits.get(firsts * padded(e_.classes, WIDTH));
    s_.context.get(wide * attention_);
    if (e_.integer_attention) {
      for (Buffer<uint8_t>* buffer : {&s_.query_bytes, &s_.key_bytes, &s_.value_bytes}) buffer->get(wide * attention_);
      s_.integer_attention.get(part_.parts * share_of_bytes());
    } else {
      for (Buffer<float>* buffer : {&s_.query, &s_.key, &s_.value}) buffer->get(wide * attention_);
      s_.attention.get(int64_t(part_.parts) * attention_scratch(longest(), head_));
    }
    s_.context_bytes.get(wide * attention_);
    s_.inner.get(wide * intermediate_);
    s_.inner_bytes.get(wide * intermediate_);
  }

  void run(float* logits) {
    k_.begin();
    embed();
    for (size_t l = 0; l + 1 < e_.layers.size(); l++) layer(e_.layers[l], e_.layers[l + 1].query);
    last_layer(e_.layers.back());
    classify(logits);
    k_.end();
  }

 private:
  int longest() const {
    int most = 1;
    for (const Sentence& one : block_.sentences) most = std::max(most, one.count);
    return most;
  }

  // Of the scratch of attention on integers, a thread's.
  int64_t share_of_bytes() const { return integer_attention_scratch(longest(), head_); }

  void wait() const {
    if (part_.parts > 1) {
#pragma omp barrier
    }
  }

  int from(int count) const { return int(int64_t(count) * part_.part / part_.parts); }
  int to(int count) const { return int(int64_t(count) * (part_.part + 1) / part_.parts); }

  void embed() {
    float* rows = s_.rows.get(0);
    for (int r = from(block_.rows()); r < to(block_.rows()); r++) {
      float* row = rows + int64_t(r) * hidden_;
      const float* place = e_.places + int64_t(block_.positions[r]) * e_.hidden;
      const float* kind = e_.kinds + int64_t(block_.types[r]) * e_.hidden;
      look_up(block_.ids[r], row);
      for (int i = 0; i < e_.hidden; i++) row[i] = row[i] + place[i] + kind[i];
      std::memset(row + e_.hidden, 0, sizeof(float) * (hidden_ - e_.hidden));
      k_.normalize(row, e_.hidden, e_.embedded);
      quantize(row, e_.layers[0].query, s_.bytes.get(0) + int64_t(r) * hidden_);
    }
    wait();
  }

  void look_up(int id, float* row) const {
    const int64_t at = int64_t(id) * e_.hidden;
    if (!e_.word_integers) {
      std::memcpy(row, e_.words + at, sizeof(float) * e_.hidden);
      return;
    }
    for (int i = 0; i < e_.hidden; i++) row[i] = float(e_.word_integers[at + i]) * e_.word_steps[id];
  }

  void quantize(const float* row, const Linear& linear, uint8_t* bytes) const {
    if (linear.integers) k_.quantize(row, linear.in, linear.rounding, bytes);
  }

  // LayerNorm of rows that a product was added to, and their bytes for the next Linear.
  void normalize(float* rows, int count, const Norm& norm, const Linear& next, uint8_t* bytes) const {
    for (int r = from(count); r < to(count); r++) {
      k_.normalize(rows + int64_t(r) * hidden_, e_.hidden, norm);
      quantize(rows + int64_t(r) * hidden_, next, bytes + int64_t(r) * hidden_);
    }
    wait();
  }

  // Bytes of the rows for `next`, unless those for `previous` will do.
  void prepare(const float* rows, int count, const Linear& previous, const Linear& next, uint8_t* bytes) const {
    if (!next.integers || (previous.integers && previous.rounding == next.rounding)) return;
    wait();
    for (int r = from(count); r < to(count); r++)
      quantize(rows + int64_t(r) * hidden_, next, bytes + int64_t(r) * hidden_);
    wait();
  }

  void product(const Linear& linear, const uint8_t* bytes, const float* reals, int rows, const Sink& sink) const {
    k_.product(linear, bytes, reals, rows, part_, sink);
  }

  Sink store(float* reals, int stride) const {
    Sink sink;
    sink.reals = reals;
    sink.stride = stride;
    return sink;
  }

  Sink add(float* reals) const {
    Sink sink = store(reals, hidden_);
    sink.add = true;
    return sink;
  }

  // What `next` reads: bytes, or floats where it is left in float.
  Sink input_of(const Linear& next, uint8_t* bytes, float* reals, Activation activation) const {
    Sink sink = store(reals, next.in);
    if (next.integers) {
      sink.bytes = bytes;
      sink.rounding = next.rounding;
    }
    sink.activation = activation;
    return sink;
  }

  // Queries, keys or values: bytes where attention is on integers.
  Sink to_attention(const Rounding& rounding, Buffer<uint8_t>& bytes, Buffer<float>& reals) const {
    Sink sink = store(reals.get(0), attention_);
    if (e_.integer_attention) {
      sink.bytes = bytes.get(0);
      sink.rounding = rounding;
    }
    return sink;
  }

  // Calls work(first sentence, last sentence, first row, rows) for groups of whole sentences.
  template <class Work>
  void groups(Work work) const {
    const auto& all = block_.sentences;
    for (size_t first = 0, last = 0; first < all.size(); first = last) {
      int rows = 0;
      while (last < all.size() && (rows == 0 || rows + all[last].count <= GROUP_TOKENS)) rows += all[last++].count;
      work(first, last, all[first].first, rows);
    }
  }

  void layer(const Layer& layer, const Linear& next) {
    groups([&](size_t first, size_t last, int row, int rows) {
      float* residual = s_.rows.get(0) + int64_t(row) * hidden_;
      uint8_t* bytes = s_.bytes.get(0) + int64_t(row) * hidden_;
      product(layer.query, bytes, residual, rows, to_attention(layer.attention.query, s_.query_bytes, s_.query));
      keys_and_values(layer, residual, bytes, rows);
      attend(layer, first, last, row, false);
      feed(layer, residual, bytes, rows, next);
    });
  }

  // Only the first token of each sentence is looked at after the last layer; its keys and values are those of all tokens.
  void last_layer(const Layer& layer) {
    const int count = int(block_.sentences.size());
    float* firsts = s_.first_rows.get(0);
    uint8_t* bytes = s_.first_bytes.get(0);
    for (int i = from(count); i < to(count); i++) {
      const int64_t row = block_.sentences[i].first;
      std::memcpy(firsts + int64_t(i) * hidden_, s_.rows.get(0) + row * hidden_, sizeof(float) * hidden_);
      std::memcpy(bytes + int64_t(i) * hidden_, s_.bytes.get(0) + row * hidden_, hidden_);
    }
    wait();
    product(layer.query, bytes, firsts, count, to_attention(layer.attention.query, s_.query_bytes, s_.query));
    groups([&](size_t first, size_t last, int row, int rows) {
      keys_and_values(layer, s_.rows.get(0) + int64_t(row) * hidden_, s_.bytes.get(0) + int64_t(row) * hidden_, rows);
      attend(layer, first, last, row, true);
    });
    feed(layer, firsts, bytes, count, e_.pooler);
  }

  void keys_and_values(const Layer& layer, const float* rows, uint8_t* bytes, int count) {
    prepare(rows, count, layer.query, layer.key, bytes);
    product(layer.key, bytes, rows, count, to_attention(layer.attention.key, s_.key_bytes, s_.key));
    prepare(rows, count, layer.key.integers ? layer.key : layer.query, layer.value, bytes);
    product(layer.value, bytes, rows, count, to_attention(layer.attention.value, s_.value_bytes, s_.value));
    wait();
  }

  // The attention of sentences [first, last) to the input of layer.out; queries, keys and values begin at row `row`.
  void attend(const Layer& layer, size_t first, size_t last, int row, bool only_first) {
    const int heads = int(last - first) * e_.heads;
    for (int i = from(heads); i < to(heads); i++) {
      const size_t sentence = first + i / e_.heads;
      const Sentence& one = block_.sentences[sentence];
      const int64_t column = int64_t(i % e_.heads) * head_, at = int64_t(one.first - row) * attention_ + column;
      const int64_t query = only_first ? int64_t(sentence) * attention_ + column : at;
      const int queries = only_first ? 1 : one.count;
      const Sink sink = input_of(layer.out, s_.context_bytes.get(0) + query, s_.context.get(0) + query, Activation::none);
      if (e_.integer_attention) {
        const IntegerHead head = {s_.query_bytes.get(0) + query, s_.key_bytes.get(0) + at, s_.value_bytes.get(0) + at, attention_,
                                  queries, one.count, head_, one.skip_first, layer.attention.score_step, layer.attention.value_step};
        k_.attend_integers(head, s_.integer_attention.get(0) + part_.part * share_of_bytes(), sink);
      } else {
        const Head head = {s_.query.get(0) + query, s_.key.get(0) + at, s_.value.get(0) + at, attention_,
                           queries, one.count, head_, one.skip_first};
        k_.attend(head, s_.attention.get(0) + int64_t(part_.part) * attention_scratch(longest(), head_), sink);
      }
    }
    wait();
  }

  // What follows the attention in a layer.
  void feed(const Layer& layer, float* residual, uint8_t* bytes, int rows, const Linear& next) {
    product(layer.out, s_.context_bytes.get(0), s_.context.get(0), rows, add(residual));
    wait();
    normalize(residual, rows, layer.after_attention, layer.up, bytes);
    product(layer.up, bytes, residual, rows, input_of(layer.down, s_.inner_bytes.get(0), s_.inner.get(0), e_.activation));
    wait();
    product(layer.down, s_.inner_bytes.get(0), s_.inner.get(0), rows, add(residual));
    wait();
    normalize(residual, rows, layer.after_feed_forward, next, bytes);
  }

  void classify(float* logits) {
    const int count = int(block_.sentences.size()), width = padded(e_.classes, WIDTH);
    product(e_.pooler, s_.first_bytes.get(0), s_.first_rows.get(0), count,
            input_of(e_.classifier, s_.pooled_bytes.get(0), s_.pooled.get(0), Activation::tanh));
    wait();
    product(e_.classifier, s_.pooled_bytes.get(0), s_.pooled.get(0), count, store(s_.logits.get(0), width));
    wait();
    for (int i = from(count); i < to(count); i++)
      std::memcpy(logits + int64_t(block_.sentences[i].index) * e_.classes, s_.logits.get(0) + int64_t(i) * width,
                  sizeof(float) * e_.classes);
  }

  const Encoder& e_;
  const Kernels& k_;
  const Block& block_;
  Scratch& s_;
  const Part part_;
  const int hidden_, head_, attention_, intermediate_;
};

void require_id(int64_t id, int rows, const char* what) {
  if (id < 0 || id >= rows)
    throw std::invalid_argument(std::string(what) + " " + std::to_string(id) + " is not in 0.." + std::to_string(rows - 1));
}

// The tokens of a row that are no padding; all of them where nothing else is there, as softmax then ignores the mask.
void add_sentence(const Encoder& encoder, const int64_t* ids, const int64_t* types, int tokens, int index, Block& block) {
  const int first = block.rows();
  const bool all = std::all_of(ids, ids + tokens, [&](int64_t id) { return id == encoder.pad_token; });
  for (int t = 0; t < tokens; t++) {
    require_id(ids[t], encoder.vocabulary, "input_ids:");
    require_id(types[t], encoder.types, "token_type_ids:");
    if (!all && t > 0 && ids[t] == encoder.pad_token) continue;
    block.ids.push_back(int(ids[t]));
    block.types.push_back(int(types[t]));
    block.positions.push_back(t);
  }
  block.sentences.push_back({first, block.rows() - first, !all && ids[0] == encoder.pad_token, index});
}

// About as many as add_sentence takes: the first token may be padding and is taken all the same.
int64_t real_tokens(const int64_t* ids, int tokens, int64_t pad_token) {
  const int64_t padding = std::count(ids, ids + tokens, pad_token);
  return padding == tokens ? tokens : tokens - padding;
}

// Enough blocks for each of several threads to take some, as long as a block is worth the weights that it reads.
std::vector<Block> blocks_of(const Encoder& encoder, const int64_t* ids, const int64_t* types, int batch, int tokens, int threads) {
  std::vector<int64_t> lengths(batch);
  for (int row = 0; row < batch; row++) lengths[row] = real_tokens(ids + int64_t(row) * tokens, tokens, encoder.pad_token);
  int64_t limit = BLOCK_TOKENS;
  if (threads > 1 && batch >= threads) {
    const int64_t share = (std::accumulate(lengths.begin(), lengths.end(), int64_t{0}) + threads - 1) / threads;
    limit = std::min(limit, std::max(share / BLOCKS_A_THREAD, std::min<int64_t>(share, GROUP_TOKENS)));
  }
  std::vector<Block> blocks;
  for (int row = 0; row < batch; row++) {
    if (blocks.empty() || blocks.back().rows() + lengths[row] > limit) blocks.emplace_back();
    add_sentence(encoder, ids + int64_t(row) * tokens, types + int64_t(row) * tokens, tokens, row, blocks.back());
  }
  return blocks;
}

Scratch& own_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

// Each thread takes a block after another. A counter, not `omp for schedule(dynamic)`: of the two OpenMP libraries in the
// process, g++'s loop would reach the one that did not start these threads, which lets each of them do all the blocks.
void run_apart(const Encoder& encoder, const Kernels& kernels, const std::vector<Block>& blocks, int threads, float* logits) {
  std::exception_ptr failed;
  std::atomic<size_t> next{0};
#pragma omp parallel num_threads(threads) if (threads > 1)
  for (size_t i = next++; i < blocks.size(); i = next++) {
    try {
      Pass pass(encoder, kernels, blocks[i], own_scratch(), {0, 1});
      pass.reserve();
      pass.run(logits);
    } catch (...) {
#pragma omp critical
      failed = std::current_exception();
    }
  }
  if (failed) std::rethrow_exception(failed);
}

// All threads share a block.
void run_together(const Encoder& encoder, const Kernels& kernels, const Block& block, int threads, float* logits) {
  Scratch& scratch = own_scratch();
  Pass(encoder, kernels, block, scratch, {0, threads}).reserve();
#pragma omp parallel num_threads(threads)
  Pass(encoder, kernels, block, scratch, {omp_get_thread_num(), omp_get_num_threads()}).run(logits);
}

}  // namespace

void run(const Encoder& encoder, const int64_t* ids, const int64_t* types, int batch, int tokens, int threads,
         float* logits, const std::string& isa) {
  if (batch < 0 || tokens < 1 || tokens > encoder.positions || threads < 1)
    throw std::invalid_argument("input_ids: " + std::to_string(tokens) + " tokens a row, not in 1.." + std::to_string(encoder.positions));
  const Kernels& best = kernels(isa);
  const std::vector<Block> blocks = blocks_of(encoder, ids, types, batch, tokens, threads);
  if (int(blocks.size()) >= threads)
    return run_apart(encoder, best, blocks, threads, logits);
  for (const Block& block : blocks) run_together(encoder, best, block, threads, logits);
}

}  // namespace ernie_kqat
