// The interface of csrc/simd/vec.h and the special values of its activations, for one level.
// SPDX-License-Identifier: Apache-2.0
//
// Needs a compiler only: c++ -std=c++17 -ffp-contract=off -Icsrc -DFUSEDRNN_LEVEL=avx2 -DFUSEDRNN_LEVEL_AVX2 -mavx2
// -mfma tests/cpu/cpp/simd_test.cpp. tests/cpu/test_simd_cpp.py builds and runs it for every level. How far the
// activations are from the truth is measured elsewhere: tests/cpu/test_activations.py, bench/ulp_sweep.py.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>

#include "cpu/control_word.h"
#include "simd/activation_table.h"

using namespace fusedrnn::FUSEDRNN_LEVEL;

#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                  \
    }                                                                                \
  } while (0)

namespace {

std::mt19937_64 random_bits(20261120);

template <class T>
bool same(T a, T b) {  // the bits, or both NaN
  return (std::isnan(a) && std::isnan(b)) || std::memcmp(&a, &b, sizeof a) == 0;
}

// Numbers, zeros, infinities, subnormals and NaN of both signs, in every order over time.
template <class T>
T any_value() {
  using L = std::numeric_limits<T>;
  static const T special[] = {0, 1, T(0.5), 3, L::min(), L::denorm_min(), L::max(), L::infinity(), L::quiet_NaN()};
  const auto u = random_bits();
  const T x = u % 3 ? T(std::ldexp(double(u >> 12) * 0x1p-52 + 1, int(u >> 2 & 15) - 8)) : special[(u >> 8) % 9];
  return u & 1 ? -x : x;
}

template <class T>
struct Lanes {
  static constexpr int n = Vec<T>::lanes;
  T at[n];

  Lanes() {
    for (T& x : at) x = any_value<T>();
  }
  Lanes(Vec<T> v) { v.store(at); }
  Vec<T> vec() const { return Vec<T>::load(at); }
  T operator[](int i) const { return at[i]; }
};

template <class T>
T fused(T a, T b, T c) {
#if defined(FUSEDRNN_LEVEL_PORTABLE)
  return a * b + c;
#else
  return std::fma(a, b, c);
#endif
}

template <class T>
void arithmetic() {
  using V = Vec<T>;
  for (int round = 0; round < 20000; ++round) {
    const Lanes<T> a, b, c;
    const V va = a.vec(), vb = b.vec(), vc = c.vec();
    const T bound = std::isnan(a[0]) || a[0] == 0 ? T(2) : a[0];
    const Lanes<T> sum = va + vb, difference = va - vb, product = va * vb, quotient = va / vb, negated = -va;
    const Lanes<T> plus = fma(va, vb, vc), minus = fnma(va, vb, vc), positive = abs(va), signed_ = copysign(va, vb);
    const Lanes<T> least = min(V::set(bound), vb), most = max(V::set(bound), vb);
    const Lanes<T> above = select(greater(va, vb), va, vc), not_below = select(greater_equal(va, vb), va, vc);
    const Lanes<T> cleared = zero_where(greater(va, vb), vc), rectified = relu(va), zero = V::zero();
    for (int i = 0; i < V::lanes; ++i) {
      CHECK(same(sum[i], a[i] + b[i]));
      CHECK(same(difference[i], a[i] - b[i]));
      CHECK(same(product[i], a[i] * b[i]));
      CHECK(same(quotient[i], a[i] / b[i]));
      CHECK(same(negated[i], -a[i]) && std::signbit(negated[i]) != std::signbit(a[i]));
      CHECK(same(plus[i], fused(a[i], b[i], c[i])));
      CHECK(same(minus[i], fused(-a[i], b[i], c[i])));
      CHECK(same(positive[i], std::fabs(a[i])) && !std::signbit(positive[i]));
      CHECK(same(signed_[i], std::copysign(a[i], b[i])) && std::signbit(signed_[i]) == std::signbit(b[i]));
      CHECK(same(least[i], bound < b[i] ? bound : b[i]));
      CHECK(same(most[i], bound > b[i] ? bound : b[i]));
      CHECK(same(above[i], a[i] > b[i] ? a[i] : c[i]));
      CHECK(same(not_below[i], a[i] >= b[i] ? a[i] : c[i]));
      CHECK(same(cleared[i], a[i] > b[i] ? T(0) : c[i]));
      CHECK(same(rectified[i], a[i] <= 0 ? T(0) : a[i]));
      CHECK(same(zero[i], T(0)));
    }
  }
}

// Elements before and behind an array lie on pages that must not be touched.
template <class T>
void counts() {
  using V = Vec<T>;
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  char* memory =
      static_cast<char*>(mmap(nullptr, 3 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  CHECK(memory != MAP_FAILED);
  CHECK(mprotect(memory, page, PROT_NONE) == 0 && mprotect(memory + 2 * page, page, PROT_NONE) == 0);
  T* const first = reinterpret_cast<T*>(memory + page);
  T* const end = reinterpret_cast<T*>(memory + 2 * page);
  const int64_t far = int64_t(1) << 40;
  for (int64_t count :
       {-far, int64_t(-1), int64_t(0), int64_t(1), int64_t(2), int64_t(3), int64_t(4), int64_t(5), int64_t(7),
        int64_t(8), int64_t(9), int64_t(15), int64_t(16), int64_t(17), far, INT64_MAX, INT64_MIN}) {
    const int n = int(count < 0 ? 0 : count > V::lanes ? V::lanes : count);
    for (T* p : {end - n, first}) {
      const Lanes<T> values;
      for (int i = 0; i < n; ++i) p[i] = values[i];
      const Lanes<T> loaded = V::load(p, count);
      for (int i = 0; i < V::lanes; ++i) CHECK(same(loaded[i], i < n ? values[i] : T(0)));
      const T guard = T(1234.5);
      T* const behind = p + n < end ? p + n : nullptr;
      if (behind) *behind = guard;
      const Lanes<T> other;
      other.vec().store(p, count);
      for (int i = 0; i < n; ++i) CHECK(same(p[i], other[i]));
      if (behind) CHECK(*behind == guard);
    }
  }
  munmap(memory, 3 * page);
}

template <class T>
T apply(int which, T x) {
  T y;
  apply_activation(which, &x, &y, 1);
  return y;
}

template <class T>
void activations() {
  using L = std::numeric_limits<T>;
  constexpr int kSigmoid = 0, kTanh = 1, kExp = 2;
  const T huge[] = {L::infinity(), L::max(), T(1e30), T(1e10), 5000, 1000, 800};
  for (bool flush : {true, false}) {
    const fusedrnn::cpu::ControlWord word(flush);
    for (T x : huge) {
      CHECK(same(apply(kSigmoid, x), T(1)) && same(apply(kSigmoid, -x), T(0)));
      CHECK(same(apply(kTanh, x), T(1)) && same(apply(kTanh, -x), T(-1)));
      CHECK(same(apply(kExp, x), L::infinity()) && same(apply(kExp, -x), T(0)));
    }
    for (T zero : {T(0), T(-0.0)}) {
      CHECK(same(apply(kSigmoid, zero), T(0.5)));
      CHECK(same(apply(kTanh, zero), zero));
      CHECK(same(apply(kExp, zero), T(1)));
    }
    for (T nan : {L::quiet_NaN(), -L::quiet_NaN()})
      for (int which : {kSigmoid, kTanh, kExp}) CHECK(std::isnan(apply(which, nan)));
  }
  for (int exponent = L::min_exponent - L::digits; exponent < -L::digits; ++exponent) {  // tanh(x) = x, subnormals too
    const T x = std::ldexp(T(1), exponent);
    CHECK(same(apply(kTanh, x), x) && same(apply(kTanh, -x), -x));
  }
  T tanh_before = 0, sigmoid_before = 0;
  const T reach = sizeof(T) == 4 ? 100 : 800;  // past where exp overflows
  for (int k = -4000; k <= 4000; ++k) {
    const T x = T(k) / 4000 * reach, t = apply(kTanh, x), s = apply(kSigmoid, x);
    CHECK(same(t, -apply(kTanh, -x)) && std::fabs(t) <= 1 && s >= 0 && s <= 1);
    CHECK(k == -4000 || (t >= tanh_before && s >= sigmoid_before));
    tanh_before = t, sigmoid_before = s;
  }
  // An element's result does not depend on where it stands nor on its neighbours.
  for (int n = 1; n <= 3 * Vec<T>::lanes + 1; ++n) {
    T x[64], y[64];
    for (int i = 0; i < n; ++i) x[i] = any_value<T>();
    y[n] = T(77);
    for (int which : {kSigmoid, kTanh, kExp}) {
      apply_activation(which, x, y, n);
      for (int i = 0; i < n; ++i) CHECK(same(y[i], apply(which, x[i])));
      CHECK(y[n] == T(77));
    }
  }
}

template <class T>
void all() {
  static_assert(Vec<T>::lanes * sizeof(T) == sizeof(Vec<T>), "a vector is its lanes");
  static_assert(Vec<T>::registers == 8 || Vec<T>::registers == 16 || Vec<T>::registers == 32, "what the tiles know");
  arithmetic<T>();
  counts<T>();
  activations<T>();
}

}  // namespace

int main() {
  all<float>();
  all<double>();
}
