// The tables that Python set, and the instruction set that it chose.
#pragma once

#include "kernel_args.h"

#define Q4JAX_EXPORT extern "C" __attribute__((visibility("default")))

namespace q4jax {

// The format with this number, or null.
const CodeTable* code_table(int64_t number);
const ScaleTable& scale_table();
const Kernels& chosen_kernels();

}  // namespace q4jax
