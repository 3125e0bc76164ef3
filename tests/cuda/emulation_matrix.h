// The matrix units on a CPU: included by emulation.h. SPDX-License-Identifier: Apache-2.0
//
// The lanes exchange all factors, and each works out its own sums. The layouts are those of PTX: a lane is g = lane /
// 4, t = lane % 4. What the emulation cannot show is that the instructions keep to them.
#pragma once
#include <cmath>

namespace fusedrnn {
namespace cuda {
namespace matrix {

inline float as_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof x);
  return bits;
}
// sums += a b with factors value(word, half); `halves` is 2 where a word has two elements.
template <class Value>
inline void multiply(float* sums, const uint32_t* a, const uint32_t* b, int halves, Value value,
                     emulation::Place place) {
  const uint32_t words[] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const emulation::Words& all = emulation::exchange(words, 6, -halves, place);
  const int self = int(threadIdx.x % kWarp), g = self / 4, t = self % 4;
  for (int i = 0; i < 4; ++i) {
    const int upper = i / 2, row = g, column = 2 * t + i % 2;  // of (16, 8): row + 8 * upper
    double sum = sums[i];
    for (int k = 0; k < 8 * halves; ++k) {
      const int second = k / (4 * halves), owner = k % (4 * halves) / halves, half = k % halves;
      const float x = value(all.of_lane[row * 4 + owner][2 * second + upper], half);
      const float y = value(all.of_lane[column * 4 + owner][4 + second], half);
      sum += double(x) * y;
    }
    sums[i] = float(sum);
  }
}

}  // namespace matrix

inline float of_bf16(uint16_t bits) { return matrix::as_float(uint32_t(bits) << 16); }
inline float of_fp16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float size = exponent == 31  ? (mantissa ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(float(mantissa), -24)
                                     : std::ldexp(float(mantissa + 1024), exponent - 25);
  return bits >> 15 ? -size : size;
}

inline void multiply_tf32(float* sums, const uint32_t* a, const uint32_t* b, const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
  matrix::multiply(sums, a, b, 1, [](uint32_t word, int) { return matrix::as_float(word & ~0x1fffu); }, {file, line});
}
inline void multiply_bf16(float* sums, const uint32_t* a, const uint32_t* b, const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
  matrix::multiply(sums, a, b, 2, [](uint32_t word, int half) { return of_bf16(uint16_t(half ? word >> 16 : word)); },
                   {file, line});
}
inline void multiply_fp16(float* sums, const uint32_t* a, const uint32_t* b, const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
  matrix::multiply(sums, a, b, 2, [](uint32_t word, int half) { return of_fp16(uint16_t(half ? word >> 16 : word)); },
                   {file, line});
}

// To nearest, ties away from zero.
inline uint32_t to_tf32(float x) {
  const uint32_t bits = matrix::as_bits(x);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}
// To nearest, ties to even.
inline uint16_t to_bf16(float x) {
  const uint32_t bits = matrix::as_bits(x);
  return uint16_t(x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
inline uint16_t to_fp16(float x) {
  const uint32_t sign = matrix::as_bits(x) >> 16 & 0x8000u;
  const float size = std::fabs(x);
  if (x != x) return 0x7fff;
  if (size >= 65520.0f) return uint16_t(sign | 0x7c00u);
  if (size < std::ldexp(1.0f, -14)) return uint16_t(sign | uint32_t(std::nearbyint(std::ldexp(size, 24))));
  int exponent;
  const float mantissa = std::frexp(size, &exponent);  // from 1/2 to 1
  // A mantissa that rounds up to 2048 carries into the exponent by itself.
  return uint16_t(sign | ((uint32_t(exponent + 13) << 10) + uint32_t(std::nearbyint(std::ldexp(mantissa, 11)))));
}

}  // namespace cuda
}  // namespace fusedrnn
