// Stream-K: the work of all tiles in equal contiguous ranges, one per block of the grid.
//
// A unit is one tile times one line block of tokens. Real masks have 10-80 heavy tiles and an H200
// 132 multiprocessors: one tile per block would leave half of them idle. A tile that is cut gets
// one slice of partial sums per block that worked on it, numbered in token order; every (tile,
// slice) has one writer and the slices are added in order, so the result is a function of plan,
// chunk and grid alone.
#pragma once

#include "cuda/platform.h"

namespace rosa::cuda {

struct StreamK {
  int64_t units, blocks;  // blocks <= units

  __host__ __device__ __forceinline__ int64_t first_unit(int64_t block) const {
    return units * block / blocks;
  }
  // The block that works on a unit.
  __host__ __device__ __forceinline__ int64_t owner(int64_t unit) const {
    return ((unit + 1) * blocks - 1) / units;
  }
  // No run of `length` units is worked on by more blocks than this.
  int64_t most_owners(int64_t length) const {
    const int64_t fewest = units / blocks;
    return (length - 1 + fewest - 1) / fewest + 1;
  }
};

}  // namespace rosa::cuda
