// CUDA baselines and device limits for the benchmarks. Nothing else uses this header.
#pragma once

#include <cstdint>

#include "rosa/views.h"

namespace rosa::cuda::baselines {

using Stream = void*;  // a cudaStream_t

// Sparse products as in Gale et al., "Sparse GPU Kernels for Deep Learning", arXiv 2006.10901. This
// code is a new implementation, written from the paper. Dense operands are row-major and
// contiguous. Every array is aligned to 16 bytes. All share one dtype: float32, bfloat16 or
// float16. Elements are read in that dtype and summed in float32. `row_swizzle` (m) lists the rows
// by descending nnz, for balance.

// out[t] = <a[i_t, :], b[j_t, :]>. The grid covers the first `grid_rows` rows of the swizzle and
// the first `grid_entries` nonzeros of each of these rows. The published grid is (m, n). Smaller
// values trim it to the nonempty rows and the longest row. Entries outside the grid are not
// written.
void sputnik_style_sddmm(const CsrView& pattern, const int32_t* row_swizzle, int64_t grid_rows,
                         int64_t grid_entries, const MatrixView& a, const MatrixView& b,
                         const VectorView& out, int device, Stream stream);

// c = S b. All of c is written.
void sputnik_style_spmm(const CsrView& pattern, const int32_t* row_swizzle,
                        const VectorView& values, const MatrixView& b, const MatrixView& c,
                        int device, Stream stream);

// Reads `bytes` (a multiple of 16) `passes` times with `blocks` blocks of 512 threads, past L1. The
// kernel may write to the four bytes at `sink`.
void read_bandwidth(const void* data, int64_t bytes, int passes, int blocks, void* sink, int device,
                    Stream stream);

// Launches an empty kernel `count` times, one launch after the other.
void launch_empty(int count, int device, Stream stream);

}  // namespace rosa::cuda::baselines
