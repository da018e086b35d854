// The operations for every dtype, compiled once for each instruction set.
#pragma once

#include "dequantize.h"
#include "linear.h"
#include "quantize.h"
#include "linear_transpose.h"

namespace q4jax {
namespace {

template <template <class, Dtype> class Operation, class I, class Arguments>
void by_dtype(const Arguments& arguments, Pool& pool) {
  switch (arguments.dtype) {
    case Dtype::kFloat32:
      return Operation<I, Dtype::kFloat32>::run(arguments, pool);
    case Dtype::kFloat16:
      return Operation<I, Dtype::kFloat16>::run(arguments, pool);
    case Dtype::kBfloat16:
      return Operation<I, Dtype::kBfloat16>::run(arguments, pool);
  }
}

template <class I>
constexpr Kernels kernels_of() {
  return {by_dtype<Linear, I>, by_dtype<Transposed, I>, by_dtype<Quantize, I>,
          by_dtype<Dequantize, I>};
}

}  // namespace
}  // namespace q4jax
