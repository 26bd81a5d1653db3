// Products of one 16-byte segment with another, summed in float32.
#pragma once

#include "cuda/numeric.h"

namespace rosa::cuda {

template <class T>
__device__ __forceinline__ float dot_word(uint32_t x, uint32_t y, float sum) {
  if constexpr (sizeof(T) == 4) {
    return fmaf(__uint_as_float(x), __uint_as_float(y), sum);
  } else {
    const float2 a = unpack_pair<T>(x), b = unpack_pair<T>(y);
    return fmaf(a.y, b.y, fmaf(a.x, b.x, sum));
  }
}

template <class T>
__device__ __forceinline__ float dot_segment(const uint4& x, const uint4& y, float sum) {
  sum = dot_word<T>(x.x, y.x, sum);
  sum = dot_word<T>(x.y, y.y, sum);
  sum = dot_word<T>(x.z, y.z, sum);
  return dot_word<T>(x.w, y.w, sum);
}

}  // namespace rosa::cuda
