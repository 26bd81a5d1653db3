// Stream-K divides the work of all tiles into equal contiguous ranges, one per block of the grid.
//
// A unit is one tile times one line block of tokens. Real masks have 10-80 heavy tiles and an H200
// has 132 multiprocessors, so one tile per block would leave half of them idle. If a tile is cut,
// each block that works on it has one slice of partial sums. Slices are numbered in token order.
// Every (tile, slice) has one writer, and the slices are added in order. So the result depends only
// on plan, chunk and grid.
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
  // The maximum number of blocks that work on any run of `length` units.
  int64_t most_owners(int64_t length) const {
    const int64_t fewest = units / blocks;
    return (length - 1 + fewest - 1) / fewest + 1;
  }
};

}  // namespace rosa::cuda
