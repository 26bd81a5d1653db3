// The storage types on the device, and their conversions to and from float32.
#pragma once

#include <type_traits>

#include "cuda/platform.h"

#if defined(ROSA_SIMT)
#include "cpu/floats.h"
#endif

namespace rosa::cuda {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

using Vec16 = uint4;  // the widest load of a thread

// Elements in 16 bytes.
template <class T>
constexpr int kPerVec16 = 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Bf16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(Half x) {
#if defined(ROSA_SIMT)
  return cpu::widen(cpu::Float16{x.bits});
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
  return f;
#endif
}

// Rounds to nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ Bf16 from_float<Bf16>(float x) {
#if defined(ROSA_SIMT)
  return {cpu::Narrow<cpu::BFloat16>::from(x).bits};
#else
  Bf16 rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
  return rounded;
#endif
}
template <>
__device__ __forceinline__ Half from_float<Half>(float x) {
#if defined(ROSA_SIMT)
  return {cpu::Narrow<cpu::Float16>::from(x).bits};
#else
  Half rounded;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
  return rounded;
#endif
}

// Two 16-bit elements in one register, the first in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float first, float second) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, Half>, "16-bit elements");
#if defined(ROSA_SIMT)
  return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
#else
  uint32_t pair;  // one instruction; ptxas does not merge two into it
  if constexpr (std::is_same_v<T, Bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  }
  return pair;
#endif
}
template <class T>
__device__ __forceinline__ float2 unpack_pair(uint32_t pair) {
  static_assert(sizeof(T) == 2, "a register holds two 16-bit elements");
  return make_float2(to_float(T{static_cast<uint16_t>(pair)}),
                     to_float(T{static_cast<uint16_t>(pair >> 16)}));
}

// Converts sixteen bytes to elements and back.
template <class T>
__device__ __forceinline__ void unpack_vec16(const Vec16& vector, float (&elements)[kPerVec16<T>]) {
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      elements[i] = __uint_as_float(words[i]);
    } else {
      const float2 pair = unpack_pair<T>(words[i]);
      elements[2 * i] = pair.x;
      elements[2 * i + 1] = pair.y;
    }
  }
}
template <class T>
__device__ __forceinline__ Vec16 pack_vec16(const float (&elements)[kPerVec16<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      words[i] = __float_as_uint(elements[i]);
    } else {
      words[i] = pack_pair<T>(elements[2 * i], elements[2 * i + 1]);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace rosa::cuda
