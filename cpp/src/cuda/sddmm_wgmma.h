// The tiles of SDDMM by wgmma: compiled for compute capability 9.0 alone, in a file of its own.
// ROSA_HAS_WGMMA says whether this build has that file.
#pragma once

#include <stdexcept>

#include "cuda/sddmm_tile.cuh"
#include "rosa/views.h"

namespace rosa::cuda {

// What one block of the kernel works with: warps 0 to 7 multiply, warp 8 fills the stages.
//
// A warpgroup of four warps multiplies 64 x 256, which takes 128 registers of each thread for the
// sums alone. Nine warps put three of them on one of the four register files, so that a thread may
// have 168. That is enough: moving registers from a whole warpgroup of producers to the consumers
// (setmaxnreg) would allow 240, for three warps more that do nothing.
struct WgmmaTile {
  static constexpr int kRows = 128, kCols = 256;
  static constexpr int kGroupThreads = 128, kGroupRows = 64;
  static constexpr int kGroups = kRows / kGroupRows;
  static constexpr int kConsumers = kGroups * kGroupThreads;
  static constexpr int kThreads = kConsumers + kWarp;
  // Stages of 48 KiB. One under way would cover L2's latency (32 KiB at 32 bytes a clock and 1000
  // clocks, an estimate); the others are filled while the consumers sample.
  static constexpr int kStages = 4;
  static constexpr int kBytesA = kRows * kLineBytes, kBytesB = kCols * kLineBytes;
  static constexpr int kStageBytes = kBytesA + kBytesB;
  // Of the 227 KiB that a block may have, 35 are left: room for a quarter of a tile's sums.
  static constexpr int kSampleCols = 64;
  static constexpr int kSampleBytes = kRows * kSampleCols * 4;
  static constexpr int kBarrierBytes = 2 * kStages * 8;
  static constexpr int kSharedBytes = kStages * kStageBytes + kSampleBytes + kBarrierBytes;
};

inline int64_t wgmma_shared_bytes() { return WgmmaTile::kSharedBytes; }

// Tiles of 128 x 256, for bfloat16 and float16.
#if ROSA_HAS_WGMMA || defined(ROSA_SIMT)
void launch_wgmma(const TileArgs& args, DType dtype, Stream stream, bool early = false);
#else
inline void launch_wgmma(const TileArgs&, DType, Stream, bool = false) {
  throw std::runtime_error(
      "sddmm: expected a build with the kernels for compute capability 9.0 (wgmma), got one "
      "without");
}
#endif

}  // namespace rosa::cuda
