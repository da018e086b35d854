// What the kernels need of an instruction set, with NEON, which every aarch64 processor has.
#pragma once

#include <arm_neon.h>

#include "half_float.h"

namespace q4jax {
namespace {

struct Neon {
  // Two registers: what works for AVX2's width then works here.
  struct V {
    float32x4_t low, high;
  };
  struct Bytes {
    uint8x16_t half[2];
  };
  static constexpr int kLanes = 8;
  static constexpr int kChunk = 64;
  static constexpr int kRows = 6;

  static Bytes load_bytes(const uint8_t* p) { return {{vld1q_u8(p), vld1q_u8(p + 16)}}; }
  Q4JAX_INLINE static void prefetch(const void* p) { __builtin_prefetch(p); }
  static V set1(float v) { return {vdupq_n_f32(v), vdupq_n_f32(v)}; }
  static V zero() { return set1(0); }
  static V load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static void store(float* p, V v) {
    vst1q_f32(p, v.low);
    vst1q_f32(p + 4, v.high);
  }
  static V add(V a, V b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
  static V fma(V a, V b, V c) {
    return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
  }
  static float sum(V v) { return vaddvq_f32(vaddq_f32(v.low, v.high)); }
  static constexpr int element(int position) { return position % 32 * 2 + position / 32; }

  // 8 elements as float32.
  template <Dtype D>
  static V widen(const void* data, int64_t i) {
    if constexpr (D == Dtype::kFloat32) {
      return load(static_cast<const float*>(data) + i);
    } else {
      const uint16x8_t v = vld1q_u16(static_cast<const uint16_t*>(data) + i);
      return widened<D>(v);
    }
  }

  // Of values that need no rounding.
  template <Dtype D>
  static void narrow(V v, void* data, int64_t i) {
    if constexpr (D == Dtype::kFloat32) {
      store(static_cast<float*>(data) + i, v);
    } else if constexpr (D == Dtype::kFloat16) {
      vst1q_u16(static_cast<uint16_t*>(data) + i, to_half(v));
    } else {
      const uint16x4_t low = vshrn_n_u32(vreinterpretq_u32_f32(v.low), 16);
      vst1q_u16(static_cast<uint16_t*>(data) + i,
                vshrn_high_n_u32(low, vreinterpretq_u32_f32(v.high), 16));
    }
  }

  // From 16 bits, and float16 from float32.
  template <Dtype D>
  static V widened(uint16x8_t v) {
    if constexpr (D == Dtype::kFloat16) {
      const float16x8_t half = vreinterpretq_f16_u16(v);
      return {vcvt_f32_f16(vget_low_f16(half)), vcvt_high_f32_f16(half)};
    }
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(v), 16)),
            vreinterpretq_f32_u32(vshll_high_n_u16(v, 16))};
  }
  static uint16x8_t to_half(V v) {
    return vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(v.low), v.high));
  }

  template <Dtype D>
  class Decoder;
  struct Encoder;
};

// The 16 products of a block are computed and rounded once. A lookup is one byte shuffle for each
// of their bytes; the bytes are then put together by interleaving. Inlined, or GCC passes all of it
// through memory.
template <Dtype D>
class Neon::Decoder {
 public:
  explicit Decoder(const float* code) : code_{load(code), load(code + 8)}, table_{} {}

  // The scale of the chunks that follow, or, in blocks of 32, the two of one chunk.
  Q4JAX_INLINE void scale(float scale) {
    table_[0] = table_[1] = products(scale);
  }
  Q4JAX_INLINE void scale(const float* scales, int64_t) {
    table_[0] = products(scales[0]);
    table_[1] = products(scales[1]);
  }

  // Four vectors of a chunk: the weight, rounded to D.
  template <int Half>
  Q4JAX_INLINE void decode(Bytes bytes, V out[4]) const {
    for (int i = 0; i < 2; ++i) {
      const uint8x16_t index =
          Half ? vandq_u8(bytes.half[i], vdupq_n_u8(15)) : vshrq_n_u8(bytes.half[i], 4);
      const Table& t = table_[i];
      const uint8x16_t b0 = vqtbl1q_u8(t.plane[0], index), b1 = vqtbl1q_u8(t.plane[1], index);
      const uint16x8_t low0 = vreinterpretq_u16_u8(vzip1q_u8(b0, b1));
      const uint16x8_t low1 = vreinterpretq_u16_u8(vzip2q_u8(b0, b1));
      if constexpr (D == Dtype::kFloat32) {
        const uint8x16_t b2 = vqtbl1q_u8(t.plane[2], index), b3 = vqtbl1q_u8(t.plane[3], index);
        const uint16x8_t high0 = vreinterpretq_u16_u8(vzip1q_u8(b2, b3));
        const uint16x8_t high1 = vreinterpretq_u16_u8(vzip2q_u8(b2, b3));
        out[2 * i] = joined(low0, high0);
        out[2 * i + 1] = joined(low1, high1);
      } else {
        out[2 * i] = widened<D>(low0);
        out[2 * i + 1] = widened<D>(low1);
      }
    }
  }

 private:
  // One register for each byte of a product.
  struct Table {
    uint8x16_t plane[D == Dtype::kFloat32 ? 4 : 2];
  };

  Q4JAX_INLINE Table products(float scale) const {
    const V v[2] = {multiplied(code_[0], scale), multiplied(code_[1], scale)};
    if constexpr (D == Dtype::kFloat32) {
      const uint8x16_t a = vreinterpretq_u8_f32(v[0].low), b = vreinterpretq_u8_f32(v[0].high);
      const uint8x16_t c = vreinterpretq_u8_f32(v[1].low), d = vreinterpretq_u8_f32(v[1].high);
      const uint8x16_t even0 = vuzp1q_u8(a, b), even1 = vuzp1q_u8(c, d);
      const uint8x16_t odd0 = vuzp2q_u8(a, b), odd1 = vuzp2q_u8(c, d);
      return {{vuzp1q_u8(even0, even1), vuzp1q_u8(odd0, odd1), vuzp2q_u8(even0, even1),
               vuzp2q_u8(odd0, odd1)}};
    } else {
      const uint8x16_t a = vreinterpretq_u8_u16(rounded(v[0]));
      const uint8x16_t b = vreinterpretq_u8_u16(rounded(v[1]));
      return {{vuzp1q_u8(a, b), vuzp2q_u8(a, b)}};
    }
  }

  // Floats from their lower and upper 16 bits.
  static V joined(uint16x8_t low, uint16x8_t high) {
    return {vreinterpretq_f32_u16(vzip1q_u16(low, high)),
            vreinterpretq_f32_u16(vzip2q_u16(low, high))};
  }

  static V multiplied(V v, float by) { return {vmulq_n_f32(v.low, by), vmulq_n_f32(v.high, by)}; }

  static uint16x8_t rounded(V v) {
    if constexpr (D == Dtype::kFloat16) return to_half(v);
    const uint32x4_t low = vreinterpretq_u32_f32(v.low), high = vreinterpretq_u32_f32(v.high);
    return vaddhn_high_u32(vaddhn_u32(low, carry(low)), high, carry(high));
  }

  // Added to float32, it rounds the upper 16 bits to nearest even: 0x7fff, and 1 if they are odd.
  // A NaN here has no low bits that could carry.
  static uint32x4_t carry(uint32x4_t bits) {
    return vsubq_u32(vdupq_n_u32(0x7fff), vtstq_u32(bits, vdupq_n_u32(0x10000)));
  }

  V code_[2];
  Table table_[2];
};

}  // namespace
}  // namespace q4jax
