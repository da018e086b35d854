// The inner step of matrix products: a few rows by two vectors, accumulated in registers.
#pragma once

#include "decode.h"

namespace q4jax {
namespace {

// The factors of a tile product lie in words of 32 bits; here one float32 is one word.
template <class I>
struct Floats {
  using V = typename I::V;
  static constexpr int kWords = I::kChunk;  // of a chunk

  // Word i of a chunk whose elements are in their own order.
  static float word(const float* chunk, int i) { return chunk[I::element(i)]; }
  // All words of a decoded chunk.
  static void store(float* words, const V* v) {
    for (int r = 0; r < kVectors<I>; ++r) I::store(words + r * I::kLanes, v[r]);
  }
  static V fma(V a, V b, V c) { return I::fma(a, b, c); }
};

// To be specialized where an instruction set has other factors for a dtype.
template <class I, Dtype D>
struct FactorsOf {
  using Type = Floats<I>;
};

template <class I, class Factors = Floats<I>>
struct Tile {
  using V = typename I::V;
  static constexpr int64_t kDepth = 256;           // words of the contraction at a time
  static constexpr int64_t kWidth = 2 * I::kLanes;

  // c[rows][kWidth] (+)= a b, with b[depth][kWidth] and rows <= I::kRows. a is [depth][rows] where
  // Interleaved, else rows that are kDepth apart. Starts from zero where `first`.
  template <bool Interleaved, int Rows = I::kRows>
  static void add(int64_t rows, const float* a, const float* b, int64_t depth, float* c,
                  bool first) {
    if (rows == Rows) {
      step<Interleaved, Rows>(a, b, depth, c, first);
    } else if constexpr (Rows > 1) {
      add<Interleaved, Rows - 1>(rows, a, b, depth, c, first);
    }
  }

 private:
  template <bool Interleaved, int Rows>
  static void step(const float* a, const float* b, int64_t depth, float* c, bool first) {
    constexpr int64_t row = Interleaved ? 1 : kDepth, column = Interleaved ? Rows : 1;
    V sum[Rows][2], other[Rows][2];
    for (int r = 0; r < Rows; ++r) {
      for (int half = 0; half < 2; ++half) {
        sum[r][half] = first ? I::zero() : I::load(c + r * kWidth + half * I::kLanes);
        other[r][half] = I::zero();
      }
    }
    int64_t t = 0;
    if constexpr (Rows <= 2) {  // too few sums to hide the latency of an addition: twice as many
      for (; t + 1 < depth; t += 2) {
        once<Rows, row>(a, b, sum);
        once<Rows, row>(a + column, b + kWidth, other);
        a += 2 * column;
        b += 2 * kWidth;
      }
    }
    for (; t < depth; ++t) {
      once<Rows, row>(a, b, sum);
      a += column;
      b += kWidth;
    }
    if constexpr (Rows <= 2) {
      for (int r = 0; r < Rows; ++r) {
        for (int half = 0; half < 2; ++half) sum[r][half] = I::add(sum[r][half], other[r][half]);
      }
    }
    for (int r = 0; r < Rows; ++r) {
      I::store(c + r * kWidth, sum[r][0]);
      I::store(c + r * kWidth + I::kLanes, sum[r][1]);
    }
  }

  // sum[r] += a[r] * b, for a word of each row and two vectors.
  template <int Rows, int64_t Stride>
  Q4JAX_INLINE static void once(const float* a, const float* b, V (&sum)[Rows][2]) {
    const V b0 = I::load(b), b1 = I::load(b + I::kLanes);
    for (int r = 0; r < Rows; ++r) {
      const V v = I::set1(a[r * Stride]);
      sum[r][0] = Factors::fma(v, b0, sum[r][0]);
      sum[r][1] = Factors::fma(v, b1, sum[r][1]);
    }
  }
};

}  // namespace
}  // namespace q4jax
