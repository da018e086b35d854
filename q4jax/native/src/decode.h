// The weight chunk by chunk, in an instruction set I.
#pragma once

#include <cstring>

#include "kernel_args.h"
#include "scales.h"

namespace q4jax {
namespace {

// Not std::min and std::max: a linker may keep the copy of a shared template that was compiled for
// an instruction set this machine lacks.
constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max64(int64_t a, int64_t b) { return a < b ? b : a; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How rows are cut into chunks; the last one may be partial, and is filled with zeros.
template <class I>
struct Chunks {
  explicit Chunks(const Weight& w)
      : count(ceil_div(w.k, I::kChunk)),
        per_block(w.blocksize > I::kChunk ? w.blocksize / I::kChunk : 1),
        blocks(w.blocksize < I::kChunk ? I::kChunk / w.blocksize : 1) {}

  int64_t count;
  int64_t per_block;  // chunks that share a scale
  int64_t blocks;     // scales of one chunk

  int64_t first_scale(int64_t chunk) const { return chunk / per_block * blocks; }
  int64_t scales() const { return first_scale(count - 1) + blocks; }
};

// The scales of row n that chunks [begin, end) need, from out[0] on.
template <class I>
inline void row_scales(const Weight& w, const Chunks<I>& chunks, int64_t n, int64_t begin,
                       int64_t end, float* out) {
  const int64_t in_row = w.k / w.blocksize, first = chunks.first_scale(begin);
  const int64_t count = chunks.first_scale(end - 1) + chunks.blocks - first;
  const int64_t present = first + count < in_row ? count : in_row - first;
  decode_scales(w.scales, n * in_row + first, present, out);
  for (int64_t i = present; i < count; ++i) out[i] = 0;
}

// Of a decoded chunk.
template <class I>
constexpr int kVectors = I::kChunk / I::kLanes;

template <class I, class D>
inline void decode_chunk(const D& decoder, typename I::Bytes bytes,
                         typename I::V (&v)[kVectors<I>]) {
  decoder.template decode<0>(bytes, v);
  decoder.template decode<1>(bytes, v + kVectors<I> / 2);
}

// Calls f(position, element) for all that a chunk holds. Unrolled, both are constants in f.
template <class I, class F>
inline void reorder(const F& f) {
#pragma GCC unroll 128
  for (int i = 0; i < I::kChunk; ++i) f(i, I::element(i));
}

// Calls f(chunk, bytes) for the chunks [begin, end) of a row, with their scales set in `decoder`;
// scales[0] is the first of them. There is a loop for each case because what it does beside f
// shows in the time of a single row of x.
template <class I, class D, class F>
inline void for_chunks(const Weight& w, const Chunks<I>& chunks, const uint8_t* row, int64_t begin,
                       int64_t end, const float* scales, D& decoder, const F& f) {
  constexpr int64_t kBytes = I::kChunk / 2;
  int64_t c = begin;
  if (chunks.blocks > 1) {
    const int64_t whole = min64(end, w.k / I::kChunk);
    for (; c < whole; ++c, scales += chunks.blocks) {
      decoder.scale(scales, chunks.blocks);
      f(c, I::load_bytes(row + c * kBytes));
    }
    if (c < end) {
      uint8_t padded[kBytes] = {};
      std::memcpy(padded, row + c * kBytes, size_t(w.k / 2 - c * kBytes));
      decoder.scale(scales, chunks.blocks);
      f(c, I::load_bytes(padded));
    }
  } else if (chunks.per_block == 1) {
    for (; c < end; ++c) {
      decoder.scale(*scales++);
      f(c, I::load_bytes(row + c * kBytes));
    }
  } else {
    for (int64_t next = (c / chunks.per_block + 1) * chunks.per_block; c < end;
         next += chunks.per_block) {
      decoder.scale(*scales++);
      for (const int64_t stop = min64(next, end); c < stop; ++c) {
        f(c, I::load_bytes(row + c * kBytes));
      }
    }
  }
}

}  // namespace
}  // namespace q4jax
