// Kernels read a dense operand by index, as 128-byte lines of consecutive tokens.
#pragma once

#include "cuda/platform.h"
#include "rosa/views.h"

namespace rosa::cuda {

constexpr int kLineBytes = 128;
constexpr int kSegmentBytes = 16;  // the widest load of a thread
constexpr int kSegments = kLineBytes / kSegmentBytes;

template <class T>
constexpr int kTokensPerLine = kLineBytes / static_cast<int>(sizeof(T));

inline int64_t tokens_per_line(DType dtype) { return kLineBytes / item_size(dtype); }

// Line (block, index) holds the tokens [block * tokens_per_line, ...) of one row of the operand.
//
// A packed panel is [block][position][line]. Segment s of a line lies at s ^ (position & 7). A
// tile's operand for one block is then one contiguous run. ldmatrix reads it without bank
// conflicts, and wgmma calls this order a K-major 128-byte swizzle. An operand whose tokens are
// already contiguous is read in place, without swizzle.
struct Lines {
  const unsigned char* base;
  int64_t index_stride, block_stride;  // bytes
  int32_t swizzle;                     // 7 or 0
  int64_t segments;                    // valid ones along an index; a panel pads its last line

  __device__ __forceinline__ const uint4* segment(int64_t block, int32_t index, int32_t s) const {
    return reinterpret_cast<const uint4*>(base + index * index_stride + block * block_stride +
                                          ((s ^ (index & swizzle)) * kSegmentBytes));
  }
};

inline Lines panel_lines(const void* panel, int64_t padded, int64_t blocks) {
  return {static_cast<const unsigned char*>(panel), kLineBytes, kLineBytes * padded, 7,
          blocks * kSegments};
}

// Whether rows of `x` can be read as lines in place.
inline bool readable_in_place(const MatrixView& x) {
  const int64_t size = item_size(x.dtype);
  return x.col_stride == 1 && x.cols * size % kSegmentBytes == 0 &&
         x.row_stride * size % kSegmentBytes == 0 &&
         reinterpret_cast<uintptr_t>(x.data) % kSegmentBytes == 0;
}

inline Lines lines_in_place(const MatrixView& x) {
  const int64_t size = item_size(x.dtype);
  return {static_cast<const unsigned char*>(x.data), x.row_stride * size, kLineBytes, 0,
          x.cols * size / kSegmentBytes};
}

}  // namespace rosa::cuda
