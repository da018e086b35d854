#include "isa_dispatch.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace q4jax {
namespace {

CodeTable code_tables[kMostCodeTables];
std::atomic<int64_t> code_table_count{0};
ScaleTable stored_scale_table;

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool (*supported)();
};

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() {
  unsigned a, b, c = 0, d;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

// Best first.
const Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512_bf16", &kAvx512Bf16, has_avx512_bf16},
    {"avx512", &kAvx512, has_avx512},
    {"avx2", &kAvx2, has_avx2},
#elif defined(__aarch64__)
    {"neon", &kNeon, always},
#endif
    {"portable", &kPortable, always},
};

std::atomic<const Kernels*> chosen{&kPortable};

}  // namespace

const CodeTable* code_table(int64_t number) {
  return number >= 0 && number < code_table_count ? &code_tables[number] : nullptr;
}
const ScaleTable& scale_table() { return stored_scale_table; }
const Kernels& chosen_kernels() { return *chosen; }

}  // namespace q4jax

// Must be called once, with the size of the argument, before any operation.
Q4JAX_EXPORT bool q4jax_set_scale_table(const void* table, size_t size) {
  if (size != sizeof q4jax::stored_scale_table) return false;
  std::memcpy(&q4jax::stored_scale_table, table, size);
  return true;
}

// Adds a format and returns its number, or -1. The caller holds a lock.
Q4JAX_EXPORT int64_t q4jax_add_code_table(const void* table, size_t size) {
  const int64_t number = q4jax::code_table_count;
  if (size != sizeof(q4jax::CodeTable) || number == q4jax::kMostCodeTables) return -1;
  std::memcpy(&q4jax::code_tables[number], table, size);
  q4jax::code_table_count = number + 1;
  return number;
}

// The name of the i-th instruction set that this machine has, best first; null after the last.
Q4JAX_EXPORT const char* q4jax_isa(int i) {
  for (const q4jax::Isa& isa : q4jax::kIsas) {
    if (isa.supported() && i-- == 0) return isa.name;
  }
  return nullptr;
}

// Whether the machine has that instruction set; if so, the operations that follow use it.
Q4JAX_EXPORT bool q4jax_select(const char* name) {
  for (const q4jax::Isa& isa : q4jax::kIsas) {
    if (!std::strcmp(isa.name, name) && isa.supported()) {
      q4jax::chosen = isa.kernels;
      return true;
    }
  }
  return false;
}
