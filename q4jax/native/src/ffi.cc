// The operations as XLA custom calls. Every shape and dtype is checked here, before any kernel
// touches memory: an XLA program may come from a file.
#include <atomic>
#include <cstring>
#include <new>
#include <string>

#include "double_quantize.h"
#include "problem.h"
#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace ffi = xla::ffi;

namespace q4jax {
namespace {

Tables tables;

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
#endif

// Best first.
const Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx2", &kAvx2, has_avx2},
#endif
    {"portable", &kPortable, always},
};

std::atomic<const Isa*> selected{nullptr};

class FfiPool final : public Pool {
 public:
  explicit FfiPool(ffi::ThreadPool& pool) : pool_(pool), threads_(pool.num_threads()) {}
  int64_t threads() const override { return threads_; }
  void schedule(void (*function)(void*), void* data) override {
    pool_.Schedule([function, data] { function(data); });
  }

 private:
  ffi::ThreadPool& pool_;
  int64_t threads_;
};

ffi::Error invalid(const std::string& what) { return ffi::Error::InvalidArgument("q4jax: " + what); }

bool has_shape(const ffi::AnyBuffer& buffer, std::initializer_list<int64_t> shape) {
  const auto dims = buffer.dimensions();
  return dims.size() == shape.size() && std::equal(dims.begin(), dims.end(), shape.begin());
}

bool dtype_of(const ffi::AnyBuffer& buffer, Dtype& dtype) {
  switch (buffer.element_type()) {
    case ffi::DataType::F32:
      dtype = Dtype::kFloat32;
      return true;
    case ffi::DataType::F16:
      dtype = Dtype::kFloat16;
      return true;
    case ffi::DataType::BF16:
      dtype = Dtype::kBfloat16;
      return true;
    default:
      return false;
  }
}

bool allowed_blocksize(int64_t b) { return b >= 32 && b <= 4096 && (b & (b - 1)) == 0; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Beyond this a product of two sizes could overflow.
constexpr int64_t kLargest = int64_t{1} << 40;

template <typename F>
ffi::Error guarded(const F& f) {
  try {
    f();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "q4jax: out of memory");
  }
  return ffi::Error::Success();
}

// linear: x [m, k] -> y [m, n]. transposed: x [m, n] -> y [m, k], and no bias.
ffi::Error product(bool transposed, ffi::ThreadPool threads, ffi::AnyBuffer x,
                   ffi::AnyBuffer packed, ffi::AnyBuffer absmax, ffi::AnyBuffer nested_absmax,
                   ffi::AnyBuffer offset, ffi::AnyBuffer bias, ffi::Result<ffi::AnyBuffer> y,
                   int64_t quant_type, int64_t blocksize) {
  if (quant_type != 0 && quant_type != 1) return invalid("quant_type must be 0 or 1");
  if (!allowed_blocksize(blocksize)) return invalid("invalid blocksize");
  Product p;
  Dtype y_dtype;
  if (!dtype_of(x, p.dtype) || !dtype_of(*y, y_dtype) || y_dtype != p.dtype) {
    return invalid("x and the result must be of one float dtype of 16 or 32 bits");
  }
  if (x.dimensions().size() != 2 || packed.dimensions().size() != 2) {
    return invalid("x and packed must have two axes");
  }
  const int64_t m = x.dimensions()[0], n = packed.dimensions()[0];
  if (packed.dimensions()[1] > kLargest || n > kLargest || m > kLargest) return invalid("too large");
  const int64_t k = packed.dimensions()[1] * 2;
  if (packed.element_type() != ffi::DataType::U8) return invalid("packed must be uint8");
  if (n == 0 || k == 0 || k % blocksize) return invalid("rows must be whole blocks");
  if (!has_shape(x, {m, transposed ? n : k})) return invalid("x does not fit packed");
  if (!has_shape(*y, {m, transposed ? k : n})) return invalid("the result does not fit packed");
  if (!has_shape(absmax, {n, k / blocksize})) return invalid("absmax does not fit packed");
  const bool nested = absmax.element_type() == ffi::DataType::U8;
  if (!nested && absmax.element_type() != ffi::DataType::F32) {
    return invalid("absmax must be float32, or uint8 codes");
  }
  if (nested_absmax.element_type() != ffi::DataType::F32 ||
      !has_shape(nested_absmax, {nested ? ceil_div(n * (k / blocksize), 256) : 0})) {
    return invalid("nested_absmax does not fit absmax");
  }
  if (offset.element_type() != ffi::DataType::F32 || !has_shape(offset, {})) {
    return invalid("offset must be a float32 scalar");
  }
  const bool has_bias = !has_shape(bias, {0});
  if (has_bias && (transposed || !has_shape(bias, {n}))) return invalid("bias does not fit packed");
  if (!dtype_of(bias, p.bias_dtype)) return invalid("bias must be float");
  p.x = x.untyped_data();
  p.y = y->untyped_data();
  p.bias = has_bias ? bias.untyped_data() : nullptr;
  p.m = m;
  p.weight = {static_cast<const uint8_t*>(packed.untyped_data()),
              {nested ? nullptr : static_cast<const float*>(absmax.untyped_data()),
               static_cast<const uint8_t*>(absmax.untyped_data()),
               static_cast<const float*>(nested_absmax.untyped_data()),
               *static_cast<const float*>(offset.untyped_data()), tables.dynamic_map},
              tables.code[quant_type],
              n,
              k,
              blocksize};
  if (m == 0) return ffi::Error::Success();
  FfiPool pool(threads);
  const Kernels& kernels = *selected.load()->kernels;
  return guarded([&] { (transposed ? kernels.transposed : kernels.linear)(p, pool); });
}

ffi::Error quantize(ffi::ThreadPool threads, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> packed,
                    ffi::Result<ffi::AnyBuffer> absmax, int64_t quant_type, int64_t blocksize) {
  if (quant_type != 0 && quant_type != 1) return invalid("quant_type must be 0 or 1");
  if (!allowed_blocksize(blocksize)) return invalid("invalid blocksize");
  Quantization q;
  if (!dtype_of(w, q.dtype)) return invalid("w must be a float of 16 or 32 bits");
  const int64_t size = int64_t(w.element_count());
  if (packed->element_type() != ffi::DataType::U8 || !has_shape(*packed, {ceil_div(size, 2)})) {
    return invalid("packed does not fit w");
  }
  if (absmax->element_type() != ffi::DataType::F32 ||
      !has_shape(*absmax, {ceil_div(size, blocksize)})) {
    return invalid("absmax does not fit w");
  }
  q.w = w.untyped_data();
  q.size = size;
  q.blocksize = blocksize;
  q.thresholds = tables.thresholds[quant_type];
  q.sorted_codes = tables.sorted_codes[quant_type];
  q.packed = static_cast<uint8_t*>(packed->untyped_data());
  q.absmax = static_cast<float*>(absmax->untyped_data());
  FfiPool pool(threads);
  return guarded([&] { selected.load()->kernels->quantize(q, pool); });
}

ffi::Error quantize_scales(ffi::ThreadPool threads, ffi::AnyBuffer absmax,
                           ffi::Result<ffi::AnyBuffer> codes,
                           ffi::Result<ffi::AnyBuffer> nested_absmax,
                           ffi::Result<ffi::AnyBuffer> offset) {
  const int64_t size = int64_t(absmax.element_count());
  if (absmax.element_type() != ffi::DataType::F32 || !has_shape(absmax, {size})) {
    return invalid("absmax must be float32 with one axis");
  }
  if (codes->element_type() != ffi::DataType::U8 || !has_shape(*codes, {size})) {
    return invalid("the codes do not fit absmax");
  }
  if (nested_absmax->element_type() != ffi::DataType::F32 ||
      !has_shape(*nested_absmax, {ceil_div(size, 256)})) {
    return invalid("nested_absmax does not fit absmax");
  }
  if (offset->element_type() != ffi::DataType::F32 || !has_shape(*offset, {})) {
    return invalid("offset must be a float32 scalar");
  }
  const ScaleQuantization q = {static_cast<const float*>(absmax.untyped_data()),
                               size,
                               tables.dynamic_thresholds,
                               static_cast<uint8_t*>(codes->untyped_data()),
                               static_cast<float*>(nested_absmax->untyped_data()),
                               static_cast<float*>(offset->untyped_data())};
  FfiPool pool(threads);
  return guarded([&] { double_quantize(q, pool); });
}

auto product_binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()  // x
      .Arg<ffi::AnyBuffer>()  // packed
      .Arg<ffi::AnyBuffer>()  // absmax
      .Arg<ffi::AnyBuffer>()  // nested_absmax
      .Arg<ffi::AnyBuffer>()  // offset
      .Arg<ffi::AnyBuffer>()  // bias
      .Ret<ffi::AnyBuffer>()  // y
      .Attr<int64_t>("quant_type")
      .Attr<int64_t>("blocksize");
}

ffi::Error linear(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer packed,
                  ffi::AnyBuffer absmax, ffi::AnyBuffer nested_absmax, ffi::AnyBuffer offset,
                  ffi::AnyBuffer bias, ffi::Result<ffi::AnyBuffer> y, int64_t quant_type,
                  int64_t blocksize) {
  return product(false, threads, x, packed, absmax, nested_absmax, offset, bias, y, quant_type,
                 blocksize);
}

ffi::Error transposed(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer packed,
                      ffi::AnyBuffer absmax, ffi::AnyBuffer nested_absmax, ffi::AnyBuffer offset,
                      ffi::AnyBuffer bias, ffi::Result<ffi::AnyBuffer> y, int64_t quant_type,
                      int64_t blocksize) {
  return product(true, threads, x, packed, absmax, nested_absmax, offset, bias, y, quant_type,
                 blocksize);
}

}  // namespace
}  // namespace q4jax

#define Q4JAX_EXPORT extern "C" __attribute__((visibility("default")))

Q4JAX_EXPORT XLA_FFI_Error* q4jax_linear(XLA_FFI_CallFrame*);
Q4JAX_EXPORT XLA_FFI_Error* q4jax_transposed(XLA_FFI_CallFrame*);
Q4JAX_EXPORT XLA_FFI_Error* q4jax_quantize(XLA_FFI_CallFrame*);
Q4JAX_EXPORT XLA_FFI_Error* q4jax_quantize_scales(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(q4jax_linear, q4jax::linear, q4jax::product_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(q4jax_transposed, q4jax::transposed, q4jax::product_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(q4jax_quantize, q4jax::quantize,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // w
                                  .Ret<ffi::AnyBuffer>()  // packed
                                  .Ret<ffi::AnyBuffer>()  // absmax
                                  .Attr<int64_t>("quant_type")
                                  .Attr<int64_t>("blocksize"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(q4jax_quantize_scales, q4jax::quantize_scales,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()    // absmax
                                  .Ret<ffi::AnyBuffer>()    // codes
                                  .Ret<ffi::AnyBuffer>()    // nested_absmax
                                  .Ret<ffi::AnyBuffer>());  // offset

// The version of XLA's interface that this was compiled for.
Q4JAX_EXPORT int q4jax_api_major() { return XLA_FFI_API_MAJOR; }
Q4JAX_EXPORT int q4jax_api_minor() { return XLA_FFI_API_MINOR; }

// Must be called once, with the size of the argument, before any operation.
Q4JAX_EXPORT bool q4jax_set_tables(const void* tables, size_t size) {
  if (size != sizeof q4jax::tables) return false;
  std::memcpy(&q4jax::tables, tables, size);
  return true;
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
      q4jax::selected = &isa;
      return true;
    }
  }
  return false;
}
