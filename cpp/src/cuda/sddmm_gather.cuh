// The gather kernel computes nonzeros one by one. A warp takes 32 of them, in whatever rows they
// lie. So all warps have equal work on any mask, without a row swizzle.
#pragma once

#include "cuda/dot.cuh"
#include "cuda/lines.h"
#include "cuda/ptx.h"

namespace rosa::cuda {

constexpr int kGatherWarps = 4;
// Lines of a row that a warp keeps in registers: 1024 tokens of a 16-bit type. With 32 lines (2048
// tokens), the registers had room for only half the warps.
constexpr int kGatherLines = 16;

// The nonzeros to gather. They are those of a CSR pattern, or they are listed by position. If a CSR
// pattern's operands are permuted, its indices go through the `position` arrays.
struct GatherEntries {
  int64_t count;
  const int32_t* crow;  // (rows + 1), or null if the nonzeros are listed
  int32_t rows;
  const int32_t* row;           // (count) listed row positions
  const int32_t* col;           // (count) columns, or listed column positions
  const int32_t* row_position;  // null if a is not permuted
  const int32_t* col_position;  // null if b is not permuted
};

struct GatherArgs {
  Lines a, b;
  GatherEntries entries;
  int64_t blocks;   // lines along an index
  float* partial;   // (gridDim.y, count): one slice per split of the tokens
  bool accumulate;  // add to the sums of an earlier chunk of tokens
};

// The row of CSR entry t, which is the last row that begins at t or before.
__device__ __forceinline__ int32_t row_of_entry(const int32_t* crow, int32_t rows, int64_t t) {
  int32_t low = 0, high = rows - 1;
  while (low < high) {
    const int32_t middle = low + (high - low + 1) / 2;
    if (crow[middle] <= t) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Eight lanes read one line, so kGatherLines / 4 reads of a warp cover a chunk. kFull: the chunk is
// whole. With a bounds test per load, ptxas issues the loads one by one, each before its own sums.
template <bool kFull>
__device__ __forceinline__ void load_chunk(uint4 (&to)[kGatherLines / 4], const Lines& lines,
                                           int32_t index, int64_t block, int64_t segments) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kGatherLines / 4; ++i) {
    const int64_t line = block + i * 4 + lane / kSegments;
    to[i] = make_uint4(0, 0, 0, 0);
    if (kFull || line * kSegments + lane % kSegments < segments)
      to[i] = *lines.segment(line, index, lane % kSegments);
  }
}

template <class T>
__device__ __forceinline__ float dot_chunk(const uint4 (&x)[kGatherLines / 4],
                                           const uint4 (&y)[kGatherLines / 4]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kGatherLines / 4; ++i) sum = dot_segment<T>(x[i], y[i], sum);
  return sum;
}

// Adds the products of lines [block, block + kGatherLines) to the sum of each lane's own nonzero.
template <class T, bool kFull>
__device__ __forceinline__ float gather_chunk(const Lines& a, const Lines& b, int32_t row,
                                              int32_t col, int count, int64_t block,
                                              int64_t segments, float sum) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = threadIdx.x % kWarp;
  uint4 in_row[kGatherLines / 4];
  int32_t loaded_row = -1;
  for (int first = 0; first < count; first += 4) {
    float s[4];
#pragma unroll
    for (int pair = 0; pair < 4; pair += 2) {  // two nonzeros: 8 independent loads per lane
      uint4 in_col[2][kGatherLines / 4];
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        // Past the last nonzero, reads the last one again. Its sum is not kept.
        const int32_t c = __shfl_sync(kAll, col, min(first + pair + u, count - 1));
        load_chunk<kFull>(in_col[u], b, c, block, segments);
      }
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int32_t r = __shfl_sync(kAll, row, min(first + pair + u, count - 1));
        if (r != loaded_row) load_chunk<kFull>(in_row, a, r, block, segments);
        loaded_row = r;
        s[pair + u] = dot_chunk<T>(in_row, in_col[u]);
      }
    }
    // Four sums over 32 lanes take six shuffles. In each step, half of the lanes give the other
    // half the values that it continues with.
    const bool upper = lane & 16, odd = lane & 8;
    float x = upper ? s[2] : s[0], y = upper ? s[3] : s[1];
    x += __shfl_xor_sync(kAll, upper ? s[0] : s[2], 16);
    y += __shfl_xor_sync(kAll, upper ? s[1] : s[3], 16);
    float total = odd ? y : x;
    total += __shfl_xor_sync(kAll, odd ? x : y, 8);
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2) total += __shfl_xor_sync(kAll, total, offset);
    const float mine = __shfl_sync(kAll, total, lane % 4 * 8);
    if (lane / 4 == first / 4) sum += mine;
  }
  return sum;
}

// Blocks: (groups of kGatherWarps * 32 nonzeros, splits of the tokens).
template <class T>
__global__ void __launch_bounds__(kGatherWarps* kWarp) sddmm_gather_kernel(GatherArgs args) {
  let_next_kernel_begin();
  wait_for_kernel_ahead();
  const GatherEntries& entries = args.entries;
  const int lane = threadIdx.x % kWarp;
  const int64_t first = (int64_t{blockIdx.x} * kGatherWarps + threadIdx.x / kWarp) * kWarp;
  if (first >= entries.count) return;  // whole warps leave; there is no block barrier
  const int count = static_cast<int>(min(int64_t{kWarp}, entries.count - first));
  const int64_t t = first + min(lane, count - 1);
  int32_t col = entries.col[t], row;
  if (entries.crow != nullptr) {
    row = row_of_entry(entries.crow, entries.rows, t);
    if (entries.row_position != nullptr) row = entries.row_position[row];
    if (entries.col_position != nullptr) col = entries.col_position[col];
  } else {
    row = entries.row[t];
  }

  const int64_t begin = args.blocks * blockIdx.y / gridDim.y;
  const int64_t end = args.blocks * (blockIdx.y + 1) / gridDim.y;
  const int64_t segments = min(min(args.a.segments, args.b.segments), end * kSegments);
  float sum = 0;
  int64_t block = begin;
  for (; (block + kGatherLines) * kSegments <= segments; block += kGatherLines)
    sum = gather_chunk<T, true>(args.a, args.b, row, col, count, block, segments, sum);
  if (block * kSegments < segments)
    sum = gather_chunk<T, false>(args.a, args.b, row, col, count, block, segments, sum);
  if (lane >= count) return;
  float* out = args.partial + blockIdx.y * entries.count + first + lane;
  *out = args.accumulate ? *out + sum : sum;
}

}  // namespace rosa::cuda
