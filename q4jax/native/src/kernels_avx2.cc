#if defined(__x86_64__)
// Before the target is set: code shared with other files is not to be compiled for it.
#include <immintrin.h>

#include <cstring>

#include "parallel.h"
#include "scratch.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "encode_avx2.h"
#include "isa_avx2.h"
#include "kernels.h"

namespace q4jax {
const Kernels kAvx2 = kernels_of<Avx2>();
}  // namespace q4jax

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
