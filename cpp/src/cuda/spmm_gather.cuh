// SpMM from 128-byte lines of b, packed or in place. It serves a b that does not fit into shared
// memory.
//
// A block owns consecutive rows and one line of tokens (64 of a 16-bit type). Eight lanes read one
// entry's line. So a load of a warp reads four entries, and a step of four loads reads 16. A warp
// takes only one line. The lines that neighbouring blocks read at one time are then few enough for
// L1 to catch some. The product is bound by L2 either way.
#pragma once

#include "cuda/lines.h"
#include "cuda/numeric.h"
#include "cuda/spmm_rows.cuh"

namespace rosa::cuda {

constexpr int kGatherRowsThreads = 256;
constexpr int kGatherRows = 64;  // maximum rows of a block
// Blocks per multiprocessor, stated for ptxas. Otherwise ptxas takes 48 registers on compute
// capability 9.0 and issues one load at a time. With these numbers four loads are under way, and
// nothing spills.
template <class T>
constexpr int kGatherRowsBlocksPerSm = sizeof(T) == 4 ? 3 : 4;

struct GatherRowsArgs {
  const int32_t *crow, *col;
  const int32_t* position;  // of a column in the lines; null: the column itself
  const void* values;
  int64_t value_stride;
  Lines b;
  void* c;  // at the first token of the lines
  int64_t c_row_stride, c_token_stride;
  int64_t rows, tokens;
  int rows_per_block;
};

// Adds value * line for `count` entries. Each lane's own (index, value) is one of them. kLanes
// lanes read the line of one entry, 16 bytes each. Four rounds of loads are issued before the
// products.
template <class T, int kLanes>
__device__ __forceinline__ void gather_entries(float (&sums)[kPerVec16<T>], const Lines& lines,
                                               int64_t block, int32_t segment, int32_t index,
                                               float value, int count) {
  constexpr unsigned kAll = 0xffffffffu;
  constexpr int kAtOnce = kWarp / kLanes, kRounds = 4;
  const int mine = threadIdx.x % kWarp / kLanes;
  // kFull omits the bounds test of each load. With the test, ptxas would wait for each load.
  const auto add = [&](int first, auto full) {
    constexpr bool kFull = decltype(full)::value;
    uint4 loaded[kRounds];
    float factor[kRounds];
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int entry = first + round * kAtOnce + mine;
      const int32_t at = __shfl_sync(kAll, index, entry % kWarp);
      factor[round] = __shfl_sync(kAll, value, entry % kWarp);
      // A missing entry reads no line: 0 times an Inf in a row that nothing refers to would be NaN.
      loaded[round] = make_uint4(0, 0, 0, 0);
      if (kFull || entry < count) loaded[round] = *lines.segment(block, at, segment);
    }
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      float elements[kPerVec16<T>];
      unpack_vec16<T>(loaded[round], elements);
#pragma unroll
      for (int i = 0; i < kPerVec16<T>; ++i) sums[i] = fmaf(factor[round], elements[i], sums[i]);
    }
  };
  int first = 0;
  for (; first + kRounds * kAtOnce <= count; first += kRounds * kAtOnce)
    add(first, std::true_type{});
  if (first < count) add(first, std::false_type{});
}

// Blocks: (blocks of rows, lines).
template <class T, class V>
__global__ void __launch_bounds__(kGatherRowsThreads, kGatherRowsBlocksPerSm<T>)
    spmm_gather_kernel(GatherRowsArgs args) {
  constexpr int kTokens = kTokensPerLine<T>, kPer = kPerVec16<T>;
  using Tasks = RowTasks<kGatherRows, kGatherRowsThreads / kWarp>;
  using Partial = float[Tasks::kMostPieces][kTokens];
  using Out = T[kTokens][kGatherRows + 2];  // two more: tokens fall into different banks
  ROSA_SHARED(tasks, Tasks);
  ROSA_SHARED(partial, Partial);
  ROSA_SHARED(out, Out);
  const int lane = threadIdx.x % kWarp;

  const int64_t line = blockIdx.y;
  const int64_t first_row = int64_t{blockIdx.x} * args.rows_per_block;
  const int rows = static_cast<int>(min(int64_t{args.rows_per_block}, args.rows - first_row));
  const int tokens = static_cast<int>(min(int64_t{kTokens}, args.tokens - line * kTokens));
  // Lanes past the last segment read that segment again. Their sums are not stored.
  const int32_t segment =
      static_cast<int32_t>(min(int64_t{lane % kSegments}, args.b.segments - 1 - line * kSegments));

  if (threadIdx.x == 0) tasks.clear(0);
  __syncthreads();
  list_rows(tasks, 0, args.crow + first_row, rows, 0, [&](int row) {
    for (int token = 0; token < kTokens; ++token) out[token][row] = from_float<T>(0.0f);
  });
  __syncthreads();

  const int count = tasks.counters[0].wide, cuts = tasks.counters[0].cuts;
  for (;;) {
    const int i = take_task(tasks, 0);
    if (i >= count) break;
    const RowTask task = tasks.task[i];
    float sums[kPer] = {};
    for (int64_t entry = task.begin; entry < task.end; entry += kWarp) {
      const int left = static_cast<int>(min(int64_t{kWarp}, task.end - entry));
      int32_t index = 0;
      float value = 0;
      if (lane < left) {
        index = args.col[entry + lane];
        value = to_float(static_cast<const V*>(args.values)[(entry + lane) * args.value_stride]);
        if (args.position != nullptr) index = args.position[index];
      }
      gather_entries<T, kSegments>(sums, args.b, line, segment, index, value, left);
    }
    // Four lanes have read each segment. Each of them keeps the sums of a quarter of its tokens.
    exchange_halves<kPer>(sums, 16);
    exchange_halves<kPer / 2>(sums, 8);
    const int first_token = lane % kSegments * kPer + lane / kSegments % 2 * (kPer / 4) +
                            lane / (2 * kSegments) * (kPer / 2);
#pragma unroll
    for (int u = 0; u < kPer / 4; ++u) {
      if (task.piece < 0) {
        out[first_token + u][task.row] = from_float<T>(sums[u]);
      } else {
        partial[task.piece][first_token + u] = sums[u];
      }
    }
  }
  __syncthreads();

  if (cuts > 0) {
    join_pieces(tasks, cuts, partial, out);
    __syncthreads();
  }
  const RowsOut<T> to = {static_cast<T*>(args.c) + first_row * args.c_row_stride +
                             line * kTokens * args.c_token_stride,
                         args.c_row_stride, args.c_token_stride};
  store_rows(out, to, rows, tokens);
}

}  // namespace rosa::cuda
