// Vectors of 16 floats or integers in the compiler's own vector types, which it lowers to whatever the target has.
// Everything has internal linkage: the same source is compiled for several instruction sets.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "encoder.h"

namespace ernie_kqat {
namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

#define INLINE_METHOD inline __attribute__((always_inline))
#define INLINE static INLINE_METHOD

template <class V, class T>
INLINE V load(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}
template <class V, class T>
INLINE void store(T* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

INLINE Floats all(float value) { return Floats{} + value; }

#if defined(__AVX512F__)
INLINE Floats smaller(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE float sum(Floats a) { return _mm512_reduce_add_ps((__m512)a); }
INLINE int32_t sum(Ints a) { return _mm512_reduce_add_epi32((__m512i)a); }
INLINE Ints larger(Ints a, Ints b) { return (Ints)_mm512_max_epi32((__m512i)a, (__m512i)b); }
INLINE int32_t largest(Ints a) { return _mm512_reduce_max_epi32((__m512i)a); }
INLINE float largest(Floats a) { return _mm512_reduce_max_ps((__m512)a); }
#else
INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
INLINE Ints larger(Ints a, Ints b) { return a > b ? a : b; }
template <class V>
INLINE auto sum(V a) {
  auto total = a[0];
  for (int lane = 1; lane < LANES; lane++) total += a[lane];
  return total;
}
template <class V>
INLINE auto largest(V a) {
  auto most = a[0];
  for (int lane = 1; lane < LANES; lane++) most = a[lane] > most ? a[lane] : most;
  return most;
}
#endif

constexpr float ROUND = 12582912.0f;  // 1.5 x 2^23: adding it leaves the integer nearest to x, half to even, in the low bits

// A Rounding in every lane.
struct Roundings {
  explicit INLINE_METHOD Roundings(const Rounding& one)
      : inverse_step(all(one.inverse_step)), offset(all(one.offset)), low(all(one.low)), high(all(one.high)) {}
  const Floats inverse_step, offset, low, high;
};

// The integers of x + ROUND, 0..255.
INLINE Bytes low_bytes(Floats shifted) {
  Ints bits;
  std::memcpy(&bits, &shifted, sizeof bits);
#if defined(__AVX512F__)
  return (Bytes)_mm512_cvtepi32_epi8((__m512i)bits);
#else
  return __builtin_convertvector(bits & 255, Bytes);
#endif
}

// The bytes q + 128 of 16 values.
INLINE Bytes quantized(Floats x, const Roundings& rounding) {
  Floats q = smaller(larger((x - rounding.offset) * rounding.inverse_step, rounding.low), rounding.high);
  return low_bytes(q + all(ROUND + 128.0f));
}

// To the nearest bfloat16 number, ties to even.
INLINE Floats rounded(Floats x) {
  Ints bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

// e^x to 2e-7 relative; x below -87 counts as -87.
INLINE Floats exponential(Floats x) {
  x = smaller(larger(x, all(-87.0f)), all(88.0f));
  Floats shifted = x * 1.44269504f + ROUND;
  Floats whole = shifted - ROUND;
  Floats rest = x - whole * 0.693359375f;
  rest = rest + whole * 2.12194440e-4f;
  Floats power = all(1.9875691500e-4f);
  power = power * rest + 1.3981999507e-3f;
  power = power * rest + 8.3334519073e-3f;
  power = power * rest + 4.1665795894e-2f;
  power = power * rest + 1.6666665459e-1f;
  power = power * rest + 5.0000001201e-1f;
  power = power * (rest * rest) + rest + 1.0f;
  Ints bits, exponent;
  std::memcpy(&bits, &power, sizeof bits);
  std::memcpy(&exponent, &shifted, sizeof exponent);
  bits += exponent << 23;  // the bits of ROUND itself are shifted out
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

// 2^x to 2e-7 relative, for x <= 0; x below -126 counts as -126.
INLINE Floats power_of_two(Floats x) {
  x = larger(x, all(-126.0f));
  const Floats shifted = x + ROUND, rest = x - (shifted - ROUND);
  Floats power = all(1.327647129e-3f);
  power = power * rest + 9.675540961e-3f;
  power = power * rest + 5.550713092e-2f;
  power = power * rest + 2.402212024e-1f;
  power = power * rest + 6.931469440e-1f;
  power = power * rest + 1.0f;
  return (Floats)((Ints)power + ((Ints)shifted << 23));
}

// x Phi(x) to 8e-7: Phi(x) = 1/2 + x P(x^2), P fitted to its Chebyshev points where |x| <= 5.25, constant beyond.
INLINE Floats gelu(Floats x) {
  constexpr float P[] = {0.13465934991836548f,    -0.06712685525417328f,  0.04964611679315567f,   -0.03976208716630936f,
                         0.03202547878026962f,    -0.02505388855934143f,  0.01857839711010456f,   -0.012729699723422527f,
                         0.0082929078489542f,     -0.00553203234449029f,  0.0030923488084226847f, -0.0009666483965702355f,
                         0.0005071352934464812f,  -0.0006808799225836992f, 0.00028844972257502377f};
  Floats inside = smaller(larger(x, all(-5.25f)), all(5.25f));
  Floats u = inside * inside * (2.0f / (5.25f * 5.25f)) - 1.0f;
  Floats value = all(P[14]);
#pragma GCC unroll 14
  for (int power = 13; power >= 0; power--) value = value * u + P[power];
  return x * (inside * value + 0.5f);
}

INLINE Floats relu(Floats x) { return larger(x, Floats{}); }

// tanh to 2e-7, absolute.
INLINE Floats hyperbolic_tangent(Floats x) { return 1.0f - 2.0f / (exponential(x + x) + 1.0f); }

}  // namespace
}  // namespace ernie_kqat
