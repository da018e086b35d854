// The weight itself: code times scale in float32, rounded once.
#pragma once

#include "decode.h"
#include "parallel.h"

namespace q4jax {
namespace {

template <class I, Dtype D>
class Dequantize {
 public:
  static void run(const Dequantization& d, Pool& pool) {
    const Weight& w = d.weight;
    const Chunks<I> chunks(w);
    const typename I::template Decoder<D> fresh(w.code);
    // A task is some chunks of one row.
    const int64_t step = 4096 / I::kChunk, steps = ceil_div(chunks.count, step);
    parallel(pool, w.n * steps, [&](int64_t task) {
      const int64_t n = task / steps, begin = task % steps * step;
      const int64_t end = min64(chunks.count, begin + step);
      float scales[4096 / 32];
      row_scales<I>(w, chunks, n, begin, end, scales);
      auto decoder = fresh;
      for_chunks(w, chunks, w.packed + n * (w.k / 2), begin, end, scales, decoder,
                 [&](int64_t c, typename I::Bytes bytes) {
                   typename I::V v[kVectors<I>];
                   decode_chunk<I>(decoder, bytes, v);
                   float decoded[I::kChunk], ordered[I::kChunk];
                   for (int r = 0; r < kVectors<I>; ++r) I::store(decoded + r * I::kLanes, v[r]);
                   reorder<I>([&](int i, int element) { ordered[element] = decoded[i]; });
                   const int64_t k = c * I::kChunk, have = min64(I::kChunk, w.k - k);
                   for (int64_t i = 0; i < have; i += I::kLanes) {
                     I::template narrow<D>(I::load(ordered + i), d.w, n * w.k + k + i);
                   }
                 });
    });
  }
};

}  // namespace
}  // namespace q4jax
