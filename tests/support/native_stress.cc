// Every kernel on ragged shapes, from several callers that share a pool: for the sanitizers.
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "isa_dispatch.h"
#include "double_quantize.h"

extern "C" bool q4jax_set_scale_table(const void*, size_t);
extern "C" int64_t q4jax_add_code_table(const void*, size_t);
extern "C" bool q4jax_select(const char*);
extern "C" const char* q4jax_isa(int);

namespace {

using q4jax::Dtype;

class Threads final : public q4jax::Pool {
 public:
  explicit Threads(int count) {
    for (int i = 0; i < count; ++i) workers_.emplace_back([this] { work(); });
  }
  ~Threads() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }
  int64_t threads() const override { return int64_t(workers_.size()); }
  void schedule(void (*function)(void*), void* data) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      queue_.push_back({function, data});
    }
    changed_.notify_one();
  }

 private:
  struct Item {
    void (*function)(void*);
    void* data;
  };

  void work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
      if (queue_.empty()) return;
      const Item item = queue_.front();
      queue_.pop_front();
      lock.unlock();
      item.function(item.data);
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Item> queue_;
  bool stopping_ = false;
  std::vector<std::thread> workers_;
};

// Arrays of exactly the bytes they need, so that one read too many is found.
struct Bytes {
  explicit Bytes(size_t size) : data(static_cast<uint8_t*>(std::malloc(size))) {
    for (size_t i = 0; i < size; ++i) data[i] = uint8_t(i * 37 % 63);
  }
  ~Bytes() { std::free(data); }
  Bytes(const Bytes&) = delete;
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
  uint8_t* data;
};

void one(Threads& pool, int64_t n, int64_t k, int64_t blocksize, int64_t m, Dtype dtype) {
  const int64_t size = q4jax::size_of(dtype), blocks = n * k / blocksize;
  const q4jax::CodeTable &nf4 = *q4jax::code_table(0), &fp4 = *q4jax::code_table(1);
  const q4jax::ScaleTable& scales = q4jax::scale_table();
  const q4jax::Kernels& kernels = q4jax::chosen_kernels();
  Bytes w(n * k * size), packed(n * k / 2), absmax(blocks * 4), codes(blocks), offset(4);
  Bytes nested((blocks + 255) / 256 * 4), x(m * k * size), y(m * n * size), bias(n * size);
  kernels.quantize({dtype, w.data, n * k, blocksize, nf4.thresholds, nf4.sorted_codes,
                    packed.data, absmax.as<float>()},
                   pool);
  q4jax::double_quantize({absmax.as<float>(), blocks, scales.dynamic_thresholds, codes.data,
                          nested.as<float>(), offset.as<float>()},
                         pool);
  for (const float* plain : {absmax.as<float>(), static_cast<float*>(nullptr)}) {
    const q4jax::Weight weight = {
        packed.data,
        {plain, codes.data, nested.as<float>(), *offset.as<float>(), scales.dynamic_map},
        nf4.code, n, k, blocksize};
    kernels.linear({weight, dtype, dtype, x.data, plain ? bias.data : nullptr, y.data, m}, pool);
    kernels.transposed({weight, dtype, dtype, y.data, nullptr, x.data, m}, pool);
    kernels.dequantize({weight, dtype, w.data}, pool);
  }
  // A partial last block, and an odd number of elements.
  const int64_t odd = n * k - blocksize / 2 - 1;
  Bytes part(odd * size), half((odd + 1) / 2);
  kernels.quantize({dtype, part.data, odd, blocksize, fp4.thresholds, fp4.sorted_codes,
                    half.data, absmax.as<float>()},
                   pool);
}

}  // namespace

int main(int, char** arguments) {
  q4jax::CodeTable codes[2];
  q4jax::ScaleTable scales;
  std::FILE* file = std::fopen(arguments[1], "rb");
  if (!file || std::fread(codes, sizeof codes, 1, file) != 1) return 2;
  if (std::fread(&scales, sizeof scales, 1, file) != 1) return 2;
  std::fclose(file);
  for (const q4jax::CodeTable& table : codes) {
    if (q4jax_add_code_table(&table, sizeof table) < 0) return 2;
  }
  if (!q4jax_set_scale_table(&scales, sizeof scales)) return 2;
  Threads pool(3);
  for (int i = 0; const char* isa = q4jax_isa(i); ++i) {
    q4jax_select(isa);
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller) {
      callers.emplace_back([&pool, caller] {
        const Dtype dtype = Dtype(caller % 3);
        for (const int64_t m : {1, 3, 8, 13, 35}) {
          one(pool, 50 + caller, 96, 32, m, dtype);
          one(pool, 131, 640, 64, m, dtype);
          one(pool, 7, 4096, 4096, m, dtype);
        }
      });
    }
    for (std::thread& caller : callers) caller.join();
    std::printf("%s\n", isa);
  }
}
