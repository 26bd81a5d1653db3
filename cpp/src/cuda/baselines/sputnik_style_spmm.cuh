// SpMM with one-dimensional tiles: a sub-warp computes one row of c, a few columns wide.
//
// The row's nonzeros pass through shared memory 32 at a time, by vector loads. If a row does not
// begin on a multiple of four, it is read from the multiple before. The entries of the previous row
// are then left out of the first tile (the paper's reverse-offset memory alignment).
#pragma once

#include "cuda/baselines/common.cuh"

namespace rosa::cuda::baselines {

constexpr int kSpmmItems = 32;     // nonzeros of a tile
constexpr int kSpmmAlignment = 4;  // of a tile's first nonzero

template <class T>
struct SpmmArgs {
  const int32_t *crow, *col, *row_swizzle;
  const T* values;
  int64_t rows;
  int64_t k;
  const T* b;
  T* c;
};

template <int kCount>
__device__ __forceinline__ void load_columns(const int32_t* from, int32_t (&to)[kCount]) {
  if constexpr (kCount == 4) {
    const int4 four = __ldg(reinterpret_cast<const int4*>(from));
    to[0] = four.x;
    to[1] = four.y;
    to[2] = four.z;
    to[3] = four.w;
  } else if constexpr (kCount == 2) {
    const int2 two = __ldg(reinterpret_cast<const int2*>(from));
    to[0] = two.x;
    to[1] = two.y;
  } else {
    static_assert(kCount == 1, "one, two or four columns a lane");
    to[0] = *from;
  }
}

template <class T, int kVector, int kLanes, int kLoads>
struct SpmmRow {
  const T* b;  // at this lane's first column
  int64_t k;
  bool inside[kLoads];  // which of the lane's vectors lie in the matrix
  const float* values;
  const int64_t* offsets;
  float sum[kLoads][kVector];

  __device__ __forceinline__ void add(int item) {
    const float value = values[item];
    const T* from = b + offsets[item];
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      if (!inside[l]) continue;
      float x[kVector];
      load_elements(from + l * kLanes * kVector, x);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum[l][i] = fmaf(value, x[i], sum[l][i]);
    }
  }
};

// Threads: (kLanes, rows of a block), one warp. A block along y covers kLanes * kVector * kLoads
// columns. k is a multiple of kVector.
template <class T, int kVector, int kLanes, int kLoads>
__global__ void __launch_bounds__(kWarp) sputnik_style_spmm_kernel(SpmmArgs<T> args) {
  constexpr int kRows = kWarp / kLanes;
  constexpr int kStaged = kSpmmItems / kLanes;  // nonzeros that a lane loads
  ROSA_SHARED(values_of_rows, float[kRows][kSpmmItems]);
  ROSA_SHARED(offsets_of_rows, int64_t[kRows][kSpmmItems]);

  const int64_t position = int64_t{blockIdx.x} * kRows + threadIdx.y;
  if (position >= args.rows) return;
  const int64_t row = args.row_swizzle[position];
  const int lane = threadIdx.x;
  const uint32_t mask = subwarp_mask(kLanes, threadIdx.y);
  float* values = values_of_rows[threadIdx.y];
  int64_t* offsets = offsets_of_rows[threadIdx.y];

  const int64_t column = int64_t{blockIdx.y} * (kLanes * kVector * kLoads) + lane * kVector;
  SpmmRow<T, kVector, kLanes, kLoads> tile = {args.b + column, args.k, {}, values, offsets, {}};
#pragma unroll
  for (int l = 0; l < kLoads; ++l) tile.inside[l] = column + l * kLanes * kVector < args.k;

  const int64_t end = args.crow[row + 1];
  int64_t t = args.crow[row];
  int before = static_cast<int>(t % kSpmmAlignment);  // nonzeros of the previous row in the tile
  if (t - before + kSpmmItems > end) before = 0;      // only a residue: element by element
  t -= before;
  const auto stage = [&] {
    __syncwarp(mask);  // the last tile has been used
    float value[kStaged];
    int32_t col[kStaged];
    load_elements(args.values + t + lane * kStaged, value);
    load_columns(args.col + t + lane * kStaged, col);
#pragma unroll
    for (int i = 0; i < kStaged; ++i) {
      values[lane * kStaged + i] = value[i];
      offsets[lane * kStaged + i] = col[i] * args.k;
    }
    __syncwarp(mask);
  };
  if (before > 0) {
    stage();
#pragma unroll
    for (int item = 0; item < kSpmmItems; ++item) {
      if (item >= before) tile.add(item);
    }
    t += kSpmmItems;
  }
#pragma unroll 1
  for (; t + kSpmmItems <= end; t += kSpmmItems) {
    stage();
#pragma unroll
    for (int item = 0; item < kSpmmItems; ++item) tile.add(item);
  }

  const int residue = static_cast<int>(end - t);
  __syncwarp(mask);
  for (int item = lane; item < residue; item += kLanes) {
    values[item] = to_float(args.values[t + item]);
    offsets[item] = args.col[t + item] * args.k;
  }
  __syncwarp(mask);
#pragma unroll 4
  for (int item = 0; item < residue; ++item) tile.add(item);

  T* c = args.c + row * args.k + column;
#pragma unroll
  for (int l = 0; l < kLoads; ++l) {
    if (tile.inside[l]) store_elements(c + l * kLanes * kVector, tile.sum[l]);
  }
}

}  // namespace rosa::cuda::baselines
