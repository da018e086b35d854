// Quantization with NEON.
#pragma once

#include "isa_neon.h"

namespace q4jax {
namespace {

class NeonEncoder {
 public:
  NeonEncoder(const float* t, const uint8_t* codes)
      : top_(vdupq_n_f32(t[7])), second_{vdupq_n_f32(t[11]), vdupq_n_f32(t[3])} {
    const float third[4] = {t[13], t[9], t[5], t[1]};
    const float fourth[8] = {t[14], t[12], t[10], t[8], t[6], t[4], t[2], t[0]};
    uint8_t descending[16];
    for (int i = 0; i < 16; ++i) descending[i] = codes[15 - i];
    third_ = vreinterpretq_u8_f32(vld1q_f32(third));
    fourth_.val[0] = vreinterpretq_u8_f32(vld1q_f32(fourth));
    fourth_.val[1] = vreinterpretq_u8_f32(vld1q_f32(fourth + 4));
    codes_ = vld1q_u8(descending);
  }

  template <Dtype D>
  static uint32_t absmax(const void* data, int64_t begin, int64_t count) {
    const uint32x4_t magnitude = vdupq_n_u32(0x7fffffff);
    uint32x4_t low = vdupq_n_u32(0), high = low;
    for (int64_t i = begin; i < begin + count; i += 8) {
      const Neon::V v = Neon::widen<D>(data, i);
      low = vmaxq_u32(low, vandq_u32(vreinterpretq_u32_f32(v.low), magnitude));
      high = vmaxq_u32(high, vandq_u32(vreinterpretq_u32_f32(v.high), magnitude));
    }
    return vmaxvq_u32(vmaxq_u32(low, high));
  }

  template <Dtype D, bool Divide>
  void encode(const void* data, int64_t begin, float factor, uint8_t* out) const {
    const float32x4_t by = vdupq_n_f32(factor);
    uint16x8_t v[4];
    for (int r = 0; r < 4; ++r) {
      const Neon::V x = Neon::widen<D>(data, begin + 8 * r);
      const uint32x4_t low = above(Divide ? vdivq_f32(x.low, by) : vmulq_f32(x.low, by));
      const uint32x4_t high = above(Divide ? vdivq_f32(x.high, by) : vmulq_f32(x.high, by));
      v[r] = vuzp1q_u16(vreinterpretq_u16_u32(low), vreinterpretq_u16_u32(high));
    }
    const uint8x16_t first = codes(v[0], v[1]), second = codes(v[2], v[3]);
    vst1q_u8(out, vsliq_n_u8(vuzp2q_u8(first, second), vuzp1q_u8(first, second), 4));
  }

 private:
  // How many thresholds are at or above each value: four steps of a binary search. None for NaN.
  uint32x4_t above(float32x4_t x) const {
    const uint32x4_t a = vcleq_f32(x, top_);
    const uint32x4_t b = vcleq_f32(x, vbslq_f32(a, second_[1], second_[0]));
    uint32x4_t at = twice_plus(vshrq_n_u32(a, 31), b);
    at = twice_plus(at, vcleq_f32(x, vreinterpretq_f32_u8(vqtbl1q_u8(third_, bytes(at)))));
    return twice_plus(at, vcleq_f32(x, vreinterpretq_f32_u8(vqtbl2q_u8(fourth_, bytes(at)))));
  }

  // The lowest bit of a mask goes below those of a number.
  static uint32x4_t twice_plus(uint32x4_t at, uint32x4_t mask) { return vsliq_n_u32(mask, at, 1); }

  // Where the four bytes of a float are in a table of floats.
  static uint8x16_t bytes(uint32x4_t at) {
    return vreinterpretq_u8_u32(
        vmlaq_u32(vdupq_n_u32(0x03020100), at, vdupq_n_u32(0x04040404)));
  }

  uint8x16_t codes(uint16x8_t a, uint16x8_t b) const {
    return vqtbl1q_u8(codes_, vuzp1q_u8(vreinterpretq_u8_u16(a), vreinterpretq_u8_u16(b)));
  }

  float32x4_t top_, second_[2];
  uint8x16_t third_, codes_;
  uint8x16x2_t fourth_;
};

struct Neon::Encoder : NeonEncoder {
  using NeonEncoder::NeonEncoder;
};

}  // namespace
}  // namespace q4jax
