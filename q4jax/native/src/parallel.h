// Runs the tasks of a loop on a pool and on the calling thread.
#pragma once

#include "kernel_args.h"

namespace q4jax {

// Calls task(context, i) for every i in [0, count), in any order, and returns when all are done.
// Throws std::bad_alloc where a task did. Arithmetic in the tasks treats subnormal numbers as zero, as XLA's does.
void run_tasks(Pool& pool, int64_t count, void (*task)(const void*, int64_t), const void* context);

template <typename F>
void parallel(Pool& pool, int64_t count, const F& f) {
  run_tasks(
      pool, count, [](const void* context, int64_t i) { (*static_cast<const F*>(context))(i); },
      &f);
}

}  // namespace q4jax
