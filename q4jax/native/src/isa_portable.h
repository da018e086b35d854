// What the kernels need of an instruction set, in plain C++: slow, and what the others are held to.
#pragma once

#include "half_float.h"

namespace q4jax {
namespace {

struct Portable {
  struct V {
    float lane[8];
  };
  struct Bytes {
    uint8_t byte[32];
  };
  static constexpr int kLanes = 8;
  static constexpr int kChunk = 64;
  static constexpr int kRows = 4;

  static Bytes load_bytes(const uint8_t* p) {
    Bytes bytes;
    std::memcpy(bytes.byte, p, 32);
    return bytes;
  }
  static void prefetch(const void*) {}
  static V set1(float value) {
    V v;
    for (float& lane : v.lane) lane = value;
    return v;
  }
  static V zero() { return set1(0); }
  static V load(const float* p) {
    V v;
    std::memcpy(v.lane, p, sizeof v.lane);
    return v;
  }
  static void store(float* p, V v) { std::memcpy(p, v.lane, sizeof v.lane); }
  static V add(V a, V b) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static V fma(V a, V b, V c) {
    for (int i = 0; i < kLanes; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }
  static float sum(V v) {
    float total = 0;
    for (float lane : v.lane) total += lane;
    return total;
  }
  static constexpr int element(int position) { return position % 32 * 2 + position / 32; }

  template <Dtype D>
  static V widen(const void* data, int64_t i) {
    V v;
    for (int j = 0; j < kLanes; ++j) v.lane[j] = read(D, data, i + j);
    return v;
  }

  template <Dtype D>
  static void narrow(V v, void* data, int64_t i) {
    for (int j = 0; j < kLanes; ++j) write(D, data, i + j, v.lane[j]);
  }

  template <Dtype D>
  class Decoder {
   public:
    explicit Decoder(const float* code) : code_(code) {}

    void scale(float scale) { scale_[0] = scale_[1] = scale; }
    void scale(const float* scales, int64_t) {
      scale_[0] = scales[0];
      scale_[1] = scales[1];
    }

    template <int Half>
    void decode(const Bytes& bytes, V out[4]) const {
      for (int i = 0; i < 32; ++i) {
        const int code = Half ? bytes.byte[i] & 15 : bytes.byte[i] >> 4;
        float w = code_[code] * scale_[i / 16];
        if (D != Dtype::kFloat32) {
          uint16_t rounded;
          write(D, &rounded, 0, w);
          w = read(D, &rounded, 0);
        }
        out[i / kLanes].lane[i % kLanes] = w;
      }
    }

   private:
    const float* code_;
    float scale_[2];
  };

  class Encoder {
   public:
    Encoder(const float* thresholds, const uint8_t* codes) : threshold_(thresholds), code_(codes) {}

    // Largest magnitude of `count` elements as float32 bits, which order as integers, NaN last.
    template <Dtype D>
    static uint32_t absmax(const void* data, int64_t begin, int64_t count) {
      uint32_t most = 0;
      for (int64_t i = begin; i < begin + count; ++i) {
        const uint32_t bits = bits_of(read(D, data, i)) & 0x7fffffff;
        most = bits > most ? bits : most;
      }
      return most;
    }

    // 32 elements, each times `factor`, or divided by it, to 16 bytes.
    template <Dtype D, bool Divide>
    void encode(const void* data, int64_t begin, float factor, uint8_t* out) const {
      for (int i = 0; i < 16; ++i) {
        const float even = read(D, data, begin + 2 * i), odd = read(D, data, begin + 2 * i + 1);
        out[i] = uint8_t(code(Divide ? even / factor : even * factor) << 4 |
                         code(Divide ? odd / factor : odd * factor));
      }
    }

    // NaN is above every threshold.
    uint8_t code(float scaled) const {
      int interval = 0;
      for (int i = 0; i < 15; ++i) interval += !(scaled <= threshold_[i]);
      return code_[interval];
    }

   private:
    const float* threshold_;
    const uint8_t* code_;
  };
};

}  // namespace
}  // namespace q4jax
