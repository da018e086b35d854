// Codes and plain scales of a weight, as q4jax/blockwise.py defines them.
#pragma once

#include "decode.h"
#include "isa_portable.h"
#include "parallel.h"

namespace q4jax {
namespace {

template <class I, Dtype D>
class Quantize {
 public:
  static void run(const Quantization& q, Pool& pool) {
    const int64_t blocks = ceil_div(q.size, q.blocksize);
    const int64_t step = max64(kElements / q.blocksize, 1);
    parallel(pool, ceil_div(blocks, step), [&](int64_t task) {
      const typename I::Encoder encoder(q.thresholds, q.sorted_codes);
      const int64_t end = min64(blocks, (task + 1) * step);
      for (int64_t b = task * step; b < end; ++b) {
        const int64_t begin = b * q.blocksize, count = min64(q.blocksize, q.size - begin);
        if (count == q.blocksize) {
          full(q, encoder, b);
        } else {
          partial(q, b, count);
        }
      }
    });
  }

 private:
  static constexpr int64_t kElements = 1 << 16;  // to a task
  // Above this, 1 / absmax is subnormal, which counts as zero.
  static constexpr float kLargestReciprocal = 0x1p126f;

  static void full(const Quantization& q, const typename I::Encoder& encoder, int64_t block) {
    const int64_t begin = block * q.blocksize, end = begin + q.blocksize;
    const float absmax = float_of(encoder.template absmax<D>(q.w, begin, q.blocksize));
    q.absmax[block] = absmax;
    if (absmax > kLargestReciprocal) {
      for (int64_t i = begin; i < end; i += 32) {
        encoder.template encode<D, true>(q.w, i, absmax, q.packed + i / 2);
      }
      return;
    }
    // A subnormal absmax compares equal to zero here: such a block is a zero block.
    const float factor = absmax == 0 ? 0 : 1 / absmax;
    for (int64_t i = begin; i < end; i += 32) {
      encoder.template encode<D, false>(q.w, i, factor, q.packed + i / 2);
    }
  }

  // The last block of a weight that is not whole blocks is divided, not multiplied.
  static void partial(const Quantization& q, int64_t block, int64_t count) {
    const Portable::Encoder encoder(q.thresholds, q.sorted_codes);
    const int64_t begin = block * q.blocksize;
    const float absmax = float_of(Portable::Encoder::absmax<D>(q.w, begin, count));
    q.absmax[block] = absmax;
    const auto code = [&](int64_t i) -> uint8_t {
      if (i >= begin + count || absmax == 0) return encoder.code(0);
      return encoder.code(read(D, q.w, i) / absmax);
    };
    for (int64_t i = begin; i < begin + count; i += 2) {
      q.packed[i / 2] = uint8_t(code(i) << 4 | code(i + 1));
    }
  }
};

}  // namespace
}  // namespace q4jax
