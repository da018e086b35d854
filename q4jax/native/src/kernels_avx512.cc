#if defined(__x86_64__)
// Before the target is set: code shared with other files is not to be compiled for it.
#include <immintrin.h>

#include <cstring>

#include "parallel.h"
#include "scratch.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC's own header
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#include "isa_avx512.h"
#include "kernels.h"

namespace q4jax {
const Kernels kAvx512 = kernels_of<Avx512>();
}  // namespace q4jax

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
