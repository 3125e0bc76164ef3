// How far sigmoid, tanh and exp of csrc/simd/math.h are from the truth, in units in the last place (ULP), for one
// level.
//
// float32: every one of the 2^32 inputs (or each STRIDE-th) against double precision. float64: seeded samples against
// long double. Both with subnormals flushed (as in the kernels) and kept. ulp_sweep.py builds, runs and compares all
// levels; by hand, once per level (from the repository's root):
//
//   g++ -std=c++17 -O3 -ffp-contract=off -fno-math-errno -Icsrc -DFUSEDRNN_LEVEL=avx512 -DFUSEDRNN_LEVEL_AVX512
//       -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma bench/ulp_sweep.cpp -o ulp_avx512 && ./ulp_avx512 1
//
// Prints one JSON object: the largest error, the input it was met at, counts of broken promises (NaN that did not
// stay NaN and the reverse, tanh(-x) other than -tanh(x)), and a hash of all output bits, by which levels are compared.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <chrono>

#include "cpu/control_word.h"
#include "simd/activation_table.h"

using fusedrnn::cpu::ControlWord;
using fusedrnn::FUSEDRNN_LEVEL::apply_activation;

#define STRING(x) #x
#define NAME(x) STRING(x)

static const char* const kNames[] = {"sigmoid", "tanh", "exp"};
static constexpr int kBlock = 4096;

template <class T>
struct Format;
template <>
struct Format<float> {
  using Bits = uint32_t;
  using Wide = double;
  static constexpr int mantissa = 23, least = -126;
};
template <>
struct Format<double> {
  using Bits = uint64_t;
  using Wide = long double;
  static constexpr int mantissa = 52, least = -1022;
};

template <class To, class From>
static To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

// In double the series stand where they are good to 2^-44 of the result, to spare 4 of 5 library calls.
static double truth(int which, float x) {
  const double a = fabs(double(x)), v = x;
  if (which == 0) return a < 0x1p-10 ? 0.5 + v / 4 - v * v * v / 48 : v > 45 ? 1 : v < -110 ? 0 : 1 / (1 + exp(-v));
  if (which == 1) return a < 0x1p-12 ? v - v * v * v / 3 : a > 20 ? copysign(1, v) : tanh(v);
  return a < 0x1p-12 ? 1 + v + v * v / 2 : v > 100 ? double(INFINITY) : v < -110 ? 0 : exp(v);
}
static long double truth(int which, double x) {
  const long double v = x;
  return which == 0 ? 1 / (1 + expl(-v)) : which == 1 ? tanhl(v) : expl(v);
}

// 2^exponent of the binade of x (a normal number of the wide type).
static double binade(double x) { return bits_of<double>(bits_of<uint64_t>(x) & 0x7FF0000000000000u); }
static long double binade(long double x) { return ldexpl(1, ilogbl(x)); }

struct Worst {
  double ulp = 0, x = 0;
  uint64_t hash = 0, nan_errors = 0, odd_errors = 0, flushed = 0;
};

template <class T>
static void measure(const T* x, const T* got, const typename Format<T>::Wide* want, int n, Worst* w) {
  using Wide = typename Format<T>::Wide;
  static const Wide smallest = ldexpl(1, Format<T>::least), spacing = ldexpl(1, -Format<T>::mantissa);
  static const Wide overflow = ldexpl(1 - spacing / 4, 1 - Format<T>::least + 1);  // rounds to infinity from here on
  for (int i = 0; i < n; ++i) {
    const Wide a = want[i] < 0 ? -want[i] : want[i];
    w->hash = (w->hash ^ bits_of<typename Format<T>::Bits>(got[i])) * 0x9E3779B97F4A7C15u;
    w->hash ^= w->hash >> 29;
    if (isnan(x[i])) {
      w->nan_errors += !isnan(got[i]);
    } else if (isnan(got[i])) {
      ++w->nan_errors;
    } else if (a < smallest && got[i] == 0) {
      w->flushed += a != 0;
    } else {
      double ulp = 0;
      if (a >= overflow || isinf(got[i]))
        ulp = a >= overflow && isinf(got[i]) && (got[i] > 0) == (want[i] > 0) ? 0 : 1e9;  // one of them infinite
      else
        ulp = double(fabsl(got[i] - want[i]) / ((a < smallest ? smallest : binade(a)) * spacing));
      if (ulp > w->ulp) {
        w->ulp = ulp;
        w->x = double(x[i]);
      }
    }
  }
}

template <class T>
static T negative(T x) {
  using Bits = typename Format<T>::Bits;
  return bits_of<T>(bits_of<Bits>(x) ^ bits_of<Bits>(T(-0.0)));
}

template <class T>
static void block(int which, const T* x, int n, Worst* worst) {
  using Bits = typename Format<T>::Bits;
  static typename Format<T>::Wide want[kBlock];
  static T got[kBlock], negated[kBlock], mirror[kBlock];
  for (int i = 0; i < n; ++i) want[i] = truth(which, x[i]);
  for (int i = 0; i < n; ++i) negated[i] = negative(x[i]);
  for (int kept = 0; kept < 2; ++kept) {
    {
      const ControlWord word(!kept);
      apply_activation(which, x, got, n);
      apply_activation(which, negated, mirror, n);
    }
    measure(x, got, want, n, &worst[kept]);
    if (which == 1)
      for (int i = 0; i < n; ++i) worst[kept].odd_errors += bits_of<Bits>(negative(mirror[i])) != bits_of<Bits>(got[i]);
  }
}

static void sweep_float(int which, uint64_t stride, Worst* worst) {
  static float x[kBlock];
  for (uint64_t u = 0; u < (uint64_t(1) << 32);) {
    int n = 0;
    for (; n < kBlock && u < (uint64_t(1) << 32); u += stride) x[n++] = bits_of<float>(uint32_t(u));
    block(which, x, n, worst);
  }
}

static uint64_t next_random() {  // xorshift64*, seeded: every level sees the same samples
  static uint64_t state = 0x2545F4914F6CDD1Du;
  state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
  return state * 0x2545F4914F6CDD1Du;
}

static double sample(uint64_t i) {
  const uint64_t u = next_random();
  const double unit = double(u >> 11) * 0x1p-53, sign = u & 1 ? -1 : 1;
  const int near = int(u >> 1 & 0xFF) - 128;  // bits beside a border
  static const double borders[] = {0,        0x1p-1022, 0x1p-28,  0x1p-27, 1,        19.0615, 22,
                                   36.5,     36.7368,   37.4299,  60,      708.3964, 709,     709.4361,
                                   709.7827, 710.4758,  745.1332, 746,     1e30,     INFINITY};
  switch (i % 4) {
    case 0:
      return sign * unit * 24;
    case 1:
      return sign * unit * 760;
    case 2:
      return sign * ldexp(1 + unit, int(next_random() % 1080) - 1070);  // every binade, subnormals too
    default: {
      const uint64_t v = next_random();
      const double k = double(v % 1100) + 0.5;  // where n changes: (k + 1/2) ln 2 of x, or of 2 x
      const double at = v & 1024   ? k * 0.69314718055994531
                        : v & 2048 ? k * 0.34657359027997264
                                   : borders[(v >> 32) % (sizeof borders / sizeof *borders)];
      return sign * bits_of<double>(bits_of<uint64_t>(at) + uint64_t(at == 0 ? near & 127 : isinf(at) ? 0 : near));
    }
  }
}

static void sweep_double(int which, uint64_t count, Worst* worst) {
  static double x[kBlock];
  for (uint64_t i = 0; i < count;) {
    int n = 0;
    for (; n < kBlock && i < count; ++i) x[n++] = sample(i);
    if (i <= kBlock) x[0] = NAN;
    block(which, x, n, worst);
  }
}

// Nanoseconds per element, on a buffer that stays in the first cache, subnormals flushed.
template <class T>
static double cost(int which) {
  static T x[1024], y[1024];
  for (T& e : x) e = T(double(next_random() >> 11) * 0x1p-53 * 12 - 6);
  const ControlWord word;
  double best = INFINITY;
  for (int round = 0; round < 20; ++round) {
    const auto start = std::chrono::steady_clock::now();
    for (int k = 0; k < 200; ++k) {
      apply_activation(which, x, y, 1024);
      asm volatile("" : : "r"(y) : "memory");
    }
    const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - start;
    if (taken.count() / (200 * 1024) < best) best = taken.count() / (200 * 1024);
  }
  return best;
}

static void show(const char* dtype, int which, const Worst* worst, double ns, const char* end) {
  printf("  \"%s %s\": {", kNames[which], dtype);
  for (int kept = 0; kept < 2; ++kept) {
    const Worst& w = worst[kept];
    printf(
        "\"%s\": {\"max_ulp\": %.4f, \"at\": \"%a\", \"nan_errors\": %llu, \"odd_errors\": %llu, \"flushed\": %llu, "
        "\"hash\": \"%016llx\"}, ",
        kept ? "subnormals kept" : "subnormals flushed", w.ulp, w.x, (unsigned long long)w.nan_errors,
        (unsigned long long)w.odd_errors, (unsigned long long)w.flushed, (unsigned long long)w.hash);
  }
  printf("\"ns_per_element\": %.3f}%s\n", ns, end);
}

int main(int argc, char** argv) {
  const uint64_t stride = argc > 1 ? strtoull(argv[1], nullptr, 10) : 0;
  if (stride < 1) {
    fprintf(stderr, "usage: %s STRIDE   (1: every float; 2^24 / STRIDE doubles per function)\n", argv[0]);
    return 2;
  }
  printf("{\"level\": \"%s\", \"stride\": %llu,\n", NAME(FUSEDRNN_LEVEL), (unsigned long long)stride);
  for (int which = 0; which < 3; ++which) {
    Worst f[2], d[2];
    sweep_float(which, stride, f);
    show("float32", which, f, cost<float>(which), ",");
    sweep_double(which, (uint64_t(1) << 24) / stride, d);
    show("float64", which, d, cost<double>(which), which == 2 ? "}" : ",");
  }
}
