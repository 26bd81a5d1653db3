// SpMM with a few tokens of all of b in shared memory. It needs one launch, no plan and no scratch.
//
// The tokens of a column form a slot of at most 16 bytes. An entry costs one load of a slot and the
// products with all its tokens. That is about twice as fast as gathering 128-byte lines from L2. At
// 1 to 64 tokens it also saves the launch of a pack, 2.5 us, which is more than everything else
// takes. These are estimates: see docs/cuda-kernels.md, "SpMM from slots in shared memory".
#pragma once

#include "cuda/lines.h"
#include "cuda/numeric.h"
#include "cuda/spmm_rows.cuh"

namespace rosa::cuda {

constexpr int kStagedMostThreads = 1024;
// Rows of a chunk. Results are stored after each chunk.
constexpr int kStagedRows = 512;
// Rows of at most this many entries are summed by a quarter of a warp each, in one step of four
// loads per lane.
constexpr int kStagedNarrow = 32;
constexpr int kStagedUnroll = 4;

enum class Staging : int {
  kElements,  // any strides
  kColumns,   // token-major and aligned: 16 bytes of consecutive columns of a token
  kSlots,     // tokens contiguous and aligned: a slot at a time
};

struct StagedArgs {
  const int32_t *crow, *col;
  const void* values;
  int64_t value_stride;
  const void* b;
  int64_t b_row_stride, b_token_stride;
  void* c;
  int64_t c_row_stride, c_token_stride;
  int64_t rows, tokens;
  int64_t share;  // rows plus entries of each part of the rows
  int32_t cols;
  Staging staging;
};

// The tokens of one column.
template <class T, int kTokens>
struct alignas(kTokens * sizeof(T)) Slot {
  static constexpr int kBytes = kTokens * static_cast<int>(sizeof(T));
  static constexpr int kWords = kBytes / 4;
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "one load");
  uint32_t word[kWords];
};

// The place of a column's slot. The low bits are XORed with higher ones. So threads that write
// slots of neighbouring octets at the same time have no bank conflicts.
template <int kBytes>
__device__ __forceinline__ int32_t slot_of(int32_t col) {
  constexpr int kShift = kBytes == 16 ? 3 : kBytes == 8 ? 4 : 5;  // slots in 128 bytes
  return col ^ ((col >> kShift) & 7);
}
// The number of slots is a multiple of eight, because the XOR stays within groups of eight.
inline int64_t slots_for(int64_t cols) { return (cols + 7) / 8 * 8; }

// Stages columns [begin, args.cols), element by element.
template <class T, int kTokens>
__device__ __forceinline__ void stage_elements(const StagedArgs& args, Slot<T, kTokens>* slots,
                                               const T* b, int tokens, int32_t begin, int thread,
                                               int threads) {
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  const Bits* bits = reinterpret_cast<const Bits*>(b);
  for (int32_t col = begin + thread; col < args.cols; col += threads) {
    Slot<T, kTokens> slot = {};
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      if (token >= tokens) continue;
      const uint32_t element = bits[col * args.b_row_stride + token * args.b_token_stride];
      slot.word[token / kPerWord] |= element << (token % kPerWord * 16);
    }
    slots[slot_of<sizeof(slot)>(col)] = slot;
  }
}

// Stages 16 bytes of consecutive columns of every token, transposed in registers.
template <class T, int kTokens>
__device__ __forceinline__ void stage_columns(const StagedArgs& args, Slot<T, kTokens>* slots,
                                              const T* b, int tokens, int thread, int threads) {
  constexpr int kCols = kPerVec16<T>;
  using ThisSlot = Slot<T, kTokens>;
  for (int32_t group = thread; group < args.cols / kCols; group += threads) {
    uint32_t in[kTokens][4];
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      uint4 v = make_uint4(0, 0, 0, 0);
      if (token < tokens)
        v = *reinterpret_cast<const uint4*>(b + token * args.b_token_stride + group * kCols);
      in[token][0] = v.x;
      in[token][1] = v.y;
      in[token][2] = v.z;
      in[token][3] = v.w;
    }
#pragma unroll
    for (int i = 0; i < kCols; ++i) {
      ThisSlot slot;
#pragma unroll
      for (int w = 0; w < ThisSlot::kWords; ++w) {
        if constexpr (sizeof(T) == 4) {
          slot.word[w] = in[w][i];
        } else {
          const uint32_t x = in[2 * w][i / 2], y = in[2 * w + 1][i / 2];
          slot.word[w] = i % 2 == 0 ? (x & 0xffffu) | y << 16 : x >> 16 | (y & 0xffff0000u);
        }
      }
      slots[slot_of<ThisSlot::kBytes>(group * kCols + i)] = slot;
    }
  }
  stage_elements<T, kTokens>(args, slots, b, tokens, args.cols / kCols * kCols, thread, threads);
}

template <class T, int kTokens>
__device__ __forceinline__ void stage_slots(const StagedArgs& args, Slot<T, kTokens>* slots,
                                            const T* b, int thread, int threads) {
#pragma unroll 4
  for (int32_t col = thread; col < args.cols; col += threads)
    slots[slot_of<sizeof(Slot<T, kTokens>)>(col)] =
        *reinterpret_cast<const Slot<T, kTokens>*>(b + col * args.b_row_stride);
}

// The first row of a part, for all lanes of a warp. Parts have about equal sums of rows and
// entries. Two steps of 32 samples find the boundary to a 1024th of the rows. A full search would
// make every block wait for one or two more loads.
__device__ __forceinline__ int64_t first_row_of_part(const StagedArgs& args, uint32_t part,
                                                     uint32_t parts) {
  if (part == 0) return 0;
  if (part == parts) return args.rows;
  const int lane = threadIdx.x % kWarp;
  const int64_t target = args.share * part;
  int64_t begin = 0, end = args.rows;
  for (int step = 0; step < 2; ++step) {
    const int64_t sample = begin + (end - begin) * lane / kWarp;
    const bool before = args.crow[sample] + sample <= target;
    const int count = __popc(__ballot_sync(0xffffffffu, before));  // lane 0 is before
    const int64_t span = end - begin;
    end = begin + span * count / kWarp;
    begin += span * (count - 1) / kWarp;
  }
  return begin;
}

// Adds entries first, first + kStep, ..., kStagedUnroll of them, as far as their offset is below
// `left`. All indices and values are loaded before the slots, and all slots before the products.
// kFull: none of them is missing.
template <class T, class V, int kTokens, int kStep, bool kFull>
__device__ __forceinline__ void add_entries(float (&sums)[kTokens], const StagedArgs& args,
                                            const Slot<T, kTokens>* slots, int64_t first,
                                            int32_t left) {
  using ThisSlot = Slot<T, kTokens>;
  const int32_t* cols = args.col + first;
  const V* values = static_cast<const V*>(args.values) + first * args.value_stride;
  int32_t col[kStagedUnroll];
  float value[kStagedUnroll];
  ThisSlot slot[kStagedUnroll];
#pragma unroll
  for (int u = 0; u < kStagedUnroll; ++u) {
    const bool valid = kFull || u * kStep < left;
    col[u] = valid ? cols[u * kStep] : 0;
    value[u] = valid ? to_float(values[u * kStep * args.value_stride]) : 0.0f;
  }
#pragma unroll
  for (int u = 0; u < kStagedUnroll; ++u) {
    // A missing entry reads no slot: 0 times an Inf in a column that nothing refers to would be
    // NaN.
    slot[u] = {};
    if (kFull || u * kStep < left) slot[u] = slots[slot_of<ThisSlot::kBytes>(col[u])];
  }
#pragma unroll
  for (int u = 0; u < kStagedUnroll; ++u) {
#pragma unroll
    for (int w = 0; w < ThisSlot::kWords; ++w) {
      if constexpr (sizeof(T) == 4) {
        sums[w] = fmaf(value[u], __uint_as_float(slot[u].word[w]), sums[w]);
      } else {
        const float2 pair = unpack_pair<T>(slot[u].word[w]);
        sums[2 * w] = fmaf(value[u], pair.x, sums[2 * w]);
        sums[2 * w + 1] = fmaf(value[u], pair.y, sums[2 * w + 1]);
      }
    }
  }
}

// Sums over eight lanes. Lane l of them keeps token l / (8 / kTokens), in sums[0].
template <int kTokens>
__device__ __forceinline__ void reduce_eight(float (&sums)[kTokens]) {
  constexpr unsigned kAll = 0xffffffffu;
  if constexpr (kTokens == 8) exchange_halves<8>(sums, 4);
  if constexpr (kTokens == 8) exchange_halves<4>(sums, 2);
  if constexpr (kTokens == 8) exchange_halves<2>(sums, 1);
  if constexpr (kTokens == 4) exchange_halves<4>(sums, 4);
  if constexpr (kTokens == 4) exchange_halves<2>(sums, 2);
  if constexpr (kTokens == 2) exchange_halves<2>(sums, 4);
  if constexpr (kTokens == 1) sums[0] += __shfl_xor_sync(kAll, sums[0], 4);
  if constexpr (kTokens <= 2) sums[0] += __shfl_xor_sync(kAll, sums[0], 2);
  if constexpr (kTokens <= 4) sums[0] += __shfl_xor_sync(kAll, sums[0], 1);
}

// What a block holds in static shared memory, beside its slots.
template <class T, int kTokens>
struct StagedShared {
  using Tasks = RowTasks<kStagedRows, kStagedMostThreads / kWarp>;
  Tasks tasks;
  float partial[Tasks::kMostPieces][kTokens];
  T out[kTokens][kStagedRows + 2];  // two more: tokens fall into different banks
  int64_t first_row, end_row;
};

// Blocks: (groups of kTokens tokens, parts of the rows).
template <class T, class V, int kTokens>
__global__ void __launch_bounds__(kStagedMostThreads) spmm_staged_kernel(StagedArgs args) {
  using ThisSlot = Slot<T, kTokens>;
  constexpr int kLanes = 8;                         // per narrow row
  constexpr int kLanesPerToken = kLanes / kTokens;  // after reducing
  ROSA_DYNAMIC_SHARED(dynamic);
  using Shared = StagedShared<T, kTokens>;
  ROSA_SHARED(shared, Shared);
  ThisSlot* slots = reinterpret_cast<ThisSlot*>(dynamic);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;

  const int64_t first_token = int64_t{blockIdx.x} * kTokens;
  const int tokens = static_cast<int>(min(int64_t{kTokens}, args.tokens - first_token));
  const T* b = static_cast<const T*>(args.b) + first_token * args.b_token_stride;
  if (warp == warps - 1) {  // one warp finds the rows while the others stage
    const int64_t first_row = first_row_of_part(args, blockIdx.y, gridDim.y);
    const int64_t end_row = first_row_of_part(args, blockIdx.y + 1, gridDim.y);
    if (lane == 0) {
      shared.first_row = first_row;
      shared.end_row = end_row;
      shared.tasks.clear(0);
    }
  } else {
    const int threads = (warps - 1) * kWarp;
    if (args.staging == Staging::kColumns) {
      stage_columns<T, kTokens>(args, slots, b, tokens, threadIdx.x, threads);
    } else if (args.staging == Staging::kSlots && tokens == kTokens) {
      stage_slots<T, kTokens>(args, slots, b, threadIdx.x, threads);
    } else {
      stage_elements<T, kTokens>(args, slots, b, tokens, 0, threadIdx.x, threads);
    }
  }
  __syncthreads();

  // Chunks of equal size. There are fewer than 2^31 rows, and 64-bit divisions are slow.
  const uint32_t all_rows = static_cast<uint32_t>(shared.end_row - shared.first_row);
  const uint32_t chunks = (all_rows + kStagedRows - 1) / kStagedRows;
  const uint32_t chunk_rows = (all_rows + chunks - 1) / max(chunks, 1u);
  for (uint32_t begin = 0, parity = 0; begin < all_rows; begin += chunk_rows, parity ^= 1) {
    const int rows = static_cast<int>(min(chunk_rows, all_rows - begin));
    const int64_t first_row = shared.first_row + begin;
    list_rows(shared.tasks, parity, args.crow + first_row, rows, kStagedNarrow, [&](int row) {
#pragma unroll
      for (int token = 0; token < kTokens; ++token) shared.out[token][row] = from_float<T>(0.0f);
    });
    __syncthreads();

    const auto& counters = shared.tasks.counters[parity];
    const int wide = counters.wide, narrow = counters.narrow, cuts = counters.cuts;
    if (threadIdx.x == 0) shared.tasks.clear(parity ^ 1);
    for (;;) {
      const int i = take_task(shared.tasks, parity);
      float sums[kTokens] = {};
      if (i < wide) {
        const RowTask task = shared.tasks.task[i];
        constexpr int kAtOnce = kWarp * kStagedUnroll;
        int64_t entry = task.begin + int64_t{lane};
        int32_t left = task.end - task.begin;
        for (; left >= kAtOnce; left -= kAtOnce, entry += kAtOnce)
          add_entries<T, V, kTokens, kWarp, true>(sums, args, slots, entry, left);
        if (left > 0)
          add_entries<T, V, kTokens, kWarp, false>(sums, args, slots, entry, left - lane);
        reduce_eight(sums);
        sums[0] += __shfl_xor_sync(0xffffffffu, sums[0], 8);
        sums[0] += __shfl_xor_sync(0xffffffffu, sums[0], 16);
        if (lane < kLanes && lane % kLanesPerToken == 0) {
          const int token = lane / kLanesPerToken;
          if (task.piece < 0) {
            shared.out[token][task.row] = from_float<T>(sums[0]);
          } else {
            shared.partial[task.piece][token] = sums[0];
          }
        }
      } else {
        const int of_warp = (i - wide) * (kWarp / kLanes);
        if (of_warp >= narrow) break;
        const int of_lane = of_warp + lane / kLanes;
        RowTask task = {0, 0, 0, -1};
        if (of_lane < narrow) task = shared.tasks.narrow_task(of_lane);
        const int in_row = lane % kLanes;
        add_entries<T, V, kTokens, kLanes, false>(sums, args, slots, task.begin + int64_t{in_row},
                                                  task.end - task.begin - in_row);
        reduce_eight(sums);
        if (of_lane < narrow && in_row % kLanesPerToken == 0)
          shared.out[in_row / kLanesPerToken][task.row] = from_float<T>(sums[0]);
      }
    }
    __syncthreads();

    if (cuts > 0) {
      join_pieces(shared.tasks, cuts, shared.partial, shared.out);
      __syncthreads();
    }
    const RowsOut<T> to = {
        static_cast<T*>(args.c) + first_row * args.c_row_stride + first_token * args.c_token_stride,
        args.c_row_stride, args.c_token_stride};
    store_rows(shared.out, to, rows, tokens);
    __syncthreads();  // the lists and the results give way to the next chunk's
  }
}

}  // namespace rosa::cuda
