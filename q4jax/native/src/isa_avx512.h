// What the kernels need of an instruction set, with AVX-512 F, BW, VL and DQ.
#pragma once

#include "encode_avx2.h"

namespace q4jax {
namespace {

struct Avx512 {
  using V = __m512;
  using Bytes = __m512i;  // the packed codes of a chunk, two bytes to a lane
  static constexpr int kLanes = 16;
  static constexpr int kChunk = 64;  // elements that are decoded together, into 4 vectors
  static constexpr int kRows = 12;   // of an accumulated tile two vectors wide
  using Encoder = Avx2Encoder;

  static Bytes load_bytes(const uint8_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  Q4JAX_INLINE static void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
  }
  static V zero() { return _mm512_setzero_ps(); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static V set1(float v) { return _mm512_set1_ps(v); }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(V v) {
    const __m256 low = _mm512_castps512_ps256(v), high = _mm512_extractf32x8_ps(v, 1);
    return Avx2::sum(_mm256_add_ps(low, high));
  }

  // The element of a chunk that is in lane `position % 16` of vector `position / 16`.
  static constexpr int element(int position) { return position % 16 * 4 + position / 16; }

  // 16 elements as float32.
  template <Dtype D>
  static V widen(const void* data, int64_t i) {
    if constexpr (D == Dtype::kFloat32) {
      return load(static_cast<const float*>(data) + i);
    } else {
      const auto* p = reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(data) + i);
      const __m256i half = _mm256_loadu_si256(p);
      if constexpr (D == Dtype::kFloat16) return _mm512_cvtph_ps(half);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
  }

  // Of values that need no rounding.
  template <Dtype D>
  static void narrow(V v, void* data, int64_t i) {
    if constexpr (D == Dtype::kFloat32) {
      store(static_cast<float*>(data) + i, v);
    } else {
      __m256i half;
      if constexpr (D == Dtype::kFloat16) {
        half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
      } else {
        half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v), 16));
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(data) + i), half);
    }
  }

  template <Dtype D>
  class Decoder;
};

// The 16 values of a block fit a register: an element is looked up as it is used, in one step.
template <Dtype D>
class Avx512::Decoder {
 public:
  explicit Decoder(const float* code) : code_(_mm512_loadu_ps(code)) {}

  // The scale of the chunks that follow, or, in blocks of 32, the two of one chunk.
  void scale(float scale) {
    two_ = false;
    values_ = rounded(_mm512_mul_ps(code_, _mm512_set1_ps(scale)));
  }
  void scale(const float* scales, int64_t) {
    scale(scales[0]);
    two_ = true;
    second_ = rounded(_mm512_mul_ps(code_, _mm512_set1_ps(scales[1])));
  }

  // Two vectors of a chunk: the weight, rounded to D. The even element of a byte is the high one.
  template <int Half>
  Q4JAX_INLINE void decode(Bytes bytes, V out[2]) const {
    out[0] = value(_mm512_srli_epi32(bytes, 8 * Half + 4));
    out[1] = value(Half ? _mm512_srli_epi32(bytes, 8) : bytes);
  }

 private:
  // Only the 4 lowest bits of an index count. `two_` is known where this is inlined.
  V value(__m512i index) const {
    const V v = _mm512_permutexvar_ps(index, values_);
    return two_ ? _mm512_mask_permutexvar_ps(v, 0xff00, index, second_) : v;
  }

  static V rounded(V w) {
    if constexpr (D == Dtype::kFloat32) return w;
    if constexpr (D == Dtype::kFloat16) {
      return _mm512_cvtph_ps(_mm512_cvtps_ph(w, _MM_FROUND_TO_NEAREST_INT));
    }
    // To nearest even. A NaN here has no low bits that could carry.
    const __m512i bits = _mm512_castps_si512(w), one = _mm512_set1_epi32(1);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    return _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(int(0xffff0000))));
  }

  V code_, values_, second_;
  bool two_ = false;
};

}  // namespace
}  // namespace q4jax
