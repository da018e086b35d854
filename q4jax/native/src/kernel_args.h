// What a kernel is asked to do, in plain pointers: filled in by ffi.cc after it has checked shapes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace q4jax {

enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// A 4-bit format: q4jax/core/codebooks.py hands over each Codebook before its first use.
struct CodeTable {
  float code[16];            // what a 4-bit code decodes to
  float thresholds[15];      // ascending
  uint8_t sorted_codes[16];  // the code of each interval between thresholds
};

constexpr int64_t kMostCodeTables = 16;

// The 8-bit format of double-quantized scales.
struct ScaleTable {
  float dynamic_map[256];         // what a code decodes to
  float dynamic_thresholds[255];  // ascending
};

// Scales of blocks: float32, or with double quantization 8-bit codes of them.
struct Scales {
  const float* plain;  // null where nested
  const uint8_t* codes;
  const float* nested_absmax;  // one for each 256 codes
  float offset;
  const float* dynamic_map;
};

// A weight [n, k] whose rows are whole blocks.
struct Weight {
  const uint8_t* packed;  // [n, k / 2], the element of even index in the high nibble
  Scales scales;          // [n, k / blocksize]
  const float* code;      // [16]
  int64_t n, k, blocksize;
};

// y[m, n] = x[m, k] W.T + bias, or y[m, k] = x[m, n] W; x and y of one dtype.
struct Product {
  Weight weight;
  Dtype dtype, bias_dtype;
  const void* x;
  const void* bias;  // [n], or null
  void* y;
  int64_t m;
};

struct Dequantization {
  Weight weight;
  Dtype dtype;
  void* w;  // [n, k]
};

struct Quantization {
  Dtype dtype;
  const void* w;  // [size]
  int64_t size, blocksize;
  const float* thresholds;
  const uint8_t* sorted_codes;
  uint8_t* packed;  // [(size + 1) / 2]
  float* absmax;    // [blocks]
};

// Where tasks may run beside the caller.
class Pool {
 public:
  virtual ~Pool() = default;
  virtual int64_t threads() const = 0;
  virtual void schedule(void (*function)(void*), void* data) = 0;
};

// The operations in one instruction set.
struct Kernels {
  void (*linear)(const Product&, Pool&);
  void (*transposed)(const Product&, Pool&);
  void (*quantize)(const Quantization&, Pool&);
  void (*dequantize)(const Dequantization&, Pool&);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512, kAvx512Bf16;
#elif defined(__aarch64__)
extern const Kernels kNeon;
#endif

}  // namespace q4jax
