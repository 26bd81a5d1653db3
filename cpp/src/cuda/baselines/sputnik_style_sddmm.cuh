// SDDMM with one-dimensional tiles: a sub-warp takes 32 nonzeros of one row.
//
// The lanes of a sub-warp divide the reduction between them. Each lane has a sum for every one of
// the 32 nonzeros. Row i of a is read once for all of them. The rows of b have no reuse at all.
#pragma once

#include "cuda/baselines/common.cuh"

namespace rosa::cuda::baselines {

constexpr int kSddmmItems = 32;  // nonzeros of a block along x

template <class T>
struct SddmmArgs {
  const int32_t *crow, *col, *row_swizzle;
  int64_t rows;  // rows of the swizzle that the grid covers
  int64_t k;
  const T *a, *b;
  T* out;
};

// Each lane begins with a part of every sum and ends with kItems / kLanes whole sums, those of
// items lane * kItems / kLanes and on. In every step two lanes exchange the halves that the other
// one keeps. 32 sums of 8 lanes take 28 shuffles. Reducing them one by one would take 96.
template <int kItems, int kLanes>
__device__ __forceinline__ void reduce_transposed(float (&sum)[kItems], int lane, uint32_t mask) {
  int half = kItems / 2;
#pragma unroll
  for (int step = kLanes / 2; step >= 1; step /= 2, half /= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < kItems / 2; ++i) {
      if (i >= half) continue;
      const float given = upper ? sum[i] : sum[i + half];
      const float kept = upper ? sum[i + half] : sum[i];
      sum[i] = kept + __shfl_xor_sync(mask, given, step);
    }
  }
}

// Threads: (kLanes, rows of a block), one warp. A load has kVector elements. k is a multiple of
// kVector, and of kVector * kLanes unless kResidue.
template <class T, int kVector, int kLanes, bool kResidue>
__global__ void __launch_bounds__(kWarp) sputnik_style_sddmm_kernel(SddmmArgs<T> args) {
  constexpr int kRows = kWarp / kLanes;
  constexpr int kTile = kVector * kLanes;
  constexpr int kStores = kSddmmItems / kLanes;
  ROSA_SHARED(offsets_of_rows, int64_t[kRows][kSddmmItems]);

  const int64_t position = int64_t{blockIdx.x} * kRows + threadIdx.y;
  if (position >= args.rows) return;
  const int32_t row = args.row_swizzle[position];
  const int64_t first = args.crow[row] + int64_t{blockIdx.y} * kSddmmItems;
  const int count = static_cast<int>(min(args.crow[row + 1] - first, int64_t{kSddmmItems}));
  if (count <= 0) return;

  // Where the rows of b begin. Items past the last nonzero repeat it. Their sums are not kept.
  const int lane = threadIdx.x;
  const uint32_t mask = subwarp_mask(kLanes, threadIdx.y);
  int64_t* offsets = offsets_of_rows[threadIdx.y];
#pragma unroll
  for (int i = 0; i < kStores; ++i) {
    const int item = lane + i * kLanes;
    offsets[item] = int64_t{args.col[first + min(item, count - 1)]} * args.k;
  }
  __syncwarp(mask);

  float sum[kSddmmItems] = {};
  const T* a = args.a + row * args.k + lane * kVector;
  const T* b = args.b + lane * kVector;
  const auto multiply = [&] {
    float x[kVector];
    load_elements(a, x);
#pragma unroll
    for (int item = 0; item < kSddmmItems; ++item) {
      float y[kVector];
      load_elements(b + offsets[item], y);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum[item] = fmaf(x[i], y[i], sum[item]);
    }
  };
  int64_t left = args.k;
#pragma unroll 1
  for (; left >= kTile; left -= kTile, a += kTile, b += kTile) multiply();
  if (kResidue && lane * kVector < left) multiply();

  reduce_transposed<kSddmmItems, kLanes>(sum, lane, mask);
#pragma unroll
  for (int i = 0; i < kStores; ++i) {
    const int item = lane * kStores + i;
    if (item < count) args.out[first + item] = from_float<T>(sum[i]);
  }
}

}  // namespace rosa::cuda::baselines
