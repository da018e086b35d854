// y = x W.T + bias. For a few rows of x the weight is decoded in registers and used at once; for
// more, a tile of it is decoded to memory and multiplied as in any matrix product.
#pragma once

#include "decode.h"
#include "parallel.h"
#include "scratch.h"
#include "microkernel.h"

namespace q4jax {
namespace {

// Below so many products a second thread costs more than it saves.
constexpr int64_t kSerial = int64_t{1} << 18;

class OneThread final : public Pool {
 public:
  int64_t threads() const override { return 1; }
  void schedule(void (*)(void*), void*) override {}
};

template <class I, Dtype D>
class Linear {
 public:
  static void run(const Product& p, Pool& pool) {
    OneThread serial;
    Pool& used = p.weight.n * p.weight.k * p.m < kSerial ? serial : pool;
    if (p.m <= kGemvRows) {
      gemv(p, used);
    } else {
      gemm(p, used);
    }
  }

 private:
  using V = typename I::V;
  using Decoder = typename I::template Decoder<D>;
  static constexpr int kGemvRows = 8, kPass = 8;
  static constexpr int64_t kGroup = 16;            // rows of the weight to a task
  static constexpr int64_t kCached = 256 * 1024;  // bytes of x that stay in the second cache
  using Factors = typename FactorsOf<I, D>::Type;
  using Tiles = Tile<I, Factors>;
  static constexpr int64_t kWords = Factors::kWords;
  static constexpr int64_t kDepth = Tiles::kDepth;
  static constexpr int64_t kWidth = Tiles::kWidth;
  static constexpr int64_t kAhead = 4;             // rows whose codes are fetched meanwhile
  static constexpr int64_t kLeastTile = 48, kLargestTile = 192;  // rows; multiples of I::kRows

  static float bias(const Product& p, int64_t n) {
    return p.bias ? read(p.bias_dtype, p.bias, n) : 0.0f;
  }

  // Sums per row of x, so that consecutive additions do not wait for each other. A V of several
  // registers is several sums already.
  static constexpr int sums(int m) {
    constexpr int registers = sizeof(V) / alignof(V);
    return int(max64((m <= 2 ? 4 : m <= 5 ? 2 : 1) / registers, 1));
  }

  // x is laid out as [pass][chunk][row of the pass][kChunk], in the order of decoded chunks.
  static void gemv(const Product& p, Pool& pool) {
    const Weight& w = p.weight;
    const Chunks<I> chunks(w);
    const int64_t padded = chunks.count * I::kChunk;
    const int64_t passes = ceil_div(p.m, kPass), rows = ceil_div(p.m, passes);
    const Scratch x(size_t(p.m * padded) * 4);
    OneThread serial;
    parallel(p.m * w.k < (1 << 15) ? serial : pool, p.m, [&](int64_t m) {
      const int64_t first = m / rows * rows, count = min64(rows, p.m - first);
      for (int64_t c = 0; c < chunks.count; ++c) {
        float wide[I::kChunk];
        load_chunk(p, m, c, wide);
        float* out = x.floats() + first * padded + (c * count + m - first) * I::kChunk;
        reorder<I>([&](int i, int element) { out[i] = wide[element]; });
      }
    });
    const Decoder decoder(w.code);
    parallel(pool, ceil_div(w.n, kGroup), [&](int64_t task) {
      const int64_t begin = task * kGroup, end = min64(w.n, begin + kGroup);
      const Scratch scales(size_t(kGroup * chunks.scales()) * 4);
      for (int64_t n = begin; n < end; ++n) {
        row_scales<I>(w, chunks, n, 0, chunks.count,
                      scales.floats() + (n - begin) * chunks.scales());
      }
      for (int64_t m = 0; m < p.m; m += rows) {
        const Gemv d = {p, chunks, decoder, begin, end, scales.floats(), m,
                        x.floats() + m * padded};
        gemv_up_to<kPass>(min64(rows, p.m - m), d);
      }
    });
  }

  // Elements of a chunk of row m of x, zeros behind the last.
  static void load_chunk(const Product& p, int64_t m, int64_t chunk, float* out) {
    const int64_t k0 = chunk * I::kChunk, have = min64(I::kChunk, p.weight.k - k0);
    for (int64_t i = 0; i < I::kChunk; i += I::kLanes) {
      I::store(out + i, i < have ? I::template widen<D>(p.x, m * p.weight.k + k0 + i) : I::zero());
    }
  }

  // What makes y[m : m + M, begin : end].
  struct Gemv {
    const Product& p;
    const Chunks<I>& chunks;
    const Decoder& decoder;
    int64_t begin, end;
    const float* scales;
    int64_t m;
    const float* x;
  };

  // gemv_rows<count>, for 1 <= count <= M.
  template <int M>
  static void gemv_up_to(int64_t count, const Gemv& d) {
    if (count == M) {
      gemv_rows<M>(d);
    } else if constexpr (M > 1) {
      gemv_up_to<M - 1>(count, d);
    }
  }

  template <int M>
  static void gemv_rows(const Gemv& d) {
    constexpr int kSums = sums(M);
    const Product& p = d.p;
    const Weight& w = p.weight;
    const int64_t part = max64(kCached / (4 * M * I::kChunk), 1);  // chunks, for all rows
    alignas(64) float partial[kGroup][M][kSums][I::kLanes];
    Decoder decoder = d.decoder;
    for (int64_t c0 = 0; c0 < d.chunks.count; c0 += part) {
      const int64_t c1 = min64(d.chunks.count, c0 + part);
      for (int64_t n = d.begin; n < d.end; ++n) {
        V sum[M][kSums];
        for (int m = 0; m < M; ++m) {
          for (int s = 0; s < kSums; ++s) {
            sum[m][s] = c0 ? I::load(partial[n - d.begin][m][s]) : I::zero();
          }
        }
        const float* scales =
            d.scales + (n - d.begin) * d.chunks.scales() + d.chunks.first_scale(c0);
        const uint8_t* ahead = w.packed + min64(n + kAhead / 2, w.n - 1) * (w.k / 2);
        for_chunks(w, d.chunks, w.packed + n * (w.k / 2), c0, c1, scales, decoder,
                   [&](int64_t c, typename I::Bytes bytes) Q4JAX_INLINE {
                     const float* x = d.x + c * M * I::kChunk;
                     I::prefetch(ahead + c * (I::kChunk / 2));
                     half_chunk<0>(decoder, bytes, x, sum);
                     half_chunk<1>(decoder, bytes, x + I::kChunk / 2, sum);
                   });
        for (int m = 0; m < M; ++m) {
          for (int s = 0; s < kSums; ++s) I::store(partial[n - d.begin][m][s], sum[m][s]);
        }
      }
    }
    for (int64_t n = d.begin; n < d.end; ++n) {
      const float extra = bias(p, n);
      for (int m = 0; m < M; ++m) {
        V total = I::load(partial[n - d.begin][m][0]);
        for (int s = 1; s < kSums; ++s) total = I::add(total, I::load(partial[n - d.begin][m][s]));
        write(D, p.y, (d.m + m) * w.n + n, I::sum(total) + extra);
      }
    }
  }

  template <int Half, int M, int S>
  Q4JAX_INLINE static void half_chunk(const Decoder& decoder, typename I::Bytes bytes,
                                      const float* x, V (&sum)[M][S]) {
    constexpr int kHalf = kVectors<I> / 2;
    V weight[kHalf];
    decoder.template decode<Half>(bytes, weight);
    for (int r = 0; r < kHalf; ++r) {
      for (int m = 0; m < M; ++m) {
        V& to = sum[m][(Half * kHalf + r) % S];
        to = I::fma(weight[r], I::load(x + m * I::kChunk + r * I::kLanes), to);
      }
    }
  }

  // x.T in panels of kWidth columns, [panel][words of the chunks][kWidth], then tiles of W.
  static void gemm(const Product& p, Pool& pool) {
    const Weight& w = p.weight;
    const Chunks<I> chunks(w);
    const int64_t padded = chunks.count * kWords, count = ceil_div(p.m, kWidth);
    const Scratch x(size_t(count * padded * kWidth) * 4);
    const int64_t step = 16;  // chunks to a task
    const int64_t steps = ceil_div(chunks.count, step);
    parallel(pool, count * steps, [&](int64_t task) {
      const int64_t panel = task / steps, c0 = task % steps * step;
      const int64_t rows = min64(kWidth, p.m - panel * kWidth);
      for (int64_t c = c0; c < min64(chunks.count, c0 + step); ++c) {
        pack_chunk(p, panel * kWidth, rows, c,
                   x.floats() + (panel * padded + c * kWords) * kWidth);
      }
    });
    // All of x is read for each tile: large ones, but several for each thread.
    const int64_t shared = w.n / (8 * pool.threads()) / kLeastTile * kLeastTile;
    const int64_t size = min64(max64(shared, kLeastTile), kLargestTile);
    parallel(pool, ceil_div(w.n, size), [&](int64_t task) {
      tile(p, chunks, task * size, min64(w.n, (task + 1) * size), x.floats());
    });
  }

  static void pack_chunk(const Product& p, int64_t m0, int64_t rows, int64_t chunk, float* out) {
    for (int64_t m = 0; m < kWidth; ++m) {
      float wide[I::kChunk] = {};
      if (m < rows) load_chunk(p, m0 + m, chunk, wide);
#pragma GCC unroll 128
      for (int i = 0; i < kWords; ++i) out[i * kWidth + m] = Factors::word(wide, i);
    }
  }

  // y[:, begin : end].
  static void tile(const Product& p, const Chunks<I>& chunks, int64_t begin, int64_t end,
                   const float* x) {
    constexpr int64_t kSteps = kDepth / kWords;
    const Weight& w = p.weight;
    const int64_t padded = chunks.count * kWords, count = ceil_div(p.m, kWidth);
    const int64_t size = ceil_div(end - begin, I::kRows) * I::kRows;
    const Scratch weight(size_t(size * kDepth) * 4);      // [n][kDepth]
    const Scratch y(size_t(count * size * kWidth) * 4);  // [panel][n][kWidth]
    Decoder decoder(w.code);
    for (int64_t c0 = 0; c0 < chunks.count; c0 += kSteps) {
      const int64_t c1 = min64(chunks.count, c0 + kSteps);
      for (int64_t n = begin; n < end; ++n) {
        float scales[kSteps * I::kChunk / 32];
        row_scales<I>(w, chunks, n, c0, c1, scales);
        float* out = weight.floats() + (n - begin) * kDepth;
        const uint8_t* ahead = w.packed + min64(n + kAhead, w.n - 1) * (w.k / 2);
        for (int64_t c = c0; c < c1; c += 128 / I::kChunk) I::prefetch(ahead + c * I::kChunk / 2);
        for_chunks(w, chunks, w.packed + n * (w.k / 2), c0, c1, scales, decoder,
                   [&](int64_t c, typename I::Bytes bytes) {
                     V v[kVectors<I>];
                     decode_chunk<I>(decoder, bytes, v);
                     Factors::store(out + (c - c0) * kWords, v);
                   });
      }
      for (int64_t panel = 0; panel < count; ++panel) {
        const float* b = x + (panel * padded + c0 * kWords) * kWidth;
        for (int64_t r = 0; r < end - begin; r += I::kRows) {
          Tiles::template add<false>(min64(I::kRows, end - begin - r),
                                     weight.floats() + r * kDepth, b, (c1 - c0) * kWords,
                                     y.floats() + (panel * size + r) * kWidth, c0 == 0);
        }
      }
    }
    for (int64_t m = 0; m < p.m; ++m) {
      const float* from = y.floats() + m / kWidth * size * kWidth + m % kWidth;
      for (int64_t n = begin; n < end; ++n) {
        write(D, p.y, m * w.n + n, from[(n - begin) * kWidth] + bias(p, n));
      }
    }
  }
};

}  // namespace
}  // namespace q4jax
