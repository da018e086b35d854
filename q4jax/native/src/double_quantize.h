// Double quantization: 8-bit codes of scales, as q4jax/blockwise.py defines them.
#pragma once

#include "kernel_args.h"

namespace q4jax {

struct ScaleQuantization {
  const float* absmax;  // [size]
  int64_t size;
  const float* thresholds;  // [255]
  uint8_t* codes;           // [size]
  float* nested_absmax;     // [ceil(size / 256)]
  float* offset;            // []
};

void double_quantize(const ScaleQuantization& q, Pool& pool);

}  // namespace q4jax
