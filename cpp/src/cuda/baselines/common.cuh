// Helpers of both Sputnik-style kernels: loads and stores of a few elements, sub-warps, checks.
#pragma once

#include "cuda/numeric.h"
#include "rosa/check.h"
#include "rosa/views.h"

namespace rosa::cuda::baselines {

// The lanes of one sub-warp. Each row has a sub-warp, which leaves the kernel and synchronises
// independently of the others.
__device__ __forceinline__ uint32_t subwarp_mask(int lanes, int index) {
  return lanes == kWarp ? 0xffffffffu : ((1u << lanes) - 1) << (lanes * index);
}

// Loads kCount consecutive elements with one instruction.
template <class T, int kCount>
__device__ __forceinline__ void load_elements(const T* from, float (&to)[kCount]) {
  constexpr int kBytes = kCount * static_cast<int>(sizeof(T));
  if constexpr (kCount == 1) {
    to[0] = to_float(*from);
  } else if constexpr (kBytes == 16) {
    unpack_vec16<T>(__ldg(reinterpret_cast<const uint4*>(from)), to);
  } else if constexpr (sizeof(T) == 4) {
    static_assert(kBytes == 8, "two float32");
    const float2 pair = __ldg(reinterpret_cast<const float2*>(from));
    to[0] = pair.x;
    to[1] = pair.y;
  } else if constexpr (kBytes == 8) {
    const uint2 words = __ldg(reinterpret_cast<const uint2*>(from));
    const float2 first = unpack_pair<T>(words.x), second = unpack_pair<T>(words.y);
    to[0] = first.x;
    to[1] = first.y;
    to[2] = second.x;
    to[3] = second.y;
  } else {
    static_assert(kBytes == 4, "two 16-bit elements");
    const float2 pair = unpack_pair<T>(__ldg(reinterpret_cast<const unsigned*>(from)));
    to[0] = pair.x;
    to[1] = pair.y;
  }
}

// Rounds kCount elements and stores them with one instruction.
template <class T, int kCount>
__device__ __forceinline__ void store_elements(T* to, const float (&from)[kCount]) {
  constexpr int kBytes = kCount * static_cast<int>(sizeof(T));
  if constexpr (kCount == 1) {
    *to = from_float<T>(from[0]);
  } else if constexpr (kBytes == 16) {
    *reinterpret_cast<uint4*>(to) = pack_vec16<T>(from);
  } else if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float2*>(to) = make_float2(from[0], from[1]);
  } else if constexpr (kBytes == 8) {
    *reinterpret_cast<uint2*>(to) =
        make_uint2(pack_pair<T>(from[0], from[1]), pack_pair<T>(from[2], from[3]));
  } else {
    *reinterpret_cast<unsigned*>(to) = pack_pair<T>(from[0], from[1]);
  }
}

inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Checks that an operand is row-major and contiguous, as the published kernels expect.
inline void check_rows(const MatrixView& x, int64_t rows) {
  check(x.rows == rows, "expected operands of the pattern's shape");
  check(x.rows <= 1 || x.cols == 0 || x.row_stride == x.cols,
        "expected row-major contiguous operands");
  check(x.cols <= 1 || x.col_stride == 1, "expected row-major contiguous operands");
  check(aligned(x.data), "expected operands aligned to 16 bytes");
}

// The number of blocks along y that cover `count`. Throws if a grid cannot have that many.
inline unsigned grid_y(int64_t count, int64_t per_block) {
  const int64_t blocks = (count + per_block - 1) / per_block;
  check(blocks <= 65535, "expected a grid of at most 65535 blocks along y");
  return static_cast<unsigned>(blocks);
}

}  // namespace rosa::cuda::baselines
