// Kernels that touch one element of a matrix per nonzero: csr_add_, csr_gather, csr_scatter_.
//
// The scattered sectors of `w`, 32 bytes per element, bound each kernel. So the kernels are
// parallel over entries, in whatever rows these lie, and read no array of row indices. A warp
// searches crow_indices for the rows of its first and last entry, 16 samples at a time (4096 rows
// take 3 steps). Each lane then searches between the two rows, which are 6 apart at 24 entries per
// row.
#pragma once

#include <type_traits>

#include "cuda/numeric.h"

namespace rosa::cuda {

constexpr int kEntryWarps = 8;
// Accesses to `w` that a lane has in flight.
constexpr int kEntriesPerLane = 4;
constexpr int kEntriesPerWarp = kEntriesPerLane * kWarp;
constexpr int kEntriesPerBlock = kEntriesPerWarp * kEntryWarps;

// Entries crow[0] to crow[rows] and the matrix they index. A slab of a pattern's rows has crow[0]
// != 0. Then `col` is the whole pattern's, and values begin at the slab's first entry.
struct EntryArgs {
  const int32_t *crow, *col;
  int64_t rows, count;
  void* w;
  int64_t row_stride, col_stride;
  void* values;
  int64_t value_stride;
};

// The entries of one lane: their numbers among the values, and their offsets in w. Lanes past the
// last entry have fewer.
struct LaneEntries {
  int64_t entry[kEntriesPerLane], offset[kEntriesPerLane];
  bool valid[kEntriesPerLane];
};

// The last row that begins at entry `first` or before, and the same for `last`, for all lanes of a
// warp. Half a warp searches for each, so that both cost one chain of dependent loads.
__device__ __forceinline__ int2 rows_of(const int32_t* crow, int64_t rows, int32_t base,
                                        int64_t first, int64_t last) {
  constexpr unsigned kAll = 0xffffffffu;
  constexpr int kSamples = kWarp / 2;
  const int half = threadIdx.x % kWarp / kSamples, sample = threadIdx.x % kSamples;
  const int64_t entry = half == 0 ? first : last;
  int64_t low = 0, high = rows - 1;
  while (__any_sync(kAll, low < high)) {
    const int64_t span = high - low;
    const auto row_of_sample = [&](int i) {
      return low + (span * (i + 1) + kSamples - 1) / kSamples;
    };
    const bool before = int64_t{crow[row_of_sample(sample)]} - base <= entry;
    const uint32_t both = __ballot_sync(kAll, before);
    const int count = __popc(half == 0 ? both & 0xffffu : both >> 16);
    const int64_t lowest = low;
    if (count > 0) low = row_of_sample(count - 1);
    if (count < kSamples) high = lowest + (span * (count + 1) + kSamples - 1) / kSamples - 1;
  }
  const int32_t row = static_cast<int32_t>(low);
  return make_int2(__shfl_sync(kAll, row, 0), __shfl_sync(kAll, row, kSamples));
}

// Finds the entries of a lane. Returns false, for whole warps, if there is nothing to do.
__device__ __forceinline__ bool entries_of_lane(const EntryArgs& args, LaneEntries& own) {
  const int lane = threadIdx.x % kWarp;
  const int64_t first =
      int64_t{blockIdx.x} * kEntriesPerBlock + threadIdx.x / kWarp * kEntriesPerWarp;
  if (first >= args.count) return false;
  const int64_t last = min(first + kEntriesPerWarp, args.count) - 1;
  const int32_t base = args.crow[0];

  int32_t col[kEntriesPerLane];
#pragma unroll
  for (int u = 0; u < kEntriesPerLane; ++u) {
    own.entry[u] = first + u * kWarp + lane;
    own.valid[u] = own.entry[u] <= last;
    col[u] = own.valid[u] ? args.col[base + own.entry[u]] : 0;
  }
  const int2 between = rows_of(args.crow, args.rows, base, first, last);
  int32_t low[kEntriesPerLane], high[kEntriesPerLane];
#pragma unroll
  for (int u = 0; u < kEntriesPerLane; ++u) {
    low[u] = between.x;
    high[u] = between.y;
  }
  for (int32_t span = between.y - between.x; span > 0; span /= 2) {
#pragma unroll
    for (int u = 0; u < kEntriesPerLane; ++u) {
      const int32_t middle = low[u] + (high[u] - low[u] + 1) / 2;
      if (int64_t{args.crow[middle]} - base <= own.entry[u]) {
        low[u] = middle;
      } else {
        high[u] = middle - 1;
      }
    }
  }
#pragma unroll
  for (int u = 0; u < kEntriesPerLane; ++u)
    own.offset[u] = low[u] * args.row_stride + col[u] * args.col_stride;
  return true;
}

// w + alpha * value in double, rounded to float32 and then to T, as on the CPU.
template <class T, class V>
__global__ void __launch_bounds__(kEntryWarps* kWarp) csr_add_kernel(EntryArgs args, double alpha) {
  LaneEntries own;
  if (!entries_of_lane(args, own)) return;
  T* w = static_cast<T*>(args.w);
  const V* values = static_cast<const V*>(args.values);
  T before[kEntriesPerLane];
  V value[kEntriesPerLane];
#pragma unroll
  for (int u = 0; u < kEntriesPerLane; ++u) {
    if (!own.valid[u]) continue;
    before[u] = w[own.offset[u]];
    value[u] = values[own.entry[u] * args.value_stride];
  }
#pragma unroll
  for (int u = 0; u < kEntriesPerLane; ++u) {
    if (!own.valid[u]) continue;
    const double product = alpha * static_cast<double>(to_float(value[u]));
    const double sum = static_cast<double>(to_float(before[u])) + product;
    w[own.offset[u]] = from_float<T>(static_cast<float>(sum));
  }
}

// Word is any type of the elements' size.
template <class Word>
__global__ void __launch_bounds__(kEntryWarps* kWarp) csr_gather_kernel(EntryArgs args) {
  LaneEntries own;
  if (!entries_of_lane(args, own)) return;
  const Word* w = static_cast<const Word*>(args.w);
  Word* out = static_cast<Word*>(args.values);
  Word element[kEntriesPerLane];
#pragma unroll
  for (int u = 0; u < kEntriesPerLane; ++u)
    if (own.valid[u]) element[u] = w[own.offset[u]];
#pragma unroll
  for (int u = 0; u < kEntriesPerLane; ++u)
    if (own.valid[u]) out[own.entry[u] * args.value_stride] = element[u];
}

// T and V are equal words of the elements' size, which are copied so that NaN payloads survive. Or
// V is float32 beside a 16-bit T.
template <class T, class V>
__global__ void __launch_bounds__(kEntryWarps* kWarp) csr_scatter_kernel(EntryArgs args) {
  LaneEntries own;
  if (!entries_of_lane(args, own)) return;
  T* w = static_cast<T*>(args.w);
  const V* values = static_cast<const V*>(args.values);
  V value[kEntriesPerLane];
#pragma unroll
  for (int u = 0; u < kEntriesPerLane; ++u)
    if (own.valid[u]) value[u] = values[own.entry[u] * args.value_stride];
#pragma unroll
  for (int u = 0; u < kEntriesPerLane; ++u) {
    if (!own.valid[u]) continue;
    if constexpr (std::is_same_v<T, V>) {
      w[own.offset[u]] = value[u];
    } else {
      w[own.offset[u]] = from_float<T>(value[u]);
    }
  }
}

}  // namespace rosa::cuda
