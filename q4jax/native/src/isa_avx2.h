// What the kernels need of an instruction set, with AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "half_float.h"

namespace q4jax {
namespace {

struct Avx2 {
  using V = __m256;
  using Bytes = __m256i;  // the packed codes of a chunk
  static constexpr int kLanes = 8;
  static constexpr int kChunk = 64;  // elements that are decoded together, into 8 vectors

  static constexpr int kRows = 6;    // of an accumulated tile two vectors wide

  static Bytes load_bytes(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  Q4JAX_INLINE static void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
  }
  static V zero() { return _mm256_setzero_ps(); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static V set1(float v) { return _mm256_set1_ps(v); }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(V v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }

  // The element of a chunk that is in lane `position % 8` of vector `position / 8`: even elements
  // come first, and bytes are interleaved within halves of a register.
  static constexpr int element(int position) {
    const int vector = position / 8, lane = position % 8;
    const int byte = vector % 4 * 4 + lane % 4 + lane / 4 * 16;
    return 2 * byte + vector / 4;
  }

  // 8 elements as float32.
  template <Dtype D>
  static V widen(const void* data, int64_t i) {
    if constexpr (D == Dtype::kFloat32) {
      return _mm256_loadu_ps(static_cast<const float*>(data) + i);
    } else {
      const auto* p = reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(data) + i);
      const __m128i half = _mm_loadu_si128(p);
      if constexpr (D == Dtype::kFloat16) return _mm256_cvtph_ps(half);
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
  }

  // Of values that need no rounding.
  template <Dtype D>
  static void narrow(V v, void* data, int64_t i) {
    if constexpr (D == Dtype::kFloat32) {
      store(static_cast<float*>(data) + i, v);
    } else {
      __m128i half;
      if constexpr (D == Dtype::kFloat16) {
        half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
      } else {
        const __m256i top = _mm256_srli_epi32(_mm256_castps_si256(v), 16);
        half = _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
      }
      _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(data) + i), half);
    }
  }

  template <Dtype D>
  class Decoder;
  struct Encoder;
};

// Codes of 32 bytes, those in their high nibbles (Half = 0) or low ones.
template <int Half>
inline __m256i nibbles(__m256i bytes) {
  const __m256i low = _mm256_set1_epi8(15);
  return _mm256_and_si256(Half ? bytes : _mm256_srli_epi16(bytes, 4), low);
}

// A lookup in 16 floats is one byte shuffle for each of their bytes; the bytes are then put
// together by interleaving.
template <Dtype D>
class Avx2::Decoder {
 public:
  explicit Decoder(const float* code) {
    for (int plane = 0; plane < 4; ++plane) {
      alignas(16) uint8_t bytes[16];
      for (int i = 0; i < 16; ++i) bytes[i] = uint8_t(bits_of(code[i]) >> 8 * plane);
      const __m128i half = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes));
      plane_[plane] = _mm256_broadcastsi128_si256(half);
    }
  }

  // The scale of the chunks that follow, or, in blocks of 32, the two of one chunk.
  Q4JAX_INLINE void scale(float scale) { scale_ = _mm256_set1_ps(scale); }
  Q4JAX_INLINE void scale(const float* scales, int64_t) {
    scale_ = _mm256_set_m128(_mm_set1_ps(scales[1]), _mm_set1_ps(scales[0]));
  }

  // Four vectors of a chunk: the weight, rounded to D.
  template <int Half>
  Q4JAX_INLINE void decode(__m256i bytes, V out[4]) const {
    const __m256i index = nibbles<Half>(bytes);
    const __m256i b0 = _mm256_shuffle_epi8(plane_[0], index);
    const __m256i b1 = _mm256_shuffle_epi8(plane_[1], index);
    const __m256i b2 = _mm256_shuffle_epi8(plane_[2], index);
    const __m256i b3 = _mm256_shuffle_epi8(plane_[3], index);
    const __m256i low0 = _mm256_unpacklo_epi8(b0, b1), low1 = _mm256_unpackhi_epi8(b0, b1);
    const __m256i high0 = _mm256_unpacklo_epi8(b2, b3), high1 = _mm256_unpackhi_epi8(b2, b3);
    out[0] = finish(_mm256_unpacklo_epi16(low0, high0));
    out[1] = finish(_mm256_unpackhi_epi16(low0, high0));
    out[2] = finish(_mm256_unpacklo_epi16(low1, high1));
    out[3] = finish(_mm256_unpackhi_epi16(low1, high1));
  }

 private:
  Q4JAX_INLINE V finish(__m256i code) const {
    const V w = _mm256_mul_ps(_mm256_castsi256_ps(code), scale_);
    if constexpr (D == Dtype::kFloat32) return w;
    return _mm256_cvtph_ps(_mm256_cvtps_ph(w, _MM_FROUND_TO_NEAREST_INT));
  }

  __m256i plane_[4];
  V scale_;
};

// For bfloat16 the 16 products of a block are rounded, and looked up by their two upper bytes.
template <>
class Avx2::Decoder<Dtype::kBfloat16> {
 public:
  // Table entries in the order in which `scale` leaves them.
  explicit Decoder(const float* code)
      : first_(_mm256_set_m128(_mm_loadu_ps(code + 8), _mm_loadu_ps(code))),
        second_(_mm256_set_m128(_mm_loadu_ps(code + 12), _mm_loadu_ps(code + 4))) {}

  Q4JAX_INLINE void scale(float scale) {
    const __m256i table = bytes(_mm256_set1_ps(scale));
    low_ = _mm256_permute4x64_epi64(table, 0x88);   // [0, 2, 0, 2]
    high_ = _mm256_permute4x64_epi64(table, 0xdd);  // [1, 3, 1, 3]
  }
  Q4JAX_INLINE void scale(const float* scales, int64_t) {
    const __m256i first = bytes(_mm256_set1_ps(scales[0]));
    const __m256i second = bytes(_mm256_set1_ps(scales[1]));
    low_ = _mm256_permute4x64_epi64(_mm256_unpacklo_epi64(first, second), 0xd8);
    high_ = _mm256_permute4x64_epi64(_mm256_unpackhi_epi64(first, second), 0xd8);
  }

  template <int Half>
  Q4JAX_INLINE void decode(__m256i bytes, V out[4]) const {
    // Bytes that interleaving brings into the two halves of a float's lane.
    const __m256i order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15));
    const __m256i index = nibbles<Half>(_mm256_shuffle_epi8(bytes, order));
    const __m256i low = _mm256_shuffle_epi8(low_, index);
    const __m256i high = _mm256_shuffle_epi8(high_, index);
    const __m256i w0 = _mm256_unpacklo_epi8(low, high), w1 = _mm256_unpackhi_epi8(low, high);
    const __m256i upper = _mm256_set1_epi32(int(0xffff0000));
    out[0] = _mm256_castsi256_ps(_mm256_slli_epi32(w0, 16));
    out[1] = _mm256_castsi256_ps(_mm256_and_si256(w0, upper));
    out[2] = _mm256_castsi256_ps(_mm256_slli_epi32(w1, 16));
    out[3] = _mm256_castsi256_ps(_mm256_and_si256(w1, upper));
  }

 private:
  // Bytes 2 and 3 of the 16 rounded products, as 64-bit groups: byte 2 of codes 0 to 7, byte 3 of
  // these, byte 2 of codes 8 to 15, byte 3 of these.
  Q4JAX_INLINE __m256i bytes(V scale) const {
    const __m256i order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(2, 6, 10, 14, 3, 7, 11, 15, -1, -1, -1, -1, -1, -1, -1, -1));
    return _mm256_unpacklo_epi32(_mm256_shuffle_epi8(rounded(first_, scale), order),
                                 _mm256_shuffle_epi8(rounded(second_, scale), order));
  }

  // To nearest even, in the upper 16 bits. A NaN here has no low bits that could carry.
  Q4JAX_INLINE static __m256i rounded(V code, V scale) {
    const __m256i bits = _mm256_castps_si256(_mm256_mul_ps(code, scale));
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  }

  V first_, second_;      // codes 0-3, 8-11; codes 4-7, 12-15
  __m256i low_, high_;
};

}  // namespace
}  // namespace q4jax
