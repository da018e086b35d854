// The tables that Python set, and the instruction set that it chose.
#pragma once

#include "problem.h"

#define Q4JAX_EXPORT extern "C" __attribute__((visibility("default")))

namespace q4jax {

const Tables& tables();
const Kernels& chosen_kernels();

}  // namespace q4jax
