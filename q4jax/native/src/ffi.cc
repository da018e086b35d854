// The operations as XLA custom calls. Every shape and dtype is checked here, before any kernel
// touches memory: an XLA program may come from a file.
#include <algorithm>
#include <new>
#include <string>

#include "isa_dispatch.h"
#include "double_quantize.h"
#include "kernel_args.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace q4jax {
namespace {

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

template <typename F>
ffi::Error guarded(const F& f) {
  try {
    f();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "q4jax: out of memory");
  }
  return ffi::Error::Success();
}

// The weight that four operands describe; `why` says what is wrong with them, if anything.
Weight weight_of(ffi::AnyBuffer packed, ffi::AnyBuffer absmax, ffi::AnyBuffer nested_absmax,
                 ffi::AnyBuffer offset, int64_t quant_type, int64_t blocksize, const char*& why) {
  why = nullptr;
  const auto refuse = [&](const char* reason) {
    why = reason;
    return Weight{};
  };
  const CodeTable* table = code_table(quant_type);
  if (!table) return refuse("no such quant_type");
  if (!allowed_blocksize(blocksize)) return refuse("invalid blocksize");
  if (packed.element_type() != ffi::DataType::U8) return refuse("packed must be uint8");
  if (packed.dimensions().size() != 2) return refuse("packed must have two axes");
  const int64_t n = packed.dimensions()[0], k = packed.dimensions()[1] * 2;
  if (n <= 0 || k <= 0 || k % blocksize) return refuse("rows must be whole blocks");
  if (!has_shape(absmax, {n, k / blocksize})) return refuse("absmax does not fit packed");
  const bool nested = absmax.element_type() == ffi::DataType::U8;
  if (!nested && absmax.element_type() != ffi::DataType::F32) {
    return refuse("absmax must be float32, or uint8 codes");
  }
  if (nested_absmax.element_type() != ffi::DataType::F32 ||
      !has_shape(nested_absmax, {nested ? ceil_div(n * (k / blocksize), 256) : 0})) {
    return refuse("nested_absmax does not fit absmax");
  }
  if (offset.element_type() != ffi::DataType::F32 || !has_shape(offset, {})) {
    return refuse("offset must be a float32 scalar");
  }
  return {static_cast<const uint8_t*>(packed.untyped_data()),
          {nested ? nullptr : static_cast<const float*>(absmax.untyped_data()),
           static_cast<const uint8_t*>(absmax.untyped_data()),
           static_cast<const float*>(nested_absmax.untyped_data()),
           *static_cast<const float*>(offset.untyped_data()), scale_table().dynamic_map},
          table->code,
          n,
          k,
          blocksize};
}

// linear: x [m, k] -> y [m, n]. transposed: x [m, n] -> y [m, k], and no bias.
ffi::Error product(bool transposed, ffi::ThreadPool threads, ffi::AnyBuffer x,
                   ffi::AnyBuffer packed, ffi::AnyBuffer absmax, ffi::AnyBuffer nested_absmax,
                   ffi::AnyBuffer offset, ffi::AnyBuffer bias, ffi::Result<ffi::AnyBuffer> y,
                   int64_t quant_type, int64_t blocksize) {
  Product p;
  const char* why;
  p.weight = weight_of(packed, absmax, nested_absmax, offset, quant_type, blocksize, why);
  if (why) return invalid(why);
  Dtype y_dtype;
  if (!dtype_of(x, p.dtype) || !dtype_of(*y, y_dtype) || y_dtype != p.dtype) {
    return invalid("x and the result must be of one float dtype of 16 or 32 bits");
  }
  if (x.dimensions().size() != 2) return invalid("x must have two axes");
  const int64_t m = x.dimensions()[0], n = p.weight.n, k = p.weight.k;
  if (!has_shape(x, {m, transposed ? n : k})) return invalid("x does not fit packed");
  if (!has_shape(*y, {m, transposed ? k : n})) return invalid("the result does not fit packed");
  const bool has_bias = !has_shape(bias, {0});
  if (has_bias && (transposed || !has_shape(bias, {n}))) return invalid("bias does not fit packed");
  if (!dtype_of(bias, p.bias_dtype)) return invalid("bias must be float");
  p.x = x.untyped_data();
  p.y = y->untyped_data();
  p.bias = has_bias ? bias.untyped_data() : nullptr;
  p.m = m;
  if (m == 0) return ffi::Error::Success();
  FfiPool pool(threads);
  const Kernels& kernels = chosen_kernels();
  return guarded([&] { (transposed ? kernels.transposed : kernels.linear)(p, pool); });
}

ffi::Error dequantize(ffi::ThreadPool threads, ffi::AnyBuffer packed, ffi::AnyBuffer absmax,
                      ffi::AnyBuffer nested_absmax, ffi::AnyBuffer offset,
                      ffi::Result<ffi::AnyBuffer> w, int64_t quant_type, int64_t blocksize) {
  Dequantization d;
  const char* why;
  d.weight = weight_of(packed, absmax, nested_absmax, offset, quant_type, blocksize, why);
  if (why) return invalid(why);
  if (!dtype_of(*w, d.dtype) || !has_shape(*w, {d.weight.n, d.weight.k})) {
    return invalid("the result does not fit packed");
  }
  d.w = w->untyped_data();
  FfiPool pool(threads);
  return guarded([&] { chosen_kernels().dequantize(d, pool); });
}

ffi::Error quantize(ffi::ThreadPool threads, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> packed,
                    ffi::Result<ffi::AnyBuffer> absmax, int64_t quant_type, int64_t blocksize) {
  const CodeTable* table = code_table(quant_type);
  if (!table) return invalid("no such quant_type");
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
  q.thresholds = table->thresholds;
  q.sorted_codes = table->sorted_codes;
  q.packed = static_cast<uint8_t*>(packed->untyped_data());
  q.absmax = static_cast<float*>(absmax->untyped_data());
  FfiPool pool(threads);
  return guarded([&] { chosen_kernels().quantize(q, pool); });
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
                               scale_table().dynamic_thresholds,
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

Q4JAX_EXPORT XLA_FFI_Error* q4jax_linear(XLA_FFI_CallFrame*);
Q4JAX_EXPORT XLA_FFI_Error* q4jax_transposed(XLA_FFI_CallFrame*);
Q4JAX_EXPORT XLA_FFI_Error* q4jax_dequantize(XLA_FFI_CallFrame*);
Q4JAX_EXPORT XLA_FFI_Error* q4jax_quantize(XLA_FFI_CallFrame*);
Q4JAX_EXPORT XLA_FFI_Error* q4jax_quantize_scales(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(q4jax_linear, q4jax::linear, q4jax::product_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(q4jax_transposed, q4jax::transposed, q4jax::product_binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(q4jax_dequantize, q4jax::dequantize,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // packed
                                  .Arg<ffi::AnyBuffer>()  // absmax
                                  .Arg<ffi::AnyBuffer>()  // nested_absmax
                                  .Arg<ffi::AnyBuffer>()  // offset
                                  .Ret<ffi::AnyBuffer>()  // w
                                  .Attr<int64_t>("quant_type")
                                  .Attr<int64_t>("blocksize"));
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
