// The product by the tiles of AMX (csrc/cpu/amx.h) gives the bits of a loop over Intel's pseudo-code. Without a
// library, so that an emulator can start it without an operating system. SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#if !__STDC_HOSTED__
// Bochs up to 3.1 takes the bits of STTILECFG for no instruction, so here the shape of tiles is always set.
#undef _tile_storeconfig
#define _tile_storeconfig(to) __builtin_memset(static_cast<void*>(to), 0, 64)
#endif

#include "cpu/amx.h"

using namespace fusedrnn;
using namespace fusedrnn::FUSEDRNN_LEVEL;

namespace {

constexpr int kRows = 16, kVectors = 4, kPairs = 64, kRow = 80, kProducts = 2, kSums = kRows * kVectors * 16;

unsigned random_state = 1;
unsigned random_bits() { return (random_state = random_state * 1664525u + 1013904223u) >> 8; }

// Two bfloat16 of either sign, from 2^-3 to 2^3, now and then a zero or a subnormal.
unsigned pair() {
  unsigned both = 0;
  for (int i = 0; i < 2; ++i) {
    const unsigned r = random_bits(), sign = r & 0x8000, exponent = 124 + (r >> 16) % 6;
    both = both << 16 | sign | (r % 31 ? exponent << 7 | (r & 0x7F) : r % 2 ? r & 0x7F : 0);
  }
  return both;
}
float as_float(unsigned bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
float number(float pair_, int i) {
  unsigned bits;
  __builtin_memcpy(&bits, &pair_, 4);
  return as_float(i ? bits & 0xFFFF0000u : bits << 16);
}

alignas(64) float memory_of_a[kProducts][kRows * kRow + 64], b[kProducts][kVectors * kPairs * 16];
alignas(64) float zeros[kRow], got[kSums], want[kSums];

void fill(float* to, int n) {
  for (int i = 0; i < n; ++i) to[i] = as_float(pair());
}

// What each output has to be.
void expected(const Product<float>* products, int count, int m, int n) {
  for (int v = 0; v < n; ++v)
    for (int i = 0; i < m; ++i)
      for (int lane = 0; lane < 16; ++lane) {
        float& sum = want[(v * m + i) * 16 + lane];
        for (const Product<float>* p = products; p < products + count; ++p)
          for (Index r = 0; r < p->runs; ++r)
            for (Index begin = 0; begin < p->run; begin += 16) {
              float first = 0, second = 0;
              for (Index k = begin; k < begin + 16 && k < p->run; ++k) {
                const float x = p->a[i][p->a_begin + r * p->a_run + k * p->a_step],
                            y = p->b[(r * p->run + k) * p->b_step + v * p->b_gap + lane];
                first = __builtin_fmaf(number(x, 0), number(y, 0), first);
                second = __builtin_fmaf(number(x, 1), number(y, 1), second);
              }
              sum += first + second;
            }
      }
}

enum Rows { evenly, anywhere, columns, kinds };

bool right(int kind, int m, int n, Index runs, Index run, bool side_by_side, int count) {
  const float* rows[kProducts][kRows];
  Product<float> products[kProducts];
  for (int i = 0; i < count; ++i) {
    float* const a = memory_of_a[i];
    const float nan = as_float(0x7FC07FC0);  // pairs that no product may read
    for (float& x : memory_of_a[i]) x = nan;
    for (float& x : b[i]) x = nan;
    const Index pairs = runs * run, a_run = kind == columns ? run * kRow / 4 : run + 1;
    fill(b[i], int(side_by_side ? n * pairs * 16 : ((n - 1) * kPairs + pairs) * 16));
    for (int j = 0; j < m; ++j)
      rows[i][j] = kind == columns ? a + j : kind == evenly ? a + j * kRow : a + j * j % m * kRow;
    if (kind == anywhere && m > 2) rows[i][1] = zeros;
    const Index step = kind == columns ? kRow / 4 : 1;
    for (int j = 0; j < m; ++j)
      for (Index r = 0; r < runs; ++r)
        for (Index k = 0; k < run; ++k)
          if (rows[i][j] != zeros) const_cast<float*>(rows[i][j])[r * a_run + k * step] = as_float(pair());
    products[i] = {rows[i], 0,  step, a_run, b[i], side_by_side ? n * 16 : 16, side_by_side ? 16 : kPairs * 16,
                   runs,    run};
  }
  fill(got, kSums);
  for (int i = 0; i < kSums; ++i) want[i] = number(got[i], 1), got[i] = want[i];
  expected(products, count, m, n);
  tile_for<AmxPairs>(m, n)(products, count, got);
  return __builtin_memcmp(got, want, sizeof got) == 0;  // nor is anything else written
}

}  // namespace

// -> the problems whose bits differ; `done`: how many there were.
int amx_test(int* done) {
  const unsigned word = 0x9FC0;  // that of the kernels
  asm volatile("ldmxcsr %0" : : "m"(word));
  int wrong = 0;
  const Index sizes[][2] = {{1, 1}, {1, 15}, {1, 16}, {1, 17}, {1, 48}, {1, 61}, {3, 8}, {2, 24}, {4, 3}, {1, 0}};
  for (int kind = 0; kind < kinds; ++kind)
    for (int m = 1; m <= kRows; m += m < 3 || m > 14 ? 1 : 4)
      for (int n = 1; n <= kVectors; ++n)
        for (const auto& size : sizes)
          for (int count = 1; count <= kProducts; ++count, ++*done)
            wrong += !right(kind, m, n, size[0], size[1], (m + n + count) % 2, count);
  AmxPairs::release();
  return wrong;
}

#if __STDC_HOSTED__
#include <stdio.h>
int main() {
  int done = 0;
  const int wrong = amx_test(&done);
  printf("%d problems, %d wrong\n", done, wrong);
}
#else
extern "C" {

extern char __bss_start[], _end[];

void* memset(void* to, int value, size_t n) {
  void* at = to;
  asm volatile("rep stosb" : "+D"(at), "+c"(n) : "a"(value) : "memory");
  return to;
}
void* memcpy(void* to, const void* from, size_t n) {
  void* at = to;
  asm volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(n) : : "memory");
  return to;
}
int memcmp(const void* a, const void* b, size_t n) {
  for (size_t i = 0; i < n; ++i)
    if (static_cast<const char*>(a)[i] != static_cast<const char*>(b)[i]) return 1;
  return 0;
}

void put(const char* text, unsigned short port) {
  for (; *text; ++text) asm volatile("outb %0, %1" : : "a"(*text), "d"(port));
}
void put_number(int n) {
  if (n > 9) put_number(n / 10);
  const char digit[] = {char('0' + n % 10), 0};
  put(digit, 0xE9);
}

// Where amx_boot.S goes on to: prints to Bochs' port for that, and ends it by another.
void start() {
  memset(__bss_start, 0, size_t(_end - __bss_start));
  int done = 0;
  const int wrong = amx_test(&done);
  put_number(done), put(" problems, ", 0xE9), put_number(wrong), put(" wrong\n", 0xE9);
  put("Shutdown", 0x8900);
}

}  // extern "C"
#endif
