// 16-bit floats in portable C++, and how elements of each dtype are read and written.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernel_args.h"

// For what loops do with vectors: called, it would have them saved and loaded each time, and GCC
// takes a prefetch out of a function that does nothing else.
#define Q4JAX_INLINE __attribute__((always_inline))

namespace q4jax {
namespace {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Round to nearest even.
inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if (value != value) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_bfloat16(uint16_t bits) { return float_of(uint32_t{bits} << 16); }

inline uint16_t to_float16(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
  const uint32_t sign = bits >> 16 & 0x8000;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
  if (magnitude >= 0x47800000) return uint16_t(sign | 0x7c00);  // 65536 and above
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves its 24 bits' worth of it, rounded
    return uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return uint16_t(sign | (rounded - 0x38000000) >> 13);
}

inline float from_float16(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | rest << 13);
  if (rest >= 0x0400) return float_of(sign | ((rest << 13) + 0x38000000));
  const float magnitude = float(rest) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}

inline float read(Dtype dtype, const void* data, int64_t i) {
  if (dtype == Dtype::kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return dtype == Dtype::kFloat16 ? from_float16(bits) : from_bfloat16(bits);
}

inline void write(Dtype dtype, void* data, int64_t i, float value) {
  if (dtype == Dtype::kFloat32) {
    static_cast<float*>(data)[i] = value;
  } else {
    static_cast<uint16_t*>(data)[i] =
        dtype == Dtype::kFloat16 ? to_float16(value) : to_bfloat16(value);
  }
}

}  // namespace
}  // namespace q4jax
