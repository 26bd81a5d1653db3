// The tile kernel computes heavy tiles of the permuted mask as dense products on the tensor cores
// (mma.sync). It keeps only the listed nonzeros.
#pragma once

#include "cuda/lines.h"
#include "cuda/numeric.h"
#include "cuda/ptx.h"
#include "cuda/stream_k.h"

namespace rosa::cuda {

struct TileArgs {
  const unsigned char *a, *b;  // panels of this chunk of tokens
  int32_t padded_rows, padded_cols;
  int32_t blocks;                           // lines along an index
  const int32_t *tile, *tile_begin, *code;  // of the plan
  float* partial;                           // (slices, heavy_nnz)
  int64_t heavy_nnz;
  int32_t slices;
  StreamK work;
  bool accumulate;  // add to the sums of an earlier chunk
};

// The shape of one block of the kernel. A warp computes 64 x 64. With 64 x 32, ldmatrix and the
// filling of the stages take 1024 clocks of shared memory per line block, against 826 for the
// products.
template <int kRows_, int kCols_, int kStages_>
struct TileShape {
  static constexpr int kRows = kRows_, kCols = kCols_, kStages = kStages_;
  static constexpr int kWarpEdge = 64;
  static constexpr int kWarpsAcross = kCols / kWarpEdge;
  static constexpr int kThreads = kRows / kWarpEdge * kWarpsAcross * 32;
  // A multiprocessor has registers for 256 threads with 255 each.
  static constexpr int kMostBlocks = 256 / kThreads;
  static constexpr int kStageBytes = (kRows + kCols) * kLineBytes;
  // Accumulators pass through shared memory. Each row has 8 floats of padding against bank
  // conflicts.
  static constexpr int kStride = kCols + 8;
  static constexpr int kSampleBytes = kRows * kStride * 4;
  static constexpr int kSharedBytes =
      kStages * kStageBytes > kSampleBytes ? kStages * kStageBytes : kSampleBytes;
};

// Copies a tile's operand for one line block, which is one contiguous run of its panel.
template <int kLines, int kThreads>
__device__ __forceinline__ void load_run(unsigned char* to, const unsigned char* from) {
  static_assert(kLines * kSegments % kThreads == 0, "every thread copies as many segments");
#pragma unroll
  for (int i = 0; i < kLines * kSegments / kThreads; ++i) {
    const int offset = (threadIdx.x + i * kThreads) * kSegmentBytes;
    copy_async_16(to + offset, from + offset);
  }
}

// The number of line blocks that are summed on the tensor cores before the sums are kept and begin
// again. Tensor cores truncate sums instead of rounding them. In 64 line blocks (4,096 tokens) that
// uses a third of the error that the accuracy policy allows, or two thirds on older devices.
// Keeping the sums costs 4 % of the products of 64 line blocks, and nothing if the products wait
// for L2. These are estimates: see docs/cuda-kernels.md, "Truncation on the tensor cores".
constexpr int kSummedBlocks = 64;

// A piece of the work of one block: line blocks [begin, end) of one tile. The sums go to slice
// `slice`, and are added to what is there if `accumulate`. Pieces follow each other until one is
// empty.
struct TilePiece {
  int32_t tile, begin, end, slice;
  bool accumulate;
  int64_t units;  // work left for this block, this piece included

  __device__ __forceinline__ void set_end(int32_t blocks) {
    end = static_cast<int32_t>(
        min(min(int64_t{begin} + kSummedBlocks, int64_t{blocks}), begin + units));
  }
};

__device__ __forceinline__ TilePiece first_piece(const TileArgs& args) {
  const int64_t unit = args.work.first_unit(blockIdx.x);
  TilePiece piece;
  piece.tile = static_cast<int32_t>(unit / args.blocks);
  piece.begin = static_cast<int32_t>(unit % args.blocks);
  piece.slice =
      static_cast<int32_t>(blockIdx.x - args.work.owner(int64_t{piece.tile} * args.blocks));
  piece.accumulate = args.accumulate;
  piece.units = args.work.first_unit(blockIdx.x + 1) - unit;
  piece.set_end(args.blocks);
  return piece;
}
__device__ __forceinline__ void next_piece(const TileArgs& args, TilePiece& piece) {
  piece.units -= piece.end - piece.begin;
  piece.accumulate = piece.end < args.blocks;
  if (piece.accumulate) {
    piece.begin = piece.end;
  } else {  // a new tile: no other block has worked on its first line blocks
    ++piece.tile;
    piece.begin = 0;
    piece.slice = 0;
    piece.accumulate = args.accumulate;
  }
  piece.set_end(args.blocks);
}

// In the first chunk, the block with the last piece of a tile clears the slices that the tile does
// not use.
template <int kThreads>
__device__ __forceinline__ void clear_slices(const TileArgs& args, const TilePiece& piece,
                                             int thread) {
  if (args.accumulate || piece.end < args.blocks) return;
  const int32_t end = args.tile_begin[piece.tile + 1];
  for (int32_t slice = piece.slice + 1; slice < args.slices; ++slice)
    for (int32_t e = args.tile_begin[piece.tile] + thread; e < end; e += kThreads)
      args.partial[slice * args.heavy_nnz + e] = 0;
}

// Keeps the listed nonzeros of a piece. Its products are in `sums`.
template <int kThreads, int kCols, int kStride>
__device__ __forceinline__ void sample_tile(const TileArgs& args, const TilePiece& piece,
                                            const float* sums, int thread) {
  float* partial = args.partial + piece.slice * args.heavy_nnz;
  const int32_t end = args.tile_begin[piece.tile + 1];
  for (int32_t e = args.tile_begin[piece.tile] + thread; e < end; e += kThreads) {
    const int32_t code = args.code[e];
    const float sum = sums[code / kCols * kStride + code % kCols];
    partial[e] = piece.accumulate ? partial[e] + sum : sum;
  }
  clear_slices<kThreads>(args, piece, thread);
}

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kMostBlocks)
    sddmm_tile_kernel(TileArgs args) {
  constexpr int kFragmentsA = Shape::kWarpEdge / 16, kFragmentsB = Shape::kWarpEdge / 8;
  ROSA_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int warp_row = warp / Shape::kWarpsAcross * Shape::kWarpEdge;
  const int warp_col = warp % Shape::kWarpsAcross * Shape::kWarpEdge;
  // The lines that this lane passes to ldmatrix. Fragments are multiples of 8 lines apart, so they
  // all have the same swizzle.
  const int line_a = warp_row + lane % 16, half_a = lane / 16;
  const int line_b = warp_col + lane % 8 + lane / 16 * 8, half_b = lane / 8 % 2;

  let_next_kernel_begin();
  wait_for_kernel_ahead();

  for (TilePiece piece = first_piece(args); piece.begin < piece.end; next_piece(args, piece)) {
    const int64_t first_row = int64_t{args.tile[2 * piece.tile]} * Shape::kRows;
    const int64_t first_col = int64_t{args.tile[2 * piece.tile + 1]} * Shape::kCols;
    const auto load = [&](int32_t block) {
      unsigned char* stage = shared + (block - piece.begin) % Shape::kStages * Shape::kStageBytes;
      load_run<Shape::kRows, Shape::kThreads>(
          stage, args.a + (int64_t{block} * args.padded_rows + first_row) * kLineBytes);
      load_run<Shape::kCols, Shape::kThreads>(
          stage + Shape::kRows * kLineBytes,
          args.b + (int64_t{block} * args.padded_cols + first_col) * kLineBytes);
    };

    float sums[kFragmentsA][kFragmentsB][4] = {};
#pragma unroll
    for (int32_t ahead = 0; ahead < Shape::kStages - 1; ++ahead) {
      if (piece.begin + ahead < piece.end) load(piece.begin + ahead);
      copy_async_commit();
    }
    for (int32_t block = piece.begin; block < piece.end; ++block) {
      copy_async_wait<Shape::kStages - 2>();
      // The stage of this line block has landed for every thread, and the previous stage is free.
      __syncthreads();
      if (block + Shape::kStages - 1 < piece.end) load(block + Shape::kStages - 1);
      copy_async_commit();
      const unsigned char* stage_a =
          shared + (block - piece.begin) % Shape::kStages * Shape::kStageBytes;
      const unsigned char* stage_b = stage_a + Shape::kRows * kLineBytes;
#pragma unroll
      for (int step = 0; step < kSegments / 2; ++step) {  // 16 tokens
        uint32_t a[kFragmentsA][4], b[kFragmentsB / 2][4];
#pragma unroll
        for (int i = 0; i < kFragmentsA; ++i)
          load_matrix_x4(a[i], stage_a + (line_a + i * 16) * kLineBytes +
                                   ((step * 2 + half_a) ^ (line_a % 8)) * kSegmentBytes);
#pragma unroll
        for (int j = 0; j < kFragmentsB / 2; ++j)
          load_matrix_x4(b[j], stage_b + (line_b + j * 16) * kLineBytes +
                                   ((step * 2 + half_b) ^ (line_b % 8)) * kSegmentBytes);
#pragma unroll
        for (int i = 0; i < kFragmentsA; ++i)
#pragma unroll
          for (int j = 0; j < kFragmentsB; ++j)
            mma_16x8x16<T>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
    copy_async_wait<0>();
    __syncthreads();  // the stages become the sampling area

    float* sampled = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int i = 0; i < kFragmentsA; ++i)
#pragma unroll
      for (int j = 0; j < kFragmentsB; ++j) {
        float* at = sampled + (warp_row + i * 16 + lane / 4) * Shape::kStride + warp_col + j * 8 +
                    lane % 4 * 2;
        *reinterpret_cast<float2*>(at) = make_float2(sums[i][j][0], sums[i][j][1]);
        *reinterpret_cast<float2*>(at + 8 * Shape::kStride) =
            make_float2(sums[i][j][2], sums[i][j][3]);
      }
    __syncthreads();
    sample_tile<Shape::kThreads, Shape::kCols, Shape::kStride>(args, piece, sampled, threadIdx.x);
    __syncthreads();  // the sampling area becomes stages again
  }
}

}  // namespace rosa::cuda
