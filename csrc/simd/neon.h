// NEON on AArch64: 4 floats or 2 doubles. The interface is described in vec.h.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <arm_neon.h>

namespace fusedrnn {
namespace FUSEDRNN_LEVEL {

template <class T>
struct Vec;

template <>
struct Vec<float> {
  using scalar = float;
  using Mask = uint32x4_t;
  static constexpr int lanes = 4;
  static constexpr int registers = 32;
  static constexpr bool fused = true;
  static constexpr bool whole_lines = false;
  float32x4_t v;

  Vec() = default;
  FUSEDRNN_INLINE Vec(float32x4_t x) : v(x) {}

  static FUSEDRNN_INLINE Vec zero() { return vdupq_n_f32(0); }
  static FUSEDRNN_INLINE Vec set(float x) { return vdupq_n_f32(x); }
  static FUSEDRNN_INLINE Vec load(const float* p) { return vld1q_f32(p); }
  static FUSEDRNN_INLINE Vec load(const float* p, int64_t count) {
    if (count >= lanes) return load(p);
    float32x4_t x = vdupq_n_f32(0);
    if (count > 0) x = vld1q_lane_f32(p, x, 0);
    if (count > 1) x = vld1q_lane_f32(p + 1, x, 1);
    if (count > 2) x = vld1q_lane_f32(p + 2, x, 2);
    return x;
  }
  FUSEDRNN_INLINE void store(float* p) const { vst1q_f32(p, v); }
  FUSEDRNN_INLINE void store(float* p, int64_t count) const {
    if (count >= lanes) return store(p);
    if (count > 0) vst1q_lane_f32(p, v, 0);
    if (count > 1) vst1q_lane_f32(p + 1, v, 1);
    if (count > 2) vst1q_lane_f32(p + 2, v, 2);
  }

  friend FUSEDRNN_INLINE Vec operator+(Vec a, Vec b) { return vaddq_f32(a.v, b.v); }
  friend FUSEDRNN_INLINE Vec operator-(Vec a, Vec b) { return vsubq_f32(a.v, b.v); }
  friend FUSEDRNN_INLINE Vec operator*(Vec a, Vec b) { return vmulq_f32(a.v, b.v); }
  friend FUSEDRNN_INLINE Vec operator/(Vec a, Vec b) { return vdivq_f32(a.v, b.v); }
  friend FUSEDRNN_INLINE Vec operator-(Vec a) { return vnegq_f32(a.v); }
  friend FUSEDRNN_INLINE Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c.v, a.v, b.v); }
  friend FUSEDRNN_INLINE Vec fnma(Vec a, Vec b, Vec c) { return vfmsq_f32(c.v, a.v, b.v); }
  friend FUSEDRNN_INLINE Vec abs(Vec x) { return vabsq_f32(x.v); }
  friend FUSEDRNN_INLINE Vec copysign(Vec x, Vec sign) { return vbslq_f32(vdupq_n_u32(1u << 31), sign.v, x.v); }
  friend FUSEDRNN_INLINE Vec min(Vec bound, Vec x) { return vminq_f32(bound.v, x.v); }
  friend FUSEDRNN_INLINE Vec max(Vec bound, Vec x) { return vmaxq_f32(bound.v, x.v); }
  friend FUSEDRNN_INLINE Mask greater(Vec a, Vec b) { return vcgtq_f32(a.v, b.v); }
  friend FUSEDRNN_INLINE Mask greater_equal(Vec a, Vec b) { return vcgeq_f32(a.v, b.v); }
  friend FUSEDRNN_INLINE Vec select(Mask mask, Vec a, Vec b) { return vbslq_f32(mask, a.v, b.v); }
  friend FUSEDRNN_INLINE Vec zero_where(Mask mask, Vec x) { return select(mask, Vec::zero(), x); }
  friend FUSEDRNN_INLINE Vec exponent_bits(Vec x) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vreinterpretq_s32_f32(x.v), 23));
  }
};

template <>
struct Vec<double> {
  using scalar = double;
  using Mask = uint64x2_t;
  static constexpr int lanes = 2;
  static constexpr int registers = 32;
  static constexpr bool fused = true;
  static constexpr bool whole_lines = false;
  float64x2_t v;

  Vec() = default;
  FUSEDRNN_INLINE Vec(float64x2_t x) : v(x) {}

  static FUSEDRNN_INLINE Vec zero() { return vdupq_n_f64(0); }
  static FUSEDRNN_INLINE Vec set(double x) { return vdupq_n_f64(x); }
  static FUSEDRNN_INLINE Vec load(const double* p) { return vld1q_f64(p); }
  static FUSEDRNN_INLINE Vec load(const double* p, int64_t count) {
    if (count >= lanes) return load(p);
    const float64x2_t x = vdupq_n_f64(0);
    return count > 0 ? vld1q_lane_f64(p, x, 0) : x;
  }
  FUSEDRNN_INLINE void store(double* p) const { vst1q_f64(p, v); }
  FUSEDRNN_INLINE void store(double* p, int64_t count) const {
    if (count >= lanes) return store(p);
    if (count > 0) vst1q_lane_f64(p, v, 0);
  }

  friend FUSEDRNN_INLINE Vec operator+(Vec a, Vec b) { return vaddq_f64(a.v, b.v); }
  friend FUSEDRNN_INLINE Vec operator-(Vec a, Vec b) { return vsubq_f64(a.v, b.v); }
  friend FUSEDRNN_INLINE Vec operator*(Vec a, Vec b) { return vmulq_f64(a.v, b.v); }
  friend FUSEDRNN_INLINE Vec operator/(Vec a, Vec b) { return vdivq_f64(a.v, b.v); }
  friend FUSEDRNN_INLINE Vec operator-(Vec a) { return vnegq_f64(a.v); }
  friend FUSEDRNN_INLINE Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f64(c.v, a.v, b.v); }
  friend FUSEDRNN_INLINE Vec fnma(Vec a, Vec b, Vec c) { return vfmsq_f64(c.v, a.v, b.v); }
  friend FUSEDRNN_INLINE Vec abs(Vec x) { return vabsq_f64(x.v); }
  friend FUSEDRNN_INLINE Vec copysign(Vec x, Vec sign) { return vbslq_f64(vdupq_n_u64(1ull << 63), sign.v, x.v); }
  friend FUSEDRNN_INLINE Vec min(Vec bound, Vec x) { return vminq_f64(bound.v, x.v); }
  friend FUSEDRNN_INLINE Vec max(Vec bound, Vec x) { return vmaxq_f64(bound.v, x.v); }
  friend FUSEDRNN_INLINE Mask greater(Vec a, Vec b) { return vcgtq_f64(a.v, b.v); }
  friend FUSEDRNN_INLINE Mask greater_equal(Vec a, Vec b) { return vcgeq_f64(a.v, b.v); }
  friend FUSEDRNN_INLINE Vec select(Mask mask, Vec a, Vec b) { return vbslq_f64(mask, a.v, b.v); }
  friend FUSEDRNN_INLINE Vec zero_where(Mask mask, Vec x) { return select(mask, Vec::zero(), x); }
  friend FUSEDRNN_INLINE Vec exponent_bits(Vec x) {
    return vreinterpretq_f64_s64(vshlq_n_s64(vreinterpretq_s64_f64(x.v), 52));
  }
};

}  // namespace FUSEDRNN_LEVEL
}  // namespace fusedrnn
