// The tile kernel for compute capability 9.0: wgmma multiplies, and bulk copies load the operands.
//
// One warp only issues copies, up to four line blocks ahead, also across the ends of tiles. Two
// warpgroups multiply. A line block of a tile takes 1024 clocks of tensor cores. It takes 2048
// clocks of L2, at 5.5 TB/s for 132 multiprocessors (an estimate). The consumers spend about 2500
// clocks on sampling (an estimate). The stages fill up again in that time.
#pragma once

#include "cuda/sddmm_wgmma.h"

namespace rosa::cuda {

// A stage of the ring, and the number of completed rounds of the ring, modulo 2.
struct RingPlace {
  int stage = 0;
  uint32_t round = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == WgmmaTile::kStages) {
      stage = 0;
      round ^= 1;
    }
  }
};

// Shared memory of a block.
struct WgmmaShared {
  unsigned char* stages;  // A's run, then B's, swizzled like the panels, as wgmma reads them
  float* sample;          // kRows x kSampleCols
  uint64_t* full;         // per stage: its bytes have landed
  uint64_t* empty;        // per stage: every consumer warp is done with it

  __device__ __forceinline__ explicit WgmmaShared(unsigned char* shared)
      : stages(shared),
        sample(reinterpret_cast<float*>(shared + WgmmaTile::kStages * WgmmaTile::kStageBytes)),
        full(reinterpret_cast<uint64_t*>(shared + WgmmaTile::kStages * WgmmaTile::kStageBytes +
                                         WgmmaTile::kSampleBytes)),
        empty(full + WgmmaTile::kStages) {}
};

// The producer, which is one thread. Bulk copies write a stage and wgmma reads it. Both belong to
// the asynchronous proxy, so no proxy fence is needed between them.
__device__ __forceinline__ void fill_stages(const TileArgs& args, const WgmmaShared& shared) {
  RingPlace place;
  for (TilePiece piece = first_piece(args); piece.begin < piece.end; next_piece(args, piece)) {
    const int64_t step_a = int64_t{args.padded_rows} * kLineBytes;
    const int64_t step_b = int64_t{args.padded_cols} * kLineBytes;
    const unsigned char* a =
        args.a + piece.begin * step_a + int64_t{args.tile[2 * piece.tile]} * WgmmaTile::kBytesA;
    const unsigned char* b =
        args.b + piece.begin * step_b + int64_t{args.tile[2 * piece.tile + 1]} * WgmmaTile::kBytesB;
#pragma unroll 1
    for (int32_t block = piece.begin; block < piece.end; ++block) {
      unsigned char* stage = shared.stages + place.stage * WgmmaTile::kStageBytes;
      uint64_t* full = &shared.full[place.stage];
      mbarrier_wait(&shared.empty[place.stage], place.round ^ 1);
      mbarrier_expect_bytes(full, WgmmaTile::kStageBytes);
      copy_bulk_global_to_shared(stage, a, WgmmaTile::kBytesA, full);
      copy_bulk_global_to_shared(stage + WgmmaTile::kBytesA, b, WgmmaTile::kBytesB, full);
      a += step_a;
      b += step_b;
      place.advance();
    }
  }
}

// sums = the products of the next `blocks` line blocks in the ring, for this warpgroup's 64 rows.
// One group of wgmmas is under way while the next one is issued. Once the older group is done, its
// stage is given back. Every warp gives a stage back for itself, because wgmma_wait covers only the
// calling warp's products.
template <class T>
__device__ __forceinline__ void multiply(float (&sums)[128], const WgmmaShared& shared,
                                         RingPlace& place, int32_t blocks, int group,
                                         bool elected) {
  int before = 0;
#pragma unroll 1
  for (int32_t i = 0; i < blocks; ++i) {
    mbarrier_wait(&shared.full[place.stage], place.round);
    const unsigned char* stage = shared.stages + place.stage * WgmmaTile::kStageBytes;
    const unsigned char* a = stage + group * WgmmaTile::kGroupRows * kLineBytes;
    const unsigned char* b = stage + WgmmaTile::kBytesA;
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSegments / 2; ++step) {  // 16 tokens, 32 bytes of every line
      wgmma_64x256x16<T>(sums, swizzled_descriptor(a + step * 2 * kSegmentBytes),
                         swizzled_descriptor(b + step * 2 * kSegmentBytes), i > 0 || step > 0);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (elected && i > 0) mbarrier_arrive(&shared.empty[before]);
    before = place.stage;
    place.advance();
  }
  wgmma_wait<0>();
  if (elected) mbarrier_arrive(&shared.empty[before]);
}

// Keeps the listed nonzeros of a piece, a quarter of the tile's columns at a time. A tile has about
// 360 to 2000 of them. So a consumer thread reads two to eight codes for each quarter, and waits
// for L2 only once.
__device__ __forceinline__ void sample_quarters(const TileArgs& args, const TilePiece& piece,
                                                int32_t begin, int32_t count,
                                                const float (&sums)[128], float* sample) {
  constexpr int kBarrier = 1, kThreads = WgmmaTile::kConsumers;
  constexpr uint32_t kWidth = WgmmaTile::kSampleCols, kQuarters = WgmmaTile::kCols / kWidth;
  constexpr int kAhead = 4;  // codes that a thread loads at once
  constexpr uint32_t kNoCode = 1u << 31;
  const int thread = threadIdx.x, lane = thread % kWarp, row = thread / kWarp * 16 + lane / 4;
  // Half a warp stores to four rows of eight columns. The XOR puts these into different banks.
  // Padding would do the same, but takes 4 KiB that are not free.
  float* to = sample + row * kWidth + lane % 4 * 2;
  const int swizzle = row % 4 * 8;
  float* partial = args.partial + piece.slice * args.heavy_nnz + begin;
#pragma unroll 1
  for (uint32_t quarter = 0; quarter < kQuarters; ++quarter) {
    named_barrier_sync(kBarrier, kThreads);  // nobody reads the last quarter any more
#pragma unroll
    for (uint32_t q = 0; q < kQuarters; ++q) {  // registers cannot be indexed at run time
      if (q != quarter) continue;
#pragma unroll
      for (uint32_t j = 0; j < kWidth / 8; ++j) {
        const float* from = &sums[q * kWidth / 2 + 4 * j];
        float* at = to + j / 4 * 32 + (j % 4 * 8 ^ swizzle);
        *reinterpret_cast<float2*>(at) = make_float2(from[0], from[1]);
        *reinterpret_cast<float2*>(at + 8 * kWidth) = make_float2(from[2], from[3]);
      }
    }
    named_barrier_sync(kBarrier, kThreads);
    for (int32_t first = thread; first < count; first += kAhead * kThreads) {
      uint32_t code[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int32_t e = first + i * kThreads;
        code[i] = e < count ? static_cast<uint32_t>(args.code[begin + e]) : kNoCode;
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const uint32_t tile_row = code[i] / WgmmaTile::kCols, col = code[i] % kWidth;
        if ((code[i] & (kNoCode | (WgmmaTile::kCols - kWidth))) != quarter * kWidth) continue;
        const float sum = sample[tile_row * kWidth + (col ^ tile_row % 4 * 8)];
        float& kept = partial[first + i * kThreads];
        kept = piece.accumulate ? kept + sum : sum;
      }
    }
  }
  clear_slices<kThreads>(args, piece, thread);
}

template <class T>
__global__ void __launch_bounds__(WgmmaTile::kThreads, 1) sddmm_wgmma_kernel(TileArgs args) {
  ROSA_DYNAMIC_SHARED(bytes);
  const WgmmaShared shared(bytes);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < WgmmaTile::kStages; ++stage) {
      mbarrier_init(&shared.full[stage], 1);
      mbarrier_init(&shared.empty[stage], WgmmaTile::kConsumers / kWarp);
    }
    fence_barrier_init();
    // Bulk copies count their bytes through the asynchronous proxy. It sees the barriers only after
    // this fence.
    fence_proxy_async();
  }
  __syncthreads();
  let_next_kernel_begin();
  wait_for_kernel_ahead();

  if (threadIdx.x >= WgmmaTile::kConsumers) {
    if (threadIdx.x == WgmmaTile::kConsumers) fill_stages(args, shared);
    return;
  }
  const int group = threadIdx.x / WgmmaTile::kGroupThreads;
  const bool elected = threadIdx.x % kWarp == 0;
  RingPlace place;
  for (TilePiece piece = first_piece(args); piece.begin < piece.end; next_piece(args, piece)) {
    // Both are loaded now, so that they have arrived when the products are done.
    const int32_t begin = args.tile_begin[piece.tile];
    const int32_t count = args.tile_begin[piece.tile + 1] - begin;
    float sums[128];
    multiply<T>(sums, shared, place, piece.end - piece.begin, group, elected);
    sample_quarters(args, piece, begin, count, sums, shared.sample);
  }
}

}  // namespace rosa::cuda
