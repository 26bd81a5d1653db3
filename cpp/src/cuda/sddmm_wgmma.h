// The tiles of SDDMM by wgmma. They are compiled only for compute capability 9.0, in a file of
// their own. ROSA_HAS_WGMMA says whether this build has that file.
#pragma once

#include <stdexcept>

#include "cuda/sddmm_tile.cuh"
#include "rosa/views.h"

namespace rosa::cuda {

// The shape of one block of the kernel. Warps 0 to 7 multiply, and warp 8 fills the stages.
//
// A warpgroup of four warps multiplies 64 x 256. The sums take 128 registers of each thread. With
// nine warps, one of the four register files serves three warps, so that a thread may have 168
// registers. That is enough. A whole warpgroup of producers could move registers to the consumers
// (setmaxnreg), which would allow 240. It would take three more warps that do nothing.
struct WgmmaTile {
  static constexpr int kRows = 128, kCols = 256;
  static constexpr int kGroupThreads = 128, kGroupRows = 64;
  static constexpr int kGroups = kRows / kGroupRows;
  static constexpr int kConsumers = kGroups * kGroupThreads;
  static constexpr int kThreads = kConsumers + kWarp;
  // A stage has 48 KiB. One stage under way would cover L2's latency (32 KiB at 32 bytes per clock
  // and 1000 clocks, an estimate). The other stages are filled while the consumers sample.
  static constexpr int kStages = 4;
  static constexpr int kBytesA = kRows * kLineBytes, kBytesB = kCols * kLineBytes;
  static constexpr int kStageBytes = kBytesA + kBytesB;
  // A block may have 227 KiB, so 35 KiB are left. They hold a quarter of a tile's sums.
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
