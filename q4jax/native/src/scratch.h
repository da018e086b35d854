// Temporary memory that is kept for the next call: fresh pages cost more than what they hold.
#pragma once

#include <cstddef>

namespace q4jax {

// `bytes` of memory, aligned to 64, for its lifetime; throws std::bad_alloc.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* floats() const { return static_cast<float*>(data_); }

 private:
  void* data_;
  size_t size_;
};

}  // namespace q4jax
