// The inner step of matrix products: a few rows by two vectors, accumulated in registers.
#pragma once

#include "problem.h"

namespace q4jax {
namespace {

template <class I>
struct Tile {
  using V = typename I::V;
  static constexpr int64_t kDepth = 256;           // of the contraction at a time
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
    V sum[Rows][2];
    for (int r = 0; r < Rows; ++r) {
      sum[r][0] = first ? I::zero() : I::load(c + r * kWidth);
      sum[r][1] = first ? I::zero() : I::load(c + r * kWidth + I::kLanes);
    }
    for (int64_t t = 0; t < depth; ++t) {
      const V b0 = I::load(b), b1 = I::load(b + I::kLanes);
      for (int r = 0; r < Rows; ++r) {
        const V v = I::set1(a[r * row]);
        sum[r][0] = I::fma(v, b0, sum[r][0]);
        sum[r][1] = I::fma(v, b1, sum[r][1]);
      }
      a += column;
      b += kWidth;
    }
    for (int r = 0; r < Rows; ++r) {
      I::store(c + r * kWidth, sum[r][0]);
      I::store(c + r * kWidth + I::kLanes, sum[r][1]);
    }
  }
};

}  // namespace
}  // namespace q4jax
