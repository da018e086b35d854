#if defined(__aarch64__)
#include "encode_neon.h"
#include "isa_neon.h"
#include "kernels.h"

namespace q4jax {
const Kernels kNeon = kernels_of<Neon>();
}  // namespace q4jax
#endif
