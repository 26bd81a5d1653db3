// SpMM on the tensor cores. A block multiplies a strip of the permuted mask with 128 tokens.
//
// The heavy tiles of the strip are written out in shared memory as dense ones, 128 columns at a
// time. They are multiplied with the panel of b (mma.sync). The strip's light entries are added
// from the same panel, so every result has one owner. Zeros are multiplied too: Inf or NaN in b
// reaches rows that do not refer to it.
//
// A strip's rows are scattered over the output. If c is row-major, each row is stored where it
// belongs. If c is token-major, storing one element at a time would write 32 bytes for 2. So
// results first form a panel of lines, which spmm_unpermute_kernel transposes. At 4096 rows and
// 8192 tokens, 67 MB are written and read again in about 30 us. Direct stores would write 1 GB of
// sectors in L2 in about 200 us (estimates).
#pragma once

#include "cuda/lines.h"
#include "cuda/numeric.h"
#include "cuda/ptx.h"
#include "cuda/spmm_gather.cuh"

namespace rosa::cuda {

constexpr int kSpmmTileThreads = 256;
constexpr int kSpmmTileRows = 128;
constexpr int kSpmmTileTokens = 128;  // two lines
constexpr int kSlabCols = 128;        // columns written out at a time
constexpr int kStepCols = 64;         // columns of b that are loaded at a time

// One block's shared memory: two slabs (one is multiplied, one is written) and two steps of b, 96
// KiB in all. A multiprocessor of compute capability 9.0 holds two such blocks. 8.6 and 8.9 hold
// one, and give a block at most 99 KiB. After the products, the same memory holds the sums, with
// eight floats of padding per row against bank conflicts. It also holds the begin and end of each
// row's light entries.
constexpr int kSlabBytes = kSpmmTileRows * kSlabCols * 2;
constexpr int kStepBytes = kStepCols * kSpmmTileTokens * 2;
constexpr int kSpmmTileSharedBytes = 2 * kSlabBytes + 2 * kStepBytes;
constexpr int kSumStride = kSpmmTileTokens + 8;
constexpr int kSumBytes = kSpmmTileRows * kSumStride * 4;
static_assert(kSumBytes + 2 * kSpmmTileRows * 4 <= kSpmmTileSharedBytes, "sums replace the stages");

struct SpmmTileArgs {
  // From the plan.
  int32_t tile_cols, tile_col_bits;  // a power of two, and its exponent
  int32_t active_rows, active_cols, padded_rows;
  const int32_t *tile, *tile_begin, *strip_tile, *strip_light;
  const int32_t *code, *entry, *light_row, *light_col;
  const int32_t* row_order;
  const int32_t* row_position;
  int64_t heavy_nnz;

  const void* values;
  int64_t value_stride;
  Lines b;  // panel
  int64_t lines, tokens;
  uint32_t token_blocks;  // of kSpmmTileTokens; blocks: (strip, token block), token block fastest
  uint32_t strip_blocks;  // strips * token_blocks; later blocks clear empty rows
  unsigned char* panel;   // of results, [line][row position]; null: straight into c
  void* c;
  int64_t rows, c_row_stride, c_token_stride;
};

// The place of element (row, col) in a slab. A slab has two halves of 64 columns, with rows of 128
// bytes. The segments of a row are XORed with the row, so that ldmatrix has no bank conflicts.
__device__ __forceinline__ int slab_offset(int row, int col) {
  return col / kStepCols * (kSlabBytes / 2) + row * kLineBytes +
         ((col % kStepCols / 8) ^ (row % 8)) * kSegmentBytes + col % 8 * 2;
}

__device__ __forceinline__ void clear_slab(unsigned char* slab) {
#pragma unroll
  for (int i = 0; i < kSlabBytes / kSegmentBytes / kSpmmTileThreads; ++i)
    *reinterpret_cast<uint4*>(slab + (threadIdx.x + i * kSpmmTileThreads) * kSegmentBytes) =
        make_uint4(0, 0, 0, 0);
}

// Writes the nonzeros of columns [first_col, first_col + kSlabCols) of a tile into a cleared slab.
template <class T>
__device__ __forceinline__ void fill_slab(const SpmmTileArgs& args, unsigned char* slab,
                                          int32_t tile, int32_t first_col) {
  const T* values = static_cast<const T*>(args.values);
  const int32_t end = args.tile_begin[tile + 1];
#pragma unroll 4
  for (int32_t e = args.tile_begin[tile] + threadIdx.x; e < end; e += kSpmmTileThreads) {
    const int32_t code = args.code[e];
    const int32_t row = code >> args.tile_col_bits;
    const int32_t col = (code & (args.tile_cols - 1)) - first_col;
    if (static_cast<uint32_t>(col) < static_cast<uint32_t>(kSlabCols))
      *reinterpret_cast<T*>(slab + slab_offset(row, col)) =
          values[args.entry[e] * args.value_stride];
  }
}

// Starts the copy of two lines of 64 columns. Columns past the last active one were never packed.
// They are zeroed, because a NaN there would survive the multiplication by zero.
__device__ __forceinline__ void load_step(const SpmmTileArgs& args, unsigned char* step,
                                          int64_t line, int32_t first_col) {
  constexpr int kSegmentsOfLine = kStepCols * kSegments;
#pragma unroll
  for (int i = 0; i < 2 * kSegmentsOfLine / kSpmmTileThreads; ++i) {
    const int at = threadIdx.x + i * kSpmmTileThreads;
    const int col = at / kSegments % kStepCols;
    // If the number of lines is odd, the last one is read twice. The second sums are not stored.
    const int64_t of_line = min(line + at / kSegmentsOfLine, args.lines - 1);
    const unsigned char* from = args.b.base + of_line * args.b.block_stride +
                                int64_t{first_col} * kLineBytes +
                                at % kSegmentsOfLine * kSegmentBytes;
    copy_async_16(step + at * kSegmentBytes, from, first_col + col < args.active_cols ? 16 : 0);
  }
}

// Stores four consecutive tokens of one row, eight bytes.
template <class T>
__device__ __forceinline__ void store_four(const SpmmTileArgs& args, int64_t position,
                                           int64_t token, const float (&sums)[4]) {
  const uint2 packed = make_uint2(pack_pair<T>(sums[0], sums[1]), pack_pair<T>(sums[2], sums[3]));
  constexpr int kPerLine = kTokensPerLine<T>;
  if (args.panel != nullptr) {
    if (token / kPerLine < args.lines)
      *reinterpret_cast<uint2*>(args.panel +
                                (token / kPerLine * args.padded_rows + position) * kLineBytes +
                                token % kPerLine * sizeof(T)) = packed;
    return;
  }
  T* to = static_cast<T*>(args.c) + args.row_order[position] * args.c_row_stride +
          token * args.c_token_stride;
  if (args.c_token_stride == 1 && token + 4 <= args.tokens &&
      reinterpret_cast<uintptr_t>(to) % sizeof(packed) == 0) {
    *reinterpret_cast<uint2*>(to) = packed;
    return;
  }
#pragma unroll
  for (int u = 0; u < 4; ++u)
    if (token + u < args.tokens) to[u * args.c_token_stride] = from_float<T>(sums[u]);
}

// Clears rows without a nonzero, which are in no strip.
template <class T>
__device__ __forceinline__ void clear_empty_rows(const SpmmTileArgs& args, uint32_t block) {
  const int64_t first_row = int64_t{block / args.token_blocks} * kSpmmTileRows;
  const int64_t first_token = int64_t{block % args.token_blocks} * kSpmmTileTokens;
  for (int i = threadIdx.x; i < kSpmmTileRows * kSpmmTileTokens; i += kSpmmTileThreads) {
    const int64_t row = first_row + i / kSpmmTileTokens, token = first_token + i % kSpmmTileTokens;
    if (row < args.rows && token < args.tokens && args.row_position[row] < 0)
      static_cast<T*>(args.c)[row * args.c_row_stride + token * args.c_token_stride] =
          from_float<T>(0.0f);
  }
}

// Adds the light entries of the strip's rows to their sums and stores the results. A warp takes one
// row at a time. 16 lanes read the two lines of one entry.
template <class T>
__device__ __forceinline__ void finish_rows(const SpmmTileArgs& args, int32_t strip,
                                            int64_t token_block, const float* sums,
                                            const int32_t* light_begin, const int32_t* light_end) {
  constexpr int kPer = kPerVec16<T>, kLanes = kSpmmTileTokens / kPer;
  const int lane = threadIdx.x % kWarp, part = lane % kLanes;
  const int64_t line = min(token_block * 2 + part / kSegments, args.lines - 1);
  const T* values = static_cast<const T*>(args.values);
  const int32_t* entries = args.entry + args.heavy_nnz;
  for (int row = threadIdx.x / kWarp; row < kSpmmTileRows; row += kSpmmTileThreads / kWarp) {
    const int32_t position = strip * kSpmmTileRows + row;
    if (position >= args.active_rows) break;
    float light[kPer] = {};
    for (int32_t e = light_begin[row]; e < light_end[row]; e += kWarp) {
      const int left = min(kWarp, light_end[row] - e);
      int32_t index = 0;
      float value = 0;
      if (lane < left) {
        index = args.light_col[e + lane];
        value = to_float(values[entries[e + lane] * args.value_stride]);
      }
      gather_entries<T, kLanes>(light, args.b, line, part % kSegments, index, value, left);
    }
    exchange_halves<kPer>(light, kLanes);
    const int first = part * kPer + lane / kLanes * (kPer / 2);
    const float4 heavy = *reinterpret_cast<const float4*>(sums + row * kSumStride + first);
    const float total[4] = {heavy.x + light[0], heavy.y + light[1], heavy.z + light[2],
                            heavy.w + light[3]};
    store_four<T>(args, position, token_block * kSpmmTileTokens + first, total);
  }
}

template <class T>
__global__ void __launch_bounds__(kSpmmTileThreads, 2) spmm_tile_kernel(SpmmTileArgs args) {
  static_assert(sizeof(T) == 2, "tensor cores multiply 16-bit elements");
  constexpr int kWarpRows = 64, kWarpTokens = 32;
  constexpr int kFragmentsA = kWarpRows / 16, kFragmentsB = kWarpTokens / 8;
  ROSA_DYNAMIC_SHARED(shared);
  if (blockIdx.x >= args.strip_blocks) {
    clear_empty_rows<T>(args, blockIdx.x - args.strip_blocks);
    return;
  }
  unsigned char* const slabs = shared;
  unsigned char* const steps = shared + 2 * kSlabBytes;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warp_row = warp / 4 * kWarpRows, warp_token = warp % 4 * kWarpTokens;
  const int32_t strip = static_cast<int32_t>(blockIdx.x / args.token_blocks);
  const int64_t token_block = blockIdx.x % args.token_blocks;

  // A step has 64 columns. A slab has two steps, and a tile has one or two slabs.
  const int32_t slabs_of_tile = args.tile_cols / kSlabCols;
  const int32_t first_tile = args.strip_tile[strip];
  const int32_t slab_count = (args.strip_tile[strip + 1] - first_tile) * slabs_of_tile;
  const auto fill = [&](int32_t slab) {
    fill_slab<T>(args, slabs + slab % 2 * kSlabBytes, first_tile + slab / slabs_of_tile,
                 slab % slabs_of_tile * kSlabCols);
  };
  const auto load = [&](int32_t step) {
    const int32_t slab = step / 2;
    const int32_t first_col =
        args.tile[2 * (first_tile + slab / slabs_of_tile) + 1] * args.tile_cols +
        slab % slabs_of_tile * kSlabCols + step % 2 * kStepCols;
    load_step(args, steps + step % 2 * kStepBytes, token_block * 2, first_col);
  };

  float sums[kFragmentsA][kFragmentsB][4] = {};
  if (slab_count > 0) {
    load(0);
    clear_slab(slabs);
    __syncthreads();
    fill(0);
  }
  copy_async_commit();
  for (int32_t step = 0; step < 2 * slab_count; ++step) {
    const int32_t slab = step / 2;
    copy_async_wait<0>();
    // This step and its slab have landed for every thread. The previous step and slab are free.
    __syncthreads();
    if (step + 1 < 2 * slab_count) load(step + 1);
    copy_async_commit();
    if (step % 2 == 0) {
      clear_slab(slabs + (slab + 1) % 2 * kSlabBytes);
    } else if (slab + 1 < slab_count) {
      fill(slab + 1);
    }

    // The lines that this lane passes to ldmatrix: rows of the slab, and columns of b, whose tokens
    // are transposed on the way.
    const unsigned char* a_half = slabs + slab % 2 * kSlabBytes + step % 2 * (kSlabBytes / 2);
    const unsigned char* b_line =
        steps + step % 2 * kStepBytes + warp_token / kTokensPerLine<T> * (kStepBytes / 2);
    const int a_row = warp_row + lane % 16, a_segment = lane / 16;
    const int b_col = lane % 16, b_segment = warp_token % kTokensPerLine<T> / 8 + lane / 16;
#pragma unroll 2  // four do not fit into 128 registers
    for (int i = 0; i < kStepCols / 16; ++i) {
      uint32_t a[kFragmentsA][4], b[kFragmentsB / 2][4];
#pragma unroll
      for (int row = 0; row < kFragmentsA; ++row)
        load_matrix_x4(a[row], a_half + (a_row + row * 16) * kLineBytes +
                                   ((i * 2 + a_segment) ^ (a_row % 8)) * kSegmentBytes);
#pragma unroll
      for (int token = 0; token < kFragmentsB / 2; ++token)
        load_matrix_x4_transposed(b[token],
                                  b_line + (b_col + i * 16) * kLineBytes +
                                      ((b_segment + token * 2) ^ (b_col % 8)) * kSegmentBytes);
#pragma unroll
      for (int row = 0; row < kFragmentsA; ++row)
#pragma unroll
        for (int token = 0; token < kFragmentsB; ++token)
          mma_16x8x16<T>(sums[row][token], a[row], b[token / 2][token % 2 * 2],
                         b[token / 2][token % 2 * 2 + 1]);
    }
  }
  __syncthreads();  // the sums replace the slabs

  float* const all_sums = reinterpret_cast<float*>(shared);
  int32_t* const light_begin = reinterpret_cast<int32_t*>(shared + kSumBytes);
  int32_t* const light_end = light_begin + kSpmmTileRows;
#pragma unroll
  for (int row = 0; row < kFragmentsA; ++row)
#pragma unroll
    for (int token = 0; token < kFragmentsB; ++token) {
      float* at = all_sums + (warp_row + row * 16 + lane / 4) * kSumStride + warp_token +
                  token * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(at) = make_float2(sums[row][token][0], sums[row][token][1]);
      *reinterpret_cast<float2*>(at + 8 * kSumStride) =
          make_float2(sums[row][token][2], sums[row][token][3]);
    }
  if (threadIdx.x < kSpmmTileRows) light_begin[threadIdx.x] = light_end[threadIdx.x] = 0;
  __syncthreads();
  const int32_t begin = args.strip_light[strip], end = args.strip_light[strip + 1];
  for (int32_t e = begin + threadIdx.x; e < end; e += kSpmmTileThreads) {
    const int32_t row = args.light_row[e];
    if (e == begin || args.light_row[e - 1] != row) light_begin[row % kSpmmTileRows] = e;
    if (e + 1 == end || args.light_row[e + 1] != row) light_end[row % kSpmmTileRows] = e + 1;
  }
  __syncthreads();
  finish_rows<T>(args, strip, token_block, all_sums, light_begin, light_end);
}

// Arguments of the copy from the panel of results to c. A block copies 64 rows and one line of
// tokens.
struct UnpermuteArgs {
  const unsigned char* panel;
  int32_t padded_rows;
  const int32_t* position;  // of a row, -1 if it is empty
  void* c;
  int64_t rows, tokens, row_stride, token_stride;
};

constexpr int kUnpermuteThreads = 256;
constexpr int kUnpermuteRows = 64;

// Blocks: (blocks of rows, lines). Word holds the 16 bits of an element.
template <class Word>
__global__ void __launch_bounds__(kUnpermuteThreads) spmm_unpermute_kernel(UnpermuteArgs args) {
  static_assert(sizeof(Word) == 2, "two elements to a register");
  constexpr int kTokens = kTokensPerLine<Word>;
  using Tile = uint32_t[kUnpermuteRows][kTokens / 2 + 1];  // odd: rows fall into different banks
  ROSA_SHARED(tile, Tile);
  const int64_t line = blockIdx.y;
  const int64_t first_row = int64_t{blockIdx.x} * kUnpermuteRows;
  const int rows = static_cast<int>(min(int64_t{kUnpermuteRows}, args.rows - first_row));
  const int tokens = static_cast<int>(min(int64_t{kTokens}, args.tokens - line * kTokens));
#pragma unroll
  for (int i = 0; i < kUnpermuteRows * kSegments / kUnpermuteThreads; ++i) {
    const int at = threadIdx.x + i * kUnpermuteThreads;
    const int row = at / kSegments, segment = at % kSegments;
    if (row >= rows) continue;
    const int32_t position = args.position[first_row + row];
    uint4 v = make_uint4(0, 0, 0, 0);
    if (position >= 0)
      v = *reinterpret_cast<const uint4*>(
          args.panel + (line * args.padded_rows + position) * kLineBytes + segment * kSegmentBytes);
    uint32_t* to = tile[row] + segment * 4;
    to[0] = v.x;
    to[1] = v.y;
    to[2] = v.z;
    to[3] = v.w;
  }
  __syncthreads();
  Word* c =
      static_cast<Word*>(args.c) + first_row * args.row_stride + line * kTokens * args.token_stride;
  for (int token = threadIdx.x / kWarp; token < tokens; token += kUnpermuteThreads / kWarp) {
    for (int row = threadIdx.x % kWarp; row < rows; row += kWarp) {
      const uint32_t pair = tile[row][token / 2];
      c[row * args.row_stride + token * args.token_stride] =
          static_cast<Word>(token % 2 == 0 ? pair : pair >> 16);
    }
  }
}

}  // namespace rosa::cuda
