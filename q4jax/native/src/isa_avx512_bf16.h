// AVX-512 with BF16, which multiplies and adds two bfloat16 numbers of each lane in one step.
#pragma once

#include "isa_avx512.h"
#include "microkernel.h"

namespace q4jax {
namespace {

struct Avx512Bf16 : Avx512 {};

// A word is the bits of two bfloat16 numbers: what two consecutive vectors have in a lane.
struct Pairs {
  using V = Avx512::V;
  static constexpr int kWords = Avx512::kChunk / 2;

  static float word(const float* chunk, int i) {
    const int position = i / Avx512::kLanes * 2 * Avx512::kLanes + i % Avx512::kLanes;
    const float low = chunk[Avx512::element(position)];
    const float high = chunk[Avx512::element(position + Avx512::kLanes)];
    return float_of(bits_of(low) >> 16 | bits_of(high));
  }
  static void store(float* words, const V* v) {
    for (int i = 0; i < kWords; i += Avx512::kLanes, v += 2) {
      const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(v[0]), 16);
      const __m512i both = _mm512_or_si512(low, _mm512_castps_si512(v[1]));
      Avx512::store(words + i, _mm512_castsi512_ps(both));
    }
  }
  static V fma(V a, V b, V c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
};

template <>
struct FactorsOf<Avx512Bf16, Dtype::kBfloat16> {
  using Type = Pairs;
};

}  // namespace
}  // namespace q4jax
