// The encoder without Paddle, for ctypes: tests choose the instruction set, and run it under sanitizers.
#include <cstdio>
#include <exception>

#include "encoder.h"

using namespace ernie_kqat;

extern "C" __attribute__((visibility("default"))) int run_encoder(
    const int* shape, int shape_count, const int* exact, int linears, const float* rounding, const float* epsilon, int norms,
    const void* words, int words_are_integers, int64_t word_rows, const float* places, int64_t place_rows, const float* kinds, int64_t kind_rows,
    const int8_t* integers, int64_t integer_count, const float* floats, int64_t float_count, const int32_t* shifts,
    int64_t shift_count, const int64_t* ids, const int64_t* types, int batch, int tokens, int threads, float* logits,
    const char* isa, char* message, int message_size) {
  try {
    Contents contents = {{shape, shape + shape_count}, {exact, exact + linears}, {rounding, rounding + 4 * linears},
                         {epsilon, epsilon + norms}, words_are_integers ? nullptr : static_cast<const float*>(words), places,
                         kinds, words_are_integers ? static_cast<const int8_t*>(words) : nullptr, word_rows, place_rows, kind_rows,
                         integers, floats, shifts, integer_count, float_count, shift_count};
    run(assemble(contents), ids, types, batch, tokens, threads, logits, isa);
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, message_size, "%s", error.what());
    return 1;
  }
}

extern "C" __attribute__((visibility("default"))) const char* encoder_isas() {
  static std::string names;
  names.clear();
  for (const std::string& name : isas()) names += (names.empty() ? "" : " ") + name;
  return names.c_str();
}
