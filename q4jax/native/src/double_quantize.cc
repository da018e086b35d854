#include "double_quantize.h"

#include "decode.h"
#include "parallel.h"
#include "scratch.h"

namespace q4jax {
namespace {

constexpr float kLargestReciprocal = 0x1p126f;

// The sum by halving, which fixes the order of the additions.
float sum(const float* values, int64_t size) {
  if (size == 0) return 0;
  const Scratch scratch(size_t(size + 2) * 4);
  float* const to = scratch.floats();
  const float* from = values;
  do {
    const int64_t half = (size + 1) / 2;
    // The last of an odd number is added to 0.
    for (int64_t i = 0; i < size / 2; ++i) to[i] = from[i] + from[half + i];
    if (size % 2) to[half - 1] = from[half - 1] + 0.0f;
    from = to;
    size = half;
  } while (size > 1);
  return to[0];
}

// How many thresholds are below the value; all of them for NaN.
uint8_t interval(float value, const float* thresholds) {
  int at = 0;
  for (int step = 128; step; step /= 2) at += !(value <= thresholds[at + step - 1]) ? step : 0;
  return uint8_t(at);
}

void block(const ScaleQuantization& q, float offset, int64_t b) {
  const int64_t begin = b * kNestedBlocksize, count = min64(kNestedBlocksize, q.size - begin);
  float centred[kNestedBlocksize];
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    centred[i] = q.absmax[begin + i] - offset;
    const uint32_t bits = bits_of(centred[i]) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  const float largest = float_of(most);
  q.nested_absmax[b] = largest;
  const bool divide = largest > kLargestReciprocal || count < kNestedBlocksize;
  const float factor = 1 / largest;
  for (int64_t i = 0; i < count; ++i) {
    const float scaled = divide ? centred[i] / largest : centred[i] * factor;
    q.codes[begin + i] = largest == 0 ? 0 : interval(scaled, q.thresholds);
  }
}

}  // namespace

void double_quantize(const ScaleQuantization& q, Pool& pool) {
  parallel(pool, 1, [&](int64_t) {
    const float total = sum(q.absmax, q.size);
    *q.offset = total / (total != total ? 1.0f : float(q.size));
  });
  const int64_t blocks = ceil_div(q.size, kNestedBlocksize), step = 64;
  parallel(pool, ceil_div(blocks, step), [&](int64_t task) {
    for (int64_t b = task * step; b < min64(blocks, (task + 1) * step); ++b) {
      block(q, *q.offset, b);
    }
  });
}

}  // namespace q4jax
