// y = x W, for x[m, n]: the gradient of `linear` with respect to its x.
#pragma once

#include "decode.h"
#include "parallel.h"
#include "scratch.h"
#include "microkernel.h"

namespace q4jax {
namespace {

template <class I, Dtype D>
class Transposed {
 public:
  static void run(const Product& p, Pool& pool) {
    const Weight& w = p.weight;
    const Chunks<I> chunks(w);
    // x in groups of rows, [group][n][rows of it].
    const Scratch x(size_t(p.m * w.n) * 4);
    parallel(pool, ceil_div(p.m, I::kRows), [&](int64_t group) {
      const int64_t m0 = group * I::kRows, rows = min64(I::kRows, p.m - m0);
      float* out = x.floats() + m0 * w.n;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t n = 0; n < w.n; ++n) out[n * rows + r] = read(D, p.x, (m0 + r) * w.n + n);
      }
    });
    parallel(pool, ceil_div(chunks.count, kSteps), [&](int64_t task) {
      const int64_t begin = task * kSteps;
      columns(p, chunks, begin, min64(chunks.count, begin + kSteps), x.floats());
    });
  }

 private:
  using V = typename I::V;
  static constexpr int64_t kWidth = Tile<I>::kWidth;
  // A decoded tile of kDepth rows and kSteps chunks stays in the second cache. A row of it is
  // several cache lines of codes; the next rows are fetched meanwhile.
  static constexpr int64_t kDepth = 128, kSteps = 512 / I::kChunk, kAhead = 4;
  static constexpr int64_t kPanels = I::kChunk / kWidth;  // of a chunk
  // A line more than it holds: panels a power of two apart would share few lines of the cache.
  static constexpr int64_t kPanelSize = kDepth * kWidth + 16;

  // The columns of y that belong to chunks [begin, end).
  static void columns(const Product& p, const Chunks<I>& chunks, int64_t begin, int64_t end,
                      const float* x) {
    const Weight& w = p.weight;
    const int64_t panels = (end - begin) * kPanels;
    const Scratch weight(size_t(panels * kPanelSize) * 4);  // [panel][n][kWidth]
    const Scratch y(size_t(panels * p.m * kWidth) * 4);     // [panel][m][kWidth]
    typename I::template Decoder<D> decoder(w.code);
    for (int64_t n0 = 0; n0 < w.n; n0 += kDepth) {
      const int64_t depth = min64(kDepth, w.n - n0);
      for (int64_t n = n0; n < n0 + depth; ++n) {
        for (int64_t c = begin; c < end; c += 128 / I::kChunk) {
          I::prefetch(w.packed + min64(n + kAhead, w.n - 1) * (w.k / 2) + c * I::kChunk / 2);
        }
        float scales[kSteps * I::kChunk / 32];
        row_scales<I>(w, chunks, n, begin, end, scales);
        for_chunks(w, chunks, w.packed + n * (w.k / 2), begin, end, scales, decoder,
                   [&](int64_t c, typename I::Bytes bytes) {
                     V v[kVectors<I>];
                     decode_chunk<I>(decoder, bytes, v);
                     for (int r = 0; r < kVectors<I>; ++r) {
                       const int64_t panel = (c - begin) * kPanels + r / 2;
                       I::store(weight.floats() + panel * kPanelSize + (n - n0) * kWidth +
                                    r % 2 * I::kLanes,
                                v[r]);
                     }
                   });
      }
      for (int64_t m = 0; m < p.m; m += I::kRows) {
        const int64_t rows = min64(I::kRows, p.m - m);
        for (int64_t panel = 0; panel < panels; ++panel) {
          Tile<I>::template add<true>(rows, x + m * w.n + n0 * rows,
                                      weight.floats() + panel * kPanelSize, depth,
                                      y.floats() + (panel * p.m + m) * kWidth, n0 == 0);
        }
      }
    }
    for (int64_t m = 0; m < p.m; ++m) {
      for (int64_t c = begin; c < end; ++c) {
        const float* from = y.floats() + (c - begin) * kPanels * p.m * kWidth + m * kWidth;
        float ordered[I::kChunk];
        reorder<I>([&](int i, int element) {
          ordered[element] = from[i / kWidth * p.m * kWidth + i % kWidth];
        });
        const int64_t k = c * I::kChunk, have = min64(I::kChunk, w.k - k);
        for (int64_t i = 0; i < have; ++i) write(D, p.y, m * w.k + k + i, ordered[i]);
      }
    }
  }
};

}  // namespace
}  // namespace q4jax
