// Quantization with AVX2.
#pragma once

#include "isa_avx2.h"

namespace q4jax {
namespace {

class Avx2Encoder {
 public:
  Avx2Encoder(const float* t, const uint8_t* codes)
      : top_(_mm256_set1_ps(t[7])),
        second_{_mm256_set1_ps(t[3]), _mm256_set1_ps(t[11])},
        third_(_mm256_setr_ps(t[1], t[5], t[9], t[13], t[1], t[5], t[9], t[13])),
        fourth_(_mm256_setr_ps(t[0], t[2], t[4], t[6], t[8], t[10], t[12], t[14])),
        codes_(_mm256_broadcastsi128_si256(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)))) {}

  template <Dtype D>
  static uint32_t absmax(const void* data, int64_t begin, int64_t count) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i most = _mm256_setzero_si256();
    for (int64_t i = begin; i < begin + count; i += 8) {
      const __m256i bits = _mm256_castps_si256(Avx2::widen<D>(data, i));
      most = _mm256_max_epi32(most, _mm256_and_si256(bits, magnitude));
    }
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    return uint32_t(_mm_cvtsi128_si32(m));
  }

  template <Dtype D, bool Divide>
  void encode(const void* data, int64_t begin, float factor, uint8_t* out) const {
    const __m256 by = _mm256_set1_ps(factor);
    __m256i v[4];
    for (int r = 0; r < 4; ++r) {
      const __m256 x = Avx2::widen<D>(data, begin + 8 * r);
      v[r] = interval(Divide ? _mm256_div_ps(x, by) : _mm256_mul_ps(x, by));
    }
    // Both packings work within halves: dwords 0, 4, 1, 5, ... are then in order.
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i bytes =
        _mm256_packus_epi16(_mm256_packus_epi32(v[0], v[1]), _mm256_packus_epi32(v[2], v[3]));
    bytes = _mm256_shuffle_epi8(codes_, _mm256_permutevar8x32_epi32(bytes, order));
    // 16 * even + odd, as 16 bits.
    const __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));
    const __m128i packed =
        _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), packed);
  }

 private:
  // How many thresholds are below each value: four steps of a binary search. NaN passes all.
  __m256i interval(__m256 x) const {
    const __m256 a = above(x, top_);
    const __m256 b = above(x, _mm256_blendv_ps(second_[0], second_[1], a));
    __m256i at = twice_minus(_mm256_sub_epi32(_mm256_setzero_si256(), _mm256_castps_si256(a)), b);
    at = twice_minus(at, above(x, _mm256_permutevar_ps(third_, at)));
    return twice_minus(at, above(x, _mm256_permutevar8x32_ps(fourth_, at)));
  }

  static __m256 above(__m256 x, __m256 pivot) { return _mm256_cmp_ps(x, pivot, _CMP_NLE_UQ); }

  static __m256i twice_minus(__m256i at, __m256 mask) {
    return _mm256_sub_epi32(_mm256_add_epi32(at, at), _mm256_castps_si256(mask));
  }

  __m256 top_, second_[2], third_, fourth_;
  __m256i codes_;
};

struct Avx2::Encoder : Avx2Encoder {
  using Avx2Encoder::Avx2Encoder;
};

}  // namespace
}  // namespace q4jax
