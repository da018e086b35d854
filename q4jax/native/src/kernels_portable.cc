#include "isa_portable.h"
#include "kernels.h"

namespace q4jax {
const Kernels kPortable = kernels_of<Portable>();
}  // namespace q4jax
