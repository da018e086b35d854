#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace q4jax {
namespace {

// Sets "flush to zero" and "denormals are zero" for its lifetime.
class FlushSubnormals {
#if defined(__x86_64__)
 public:
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
 public:
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(saved_ | uint64_t{1} << 24));
  }
  ~FlushSubnormals() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

// Outlives the call that made it: a helper that the pool starts late still reads `next`.
struct Job {
  std::atomic<int64_t> next{0}, finished{0};
  std::atomic<bool> out_of_memory{false};
  int64_t count;
  void (*task)(const void*, int64_t);
  const void* context;
  std::mutex mutex;
  std::condition_variable all_finished;

  // Takes tasks until none is left. Whoever takes none does not touch `context`.
  void work() {
    FlushSubnormals flush;
    int64_t done = 0;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count; ++done) {
      try {
        task(context, i);
      } catch (const std::bad_alloc&) {
        out_of_memory = true;
      }
    }
    if (done && finished.fetch_add(done, std::memory_order_acq_rel) + done == count) {
      std::lock_guard<std::mutex> lock(mutex);
      all_finished.notify_all();
    }
  }

  bool complete() const { return finished.load(std::memory_order_acquire) == count; }
};

}  // namespace

void run_tasks(Pool& pool, int64_t count, void (*task)(const void*, int64_t), const void* context) {
  const int64_t helpers = std::min(pool.threads(), count) - 1;
  if (helpers <= 0) {
    FlushSubnormals flush;
    for (int64_t i = 0; i < count; ++i) task(context, i);
    return;
  }
  auto job = std::make_shared<Job>();
  job->count = count;
  job->task = task;
  job->context = context;
  for (int64_t i = 0; i < helpers; ++i) {
    pool.schedule(
        [](void* data) {
          std::unique_ptr<std::shared_ptr<Job>> held(static_cast<std::shared_ptr<Job>*>(data));
          (*held)->work();
        },
        new std::shared_ptr<Job>(job));
  }
  // The caller works too, and then waits only for tasks that run already: a pool whose threads
  // are all busy, perhaps with callers like this one, cannot stop it.
  job->work();
  for (int spin = 0; spin < 2000 && !job->complete(); ++spin) {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
  std::unique_lock<std::mutex> lock(job->mutex);
  job->all_finished.wait(lock, [&] { return job->complete(); });
  if (job->out_of_memory) throw std::bad_alloc();
}

}  // namespace q4jax
