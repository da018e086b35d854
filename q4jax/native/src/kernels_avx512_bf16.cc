#if defined(__x86_64__)
// Before the target is set: code shared with other files is not to be compiled for it.
#include <immintrin.h>

#include <cstring>

#include "parallel.h"
#include "scratch.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC's own header
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#include "isa_avx512_bf16.h"
#include "linear.h"

namespace q4jax {
namespace {

void linear(const Product& p, Pool& pool) {
  if (p.dtype == Dtype::kBfloat16) return Linear<Avx512Bf16, Dtype::kBfloat16>::run(p, pool);
  kAvx512.linear(p, pool);
}

// The rest is that of kAvx512.
void transposed(const Product& p, Pool& pool) { kAvx512.transposed(p, pool); }
void quantize(const Quantization& q, Pool& pool) { kAvx512.quantize(q, pool); }
void dequantize(const Dequantization& d, Pool& pool) { kAvx512.dequantize(d, pool); }

}  // namespace

const Kernels kAvx512Bf16 = {linear, transposed, quantize, dequantize};
}  // namespace q4jax

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
