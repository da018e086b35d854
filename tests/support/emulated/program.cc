// The kernels of one instruction set, KERNELS, as a program without an operating system or a
// library, for an emulator: it calls an entry point with the address of its arguments.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "parallel.h"
#include "scratch.h"

namespace {

// Temporary memory: taken from one end, given back in the opposite order.
alignas(4096) unsigned char heap[4 << 20];
size_t used = 0;

}  // namespace

// What a compiler takes for granted. An empty asm keeps it from seeing a call of itself in a loop.
extern "C" {

void* memcpy(void* to, const void* from, size_t size) {
  for (size_t i = 0; i < size; ++i) {
    static_cast<char*>(to)[i] = static_cast<const char*>(from)[i];
    asm volatile("");
  }
  return to;
}

void* memmove(void* to, const void* from, size_t size) {
  if (to <= from) return memcpy(to, from, size);
  while (size--) {
    static_cast<char*>(to)[size] = static_cast<const char*>(from)[size];
    asm volatile("");
  }
  return to;
}

void* memset(void* to, int value, size_t size) {
  for (size_t i = 0; i < size; ++i) {
    static_cast<char*>(to)[i] = char(value);
    asm volatile("");
  }
  return to;
}

void abort() { __builtin_trap(); }
void __cxa_pure_virtual() { __builtin_trap(); }
}

// Named by the virtual destructors of pools, none of which is on the heap.
void operator delete(void*) noexcept { __builtin_trap(); }
void operator delete(void*, size_t) noexcept { __builtin_trap(); }

namespace q4jax {

Scratch::Scratch(size_t bytes) : data_(heap + used), size_((bytes + 63) / 64 * 64) {
  if (size_ > sizeof heap - used) __builtin_trap();
  used += size_;
  std::memset(data_, 0xff, size_);  // NaN, should it be read before it is written
}

Scratch::~Scratch() { used -= size_; }

void run_tasks(Pool&, int64_t count, void (*task)(const void*, int64_t), const void* context) {
  for (int64_t i = 0; i < count; ++i) task(context, i);
}

namespace {

class NoThreads final : public Pool {
 public:
  int64_t threads() const override { return 1; }
  void schedule(void (*)(void*), void*) override { __builtin_trap(); }
};

// As in parallel.cc.
void flush_subnormals() {
#if defined(__x86_64__)
  _mm_setcsr(_mm_getcsr() | 0x8040);
#elif defined(__aarch64__)
  asm volatile("msr fpcr, %0" : : "r"(uint64_t{1} << 24));
#endif
}

// operations.py fills it in: integers of 64 bits, pointers among them, 0 where there is nothing.
struct Arguments {
  const uint8_t* packed;
  const float* plain;
  const uint8_t* codes;
  const float* nested_absmax;
  uint64_t offset;  // the bits of a float32
  const float* dynamic_map;
  const float* code;
  int64_t n, k, blocksize, dtype, bias_dtype;
  const void* x;
  const void* bias;
  void* y;
  int64_t m;
  const float* thresholds;
  const uint8_t* sorted_codes;
  int64_t size;
  uint8_t* to_packed;
  float* to_absmax;
};

Weight weight(const Arguments& a) {
  const uint32_t bits = uint32_t(a.offset);
  float offset;
  std::memcpy(&offset, &bits, 4);
  return {a.packed, {a.plain, a.codes, a.nested_absmax, offset, a.dynamic_map}, a.code, a.n, a.k,
          a.blocksize};
}

void product(const Arguments& a, void (*kernel)(const Product&, Pool&)) {
  NoThreads pool;
  flush_subnormals();
  kernel({weight(a), Dtype(a.dtype), Dtype(a.bias_dtype), a.x, a.bias, a.y, a.m}, pool);
}

}  // namespace
}  // namespace q4jax

#define ENTRY extern "C" __attribute__((used))

ENTRY void linear(const q4jax::Arguments* a) { q4jax::product(*a, q4jax::KERNELS.linear); }

ENTRY void transposed(const q4jax::Arguments* a) { q4jax::product(*a, q4jax::KERNELS.transposed); }

ENTRY void dequantize(const q4jax::Arguments* a) {
  q4jax::NoThreads pool;
  q4jax::flush_subnormals();
  q4jax::KERNELS.dequantize({q4jax::weight(*a), q4jax::Dtype(a->dtype), a->y}, pool);
}

ENTRY void quantize(const q4jax::Arguments* a) {
  q4jax::NoThreads pool;
  q4jax::flush_subnormals();
  q4jax::KERNELS.quantize({q4jax::Dtype(a->dtype), a->x, a->size, a->blocksize, a->thresholds,
                           a->sorted_codes, a->to_packed, a->to_absmax},
                          pool);
}
