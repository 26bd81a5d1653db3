// pack turns a dense operand of any strides into a panel (lines.h), permuted by the plan.
//
// Gathering a column of a token-major matrix costs 16 times its bytes, because DRAM and L2 deliver
// 32 bytes at a time. So pack reads the operand once, coalesced, and transposes it on the way. It
// reads only sectors that hold an active index. In a v_proj mask 97 % of the columns are empty.
#pragma once

#include "cuda/lines.h"
#include "cuda/numeric.h"
#include "cuda/ptx.h"
#include "rosa/tile_plan.h"

namespace rosa::cuda {

constexpr int kPackThreads = 256;
constexpr int kPackIndices = 128;   // indices of one block: eight sectors
constexpr int kPackPositions = 32;  // positions of one block that copies lines: eight segments each

// One operand of a pack. Null arrays stand for the identity.
struct PackSide {
  const void* source;
  int64_t row_stride, token_stride;  // elements
  unsigned char* panel;
  int32_t padded;  // positions of the panel
  int32_t size;    // rows of the operand
  int32_t active;  // positions to fill
  int32_t sectors;
  const int32_t* position;  // (size)
  const int32_t* order;     // (active)
  const int32_t* sector;    // (sectors)
  bool token_major;         // row stride 1: transposed through shared memory
  bool aligned;             // 16-byte loads are possible along the contiguous dimension
  int32_t groups;           // blocks along x
};

// Describes the pack of the rows of `x` in the order of `axis`. A null `axis` keeps all rows in
// their own order.
inline PackSide pack_side(const MatrixView& x, const PlanAxis* axis, void* panel) {
  const int64_t size = item_size(x.dtype);
  PackSide side = {};
  side.source = x.data;
  side.row_stride = x.row_stride;
  side.token_stride = x.col_stride;
  side.panel = static_cast<unsigned char*>(panel);
  side.size = static_cast<int32_t>(x.rows);
  if (axis != nullptr) {
    side.padded = axis->padded;
    side.active = axis->active;
    side.sectors = axis->sectors;
    side.position = axis->position;
    side.order = axis->order;
    side.sector = axis->sector;
  } else {
    side.padded = side.active = side.size;
    side.sectors = (side.size + kSector - 1) / kSector;
  }
  side.token_major = x.row_stride == 1 && x.col_stride != 1;
  const int64_t across = side.token_major ? x.col_stride : x.row_stride;
  side.aligned = (side.token_major || x.col_stride == 1) && across * size % kSegmentBytes == 0 &&
                 reinterpret_cast<uintptr_t>(x.data) % kSegmentBytes == 0;
  constexpr int kGroupSectors = kPackIndices / kSector;
  side.groups = side.token_major ? (side.sectors + kGroupSectors - 1) / kGroupSectors
                                 : (side.active + kPackPositions - 1) / kPackPositions;
  return side;
}

// Loads one segment: kSegmentBytes / sizeof(Word) words, `stride` apart. Words past `count` are
// zero.
template <class Word>
__device__ __forceinline__ uint4 load_segment(const Word* from, int64_t stride, int64_t count,
                                              bool vector) {
  constexpr int kWords = kSegmentBytes / sizeof(Word);
  if (vector && count >= kWords) return load_streaming(reinterpret_cast<const uint4*>(from));
  uint32_t w[4] = {0, 0, 0, 0};
#pragma unroll
  for (int j = 0; j < kWords; ++j) {
    if (j >= count) continue;
    constexpr int kPerRegister = 4 / sizeof(Word);
    w[j / kPerRegister] |= static_cast<uint32_t>(from[j * stride]) << (j % kPerRegister * 16);
  }
  return make_uint4(w[0], w[1], w[2], w[3]);
}

// The address of segment `s` of position p in a panel.
__device__ __forceinline__ uint4* panel_segment(const PackSide& side, int64_t block, int32_t p,
                                                int32_t s) {
  return reinterpret_cast<uint4*>(side.panel + (block * side.padded + p) * kLineBytes +
                                  (s ^ (p & 7)) * kSegmentBytes);
}

// For contiguous tokens, or if no dimension is contiguous. Eight threads copy the line of one
// position.
template <class Word>
__device__ __forceinline__ void copy_lines(const PackSide& side, int32_t group, int64_t block,
                                           int64_t first, int64_t tokens) {
  constexpr int kWords = kSegmentBytes / sizeof(Word);
  const int32_t p = group * kPackPositions + threadIdx.x / kSegments, s = threadIdx.x % kSegments;
  if (p >= side.active) return;
  const int64_t row = side.order != nullptr ? side.order[p] : p;
  const int64_t token = (block * kSegments + s) * kWords;
  const Word* from = static_cast<const Word*>(side.source) + row * side.row_stride +
                     (first + token) * side.token_stride;
  // Vectors start at the chunk's first token. That is a multiple of a line, so a vector is aligned
  // if its row is.
  *panel_segment(side, block, p, s) =
      load_segment(from, side.token_stride, tokens - token, side.aligned);
}

// For 16-bit words with row stride 1. One ldmatrix.x4.trans transposes 32 tokens x 8 rows. The rows
// of its four 8 x 8 matrices are permuted: row i of matrix q is token 8 * (i / 2) + 2 * q + i % 2.
// So each lane receives eight consecutive tokens of one row, which are a whole segment.
__device__ __forceinline__ void transpose_to_lines(const PackSide& side, const unsigned char* tile,
                                                   const int32_t* position, int64_t block,
                                                   uint16_t) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int matrix = lane / 8, row = lane % 8;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int unit = warp * 4 + i, octet = unit / 2, half = unit % 2;  // 8 rows, 32 tokens
    const int token = half * 32 + 8 * (row / 2) + 2 * matrix + row % 2;
    uint32_t words[4];
    load_matrix_x4_transposed(words, tile + token * 256 + ((octet ^ row) * kSegmentBytes));
    const int32_t p = position[octet * 8 + lane / 4];
    if (p >= 0)
      *panel_segment(side, block, p, half * 4 + lane % 4) =
          make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// For 32-bit words with row stride 1. Four reads of one word each make a segment.
__device__ __forceinline__ void transpose_to_lines(const PackSide& side, const unsigned char* tile,
                                                   const int32_t* position, int64_t block,
                                                   uint32_t) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(tile);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int unit = threadIdx.x + i * kPackThreads;
    const int s = unit % kSegments, row = unit / kSegments;
    const int32_t p = position[row];
    if (p < 0) continue;
    // The same XOR of whole segments with token / 4 as when the tile was written (tile_segment).
    const uint32_t* at = words + 4 * s * kPackIndices + ((row / 4) ^ s) * 4 + row % 4;
    *panel_segment(side, block, p, s) =
        make_uint4(at[0], at[kPackIndices], at[2 * kPackIndices], at[3 * kPackIndices]);
  }
}

// The segment of a tile row that holds the words of segment `s` of token `token`. With this order
// neither writing nor transposing has bank conflicts.
__device__ __forceinline__ int tile_segment(int s, int token, uint16_t) {
  return s ^ ((token & 1) | ((token >> 3) & 3) << 1);
}
__device__ __forceinline__ int tile_segment(int s, int token, uint32_t) {
  return s ^ ((token >> 2) & 7);
}

// Packs tokens [first, first + tokens) of up to two operands. Blocks: (a.groups + b.groups, lines).
template <class Word>
__global__ void __launch_bounds__(kPackThreads)
    pack_kernel(PackSide a, PackSide b, int64_t first, int64_t tokens) {
  constexpr int kTokens = kLineBytes / sizeof(Word);
  constexpr int kWords = kSegmentBytes / sizeof(Word);
  constexpr int kTokenBytes = kPackIndices * sizeof(Word);
  constexpr int kTokenSegments = kTokenBytes / kSegmentBytes;
  ROSA_SHARED(tile, unsigned char[kTokens * kTokenBytes]);
  ROSA_SHARED(position, int32_t[kPackIndices]);

  let_next_kernel_begin();
  wait_for_kernel_ahead();
  const bool is_a = static_cast<int32_t>(blockIdx.x) < a.groups;
  const PackSide side = is_a ? a : b;
  const int32_t group = is_a ? blockIdx.x : blockIdx.x - a.groups;
  const int64_t block = blockIdx.y;
  if (!side.token_major) {
    copy_lines<Word>(side, group, block, first, tokens);
    return;
  }

  const int tid = threadIdx.x;
  const auto index_of = [&](int i) {  // the i-th index of this block, or one past the last
    const int32_t s = group * (kPackIndices / kSector) + i / kSector;
    if (s >= side.sectors) return side.size;
    return (side.sector != nullptr ? side.sector[s] : s) * kSector + i % kSector;
  };
  if (tid < kPackIndices) {
    const int32_t index = index_of(tid);
    int32_t p = -1;
    if (index < side.size) p = side.position != nullptr ? side.position[index] : index;
    position[tid] = p;
  }
  constexpr int kLoads = kTokens * kTokenSegments / kPackThreads;
  static_assert(kLoads == 4, "a thread keeps four loads in flight");
  const int s = tid % kTokenSegments;
  const int32_t index = index_of(s * kWords);
  uint4 loaded[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int64_t token = block * kTokens + tid / kTokenSegments + i * (kTokens / kLoads);
    const int64_t count = token < tokens ? int64_t{side.size} - index : 0;
    loaded[i] = load_segment(
        static_cast<const Word*>(side.source) + index + (first + token) * side.token_stride, 1,
        count, side.aligned);
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int token = tid / kTokenSegments + i * (kTokens / kLoads);
    *reinterpret_cast<uint4*>(tile + token * kTokenBytes +
                              tile_segment(s, token, Word{}) * kSegmentBytes) = loaded[i];
  }
  __syncthreads();
  transpose_to_lines(side, tile, position, block, Word{});
}

// Launches the pack of one chunk. A side without groups is left out. `early` is as in Grid.
inline void pack(const PackSide& a, const PackSide& b, DType dtype, int64_t first, int64_t tokens,
                 Stream stream, bool early = false) {
  const int64_t per_line = tokens_per_line(dtype);
  const unsigned blocks = static_cast<unsigned>(a.groups + b.groups);
  if (blocks == 0 || tokens == 0) return;
  const Grid grid = {dim3(blocks, static_cast<unsigned>((tokens + per_line - 1) / per_line)),
                     dim3(kPackThreads), 0, stream, early};
  if (item_size(dtype) == 2) {
    launch<pack_kernel<uint16_t>>(grid, a, b, first, tokens);
  } else {
    launch<pack_kernel<uint32_t>>(grid, a, b, first, tokens);
  }
}

}  // namespace rosa::cuda
