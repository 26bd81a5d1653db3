// How the warps of a block share the rows of a chunk of SpMM's output, and how they store the
// chunk.
//
// A block owns consecutive rows. In any other order, writing a token-major output row by row costs
// a 32-byte sector per element. That is 16 times the bytes, and at 8192 tokens more than the
// gathers themselves (an estimate). So rows are not swizzled over the grid. Instead every block
// lists its own rows. A long row takes a whole warp, and the longest rows are cut so that all warps
// share them. Short rows go four to a warp. Warps then take tasks from a counter. The warp that
// computes a row changes from run to run. The order of its sum does not.
#pragma once

#include "cuda/numeric.h"

namespace rosa::cuda {

// Entries [begin, end) of one row: all of them, or a piece whose sum goes to partial `piece`.
struct alignas(16) RowTask {
  int32_t begin, end;
  int32_t row;    // in the chunk
  int32_t piece;  // -1 for the whole row
};

struct CutRow {
  int32_t row, first_piece, end_piece;
};

// The lists of one chunk, in shared memory. There are two sets of counters, for even and for odd
// chunks. One set is cleared while the other is in use.
template <int kMostRows, int kMostWarps>
struct RowTasks {
  // `piece` in list_rows is more than one warp's share of the entries, and only rows with more than
  // twice that are cut. So fewer rows are cut than half the number of warps, into fewer than 3/2
  // pieces per warp.
  static constexpr int kMostPieces = kMostWarps * 3 / 2;
  static constexpr int kMostCuts = kMostWarps / 2;

  RowTask task[kMostRows + kMostPieces];  // wide ones from the front, narrow ones from the back
  CutRow cut[kMostCuts];
  struct Counters {
    int32_t wide, narrow, pieces, cuts, next;
  } counters[2];

  __device__ __forceinline__ void clear(int parity) { counters[parity] = {0, 0, 0, 0, 0}; }
  __device__ __forceinline__ RowTask& narrow_task(int i) {
    return task[kMostRows + kMostPieces - 1 - i];
  }
};

// Only rows with more than twice this many entries are cut. A warp reads this many in 4 to 16
// steps.
constexpr int kLeastPiece = 128;

// All threads of a block list the rows of a chunk. A barrier must follow. Rows of at most
// `narrow_limit` entries become narrow tasks. on_empty(row) handles rows without entries.
template <int kMostRows, int kMostWarps, class OnEmpty>
__device__ __forceinline__ void list_rows(RowTasks<kMostRows, kMostWarps>& tasks, int parity,
                                          const int32_t* crow, int rows, int narrow_limit,
                                          const OnEmpty& on_empty) {
  auto& counters = tasks.counters[parity];
  const int warps = blockDim.x / kWarp;
  const int32_t entries = crow[rows] - crow[0];
  const int32_t piece = max(kLeastPiece, entries / warps + 1);
  for (int row = threadIdx.x; row < rows; row += blockDim.x) {
    const int32_t begin = crow[row], end = crow[row + 1], length = end - begin;
    if (length == 0) {
      on_empty(row);
    } else if (length <= narrow_limit) {
      tasks.narrow_task(atomicAdd(&counters.narrow, 1)) = {begin, end, row, -1};
    } else if (length / 2 <= piece) {
      tasks.task[atomicAdd(&counters.wide, 1)] = {begin, end, row, -1};
    } else {
      const int32_t count = length / piece + 1;
      const int32_t first = atomicAdd(&counters.pieces, count);
      const int32_t at = atomicAdd(&counters.wide, count);
      tasks.cut[atomicAdd(&counters.cuts, 1)] = {row, first, first + count};
      for (int32_t i = 0; i < count; ++i) {
        const auto boundary = [&](int32_t b) {
          return begin + static_cast<int32_t>(int64_t{length} * b / count);
        };
        tasks.task[at + i] = {boundary(i), boundary(i + 1), row, first + i};
      }
    }
  }
}

// The number of a warp's next task. If no task is left, the number is past the last one.
template <class Tasks>
__device__ __forceinline__ int take_task(Tasks& tasks, int parity) {
  int taken = 0;
  if (threadIdx.x % kWarp == 0) taken = atomicAdd(&tasks.counters[parity].next, 1);
  return __shfl_sync(0xffffffffu, taken, 0);
}

// Sums the pieces of the rows that were cut, in order.
template <class T, class Tasks, int kTokens, int kStride>
__device__ __forceinline__ void join_pieces(const Tasks& tasks, int cuts,
                                            const float (*partial)[kTokens],
                                            T (&out)[kTokens][kStride]) {
  for (int i = threadIdx.x; i < cuts * kTokens; i += blockDim.x) {
    const CutRow& cut = tasks.cut[i / kTokens];
    const int token = i % kTokens;
    float sum = 0;
    for (int32_t piece = cut.first_piece; piece < cut.end_piece; ++piece)
      sum += partial[piece][token];
    out[token][cut.row] = from_float<T>(sum);
  }
}

// Where a chunk of the output is stored.
template <class T>
struct RowsOut {
  T* first;  // of the chunk
  int64_t row_stride, token_stride;
};

// Stores a chunk of results along the dimension with the smaller stride.
template <class T, int kTokens, int kStride>
__device__ __forceinline__ void store_rows(const T (&out)[kTokens][kStride], const RowsOut<T>& to,
                                           int rows, int tokens) {
  if (to.row_stride < to.token_stride) {
    const int warps = blockDim.x / kWarp;
    for (int token = threadIdx.x / kWarp; token < tokens; token += warps) {
      for (int row = threadIdx.x % kWarp; row < rows; row += kWarp)
        to.first[row * to.row_stride + token * to.token_stride] = out[token][row];
    }
  } else {
    for (int i = threadIdx.x; i < rows * kTokens; i += blockDim.x) {
      const int row = i / kTokens, token = i % kTokens;
      if (token < tokens) to.first[row * to.row_stride + token * to.token_stride] = out[token][row];
    }
  }
}

// Two halves of the lanes exchange the sums that the other half continues with. Of kCount sums, a
// lane keeps kCount / 2. It keeps the upper ones if its bit `offset` is set.
template <int kCount>
__device__ __forceinline__ void exchange_halves(float* sums, int offset) {
  const bool upper = threadIdx.x & offset;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float keep = upper ? sums[i + kCount / 2] : sums[i];
    const float give = upper ? sums[i] : sums[i + kCount / 2];
    sums[i] = keep + __shfl_xor_sync(0xffffffffu, give, offset);
  }
}

}  // namespace rosa::cuda
