// NEON on AArch64: 4 floats or 2 doubles. The interface is described in vec.h.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <arm_neon.h>

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

constexpr int kRegisters = 32;
constexpr bool kFused = true;
constexpr bool kWholeLines = false;

template <class T>
struct Native;

template <>
struct Native<float> {
  using Vector = float32x4_t;
  using Mask = uint32x4_t;
  static constexpr int lanes = 4;
  Vector v;

  static FUSEDRNN_INLINE Vector set(float x) { return vdupq_n_f32(x); }
  static FUSEDRNN_INLINE Vector load(const float* p) { return vld1q_f32(p); }
  static FUSEDRNN_INLINE Vector pieces(const float* p, int64_t) { return load(p); }
  static FUSEDRNN_INLINE Vector load(const float* p, int64_t count) {
    float32x4_t x = vdupq_n_f32(0);
    if (count > 0) x = vld1q_lane_f32(p, x, 0);
    if (count > 1) x = vld1q_lane_f32(p + 1, x, 1);
    if (count > 2) x = vld1q_lane_f32(p + 2, x, 2);
    return x;
  }
  static FUSEDRNN_INLINE void store(float* p, Vector v) { vst1q_f32(p, v); }
  static FUSEDRNN_INLINE void store(float* p, Vector v, int64_t count) {
    if (count > 0) vst1q_lane_f32(p, v, 0);
    if (count > 1) vst1q_lane_f32(p + 1, v, 1);
    if (count > 2) vst1q_lane_f32(p + 2, v, 2);
  }

  static FUSEDRNN_INLINE Vector negative(Vector a) { return vnegq_f32(a); }
  static FUSEDRNN_INLINE Vector fma(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
  static FUSEDRNN_INLINE Vector fnma(Vector a, Vector b, Vector c) { return vfmsq_f32(c, a, b); }
  static FUSEDRNN_INLINE Vector abs(Vector x) { return vabsq_f32(x); }
  static FUSEDRNN_INLINE Vector copysign(Vector x, Vector sign) { return vbslq_f32(vdupq_n_u32(1u << 31), sign, x); }
  static FUSEDRNN_INLINE Vector min(Vector bound, Vector x) { return vminq_f32(bound, x); }
  static FUSEDRNN_INLINE Vector max(Vector bound, Vector x) { return vmaxq_f32(bound, x); }
  static FUSEDRNN_INLINE Mask greater(Vector a, Vector b) { return vcgtq_f32(a, b); }
  static FUSEDRNN_INLINE Mask greater_equal(Vector a, Vector b) { return vcgeq_f32(a, b); }
  static FUSEDRNN_INLINE Vector select(Mask mask, Vector a, Vector b) { return vbslq_f32(mask, a, b); }
  static FUSEDRNN_INLINE Vector zero_where(Mask mask, Vector x) { return select(mask, Vector{}, x); }
  static FUSEDRNN_INLINE Vector exponent_bits(Vector x) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vreinterpretq_s32_f32(x), 23));
  }
};

template <>
struct Native<double> {
  using Vector = float64x2_t;
  using Mask = uint64x2_t;
  static constexpr int lanes = 2;
  Vector v;

  static FUSEDRNN_INLINE Vector set(double x) { return vdupq_n_f64(x); }
  static FUSEDRNN_INLINE Vector load(const double* p) { return vld1q_f64(p); }
  static FUSEDRNN_INLINE Vector pieces(const double* p, int64_t) { return load(p); }
  static FUSEDRNN_INLINE Vector load(const double* p, int64_t count) {
    const float64x2_t x = vdupq_n_f64(0);
    return count > 0 ? vld1q_lane_f64(p, x, 0) : x;
  }
  static FUSEDRNN_INLINE void store(double* p, Vector v) { vst1q_f64(p, v); }
  static FUSEDRNN_INLINE void store(double* p, Vector v, int64_t count) {
    if (count > 0) vst1q_lane_f64(p, v, 0);
  }

  static FUSEDRNN_INLINE Vector negative(Vector a) { return vnegq_f64(a); }
  static FUSEDRNN_INLINE Vector fma(Vector a, Vector b, Vector c) { return vfmaq_f64(c, a, b); }
  static FUSEDRNN_INLINE Vector fnma(Vector a, Vector b, Vector c) { return vfmsq_f64(c, a, b); }
  static FUSEDRNN_INLINE Vector abs(Vector x) { return vabsq_f64(x); }
  static FUSEDRNN_INLINE Vector copysign(Vector x, Vector sign) { return vbslq_f64(vdupq_n_u64(1ull << 63), sign, x); }
  static FUSEDRNN_INLINE Vector min(Vector bound, Vector x) { return vminq_f64(bound, x); }
  static FUSEDRNN_INLINE Vector max(Vector bound, Vector x) { return vmaxq_f64(bound, x); }
  static FUSEDRNN_INLINE Mask greater(Vector a, Vector b) { return vcgtq_f64(a, b); }
  static FUSEDRNN_INLINE Mask greater_equal(Vector a, Vector b) { return vcgeq_f64(a, b); }
  static FUSEDRNN_INLINE Vector select(Mask mask, Vector a, Vector b) { return vbslq_f64(mask, a, b); }
  static FUSEDRNN_INLINE Vector zero_where(Mask mask, Vector x) { return select(mask, Vector{}, x); }
  static FUSEDRNN_INLINE Vector exponent_bits(Vector x) {
    return vreinterpretq_f64_s64(vshlq_n_s64(vreinterpretq_s64_f64(x), 52));
  }
};

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
