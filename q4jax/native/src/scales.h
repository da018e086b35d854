// Float32 scales of a run of blocks.
#pragma once

#include "half_float.h"
#include "kernel_args.h"

namespace q4jax {
namespace {

constexpr int64_t kNestedBlocksize = 256;

// Scales of the blocks [first, first + count) of the weight. Every NaN becomes the same one, whose
// low bits are 0, so that rounding a product with it to 16 bits cannot carry into the sign.
inline void decode_scales(const Scales& scales, int64_t first, int64_t count, float* out) {
  if (scales.plain) {
    for (int64_t i = 0; i < count; ++i) out[i] = scales.plain[first + i];
  } else {
    for (int64_t i = 0; i < count;) {
      const int64_t group = (first + i) / kNestedBlocksize;
      const int64_t end = (group + 1) * kNestedBlocksize - first;
      const float nested = scales.nested_absmax[group];
      for (; i < count && i < end; ++i) {
        // Two roundings: the file is compiled without contraction.
        out[i] = scales.dynamic_map[scales.codes[first + i]] * nested + scales.offset;
      }
    }
  }
  const float nan = float_of(0x7fc00000);
  for (int64_t i = 0; i < count; ++i) out[i] = out[i] == out[i] ? out[i] : nan;
}

}  // namespace
}  // namespace q4jax
