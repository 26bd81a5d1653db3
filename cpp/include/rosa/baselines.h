// What the benchmarks measure this library against and by, on CUDA. Nothing else uses it.
#pragma once

#include <cstdint>

#include "rosa/views.h"

namespace rosa::cuda::baselines {

using Stream = void*;  // a cudaStream_t

// Products as in Gale et al., "Sparse GPU Kernels for Deep Learning", arXiv 2006.10901, written
// anew from the paper. Dense operands are row-major and contiguous, every array is aligned to
// 16 bytes, and all share one dtype among float32, bfloat16 and float16, which are read as they are
// and summed in float32. `row_swizzle` (m) orders the rows, by descending nnz for balance.

// out[t] = <a[i_t, :], b[j_t, :]>. The grid covers the first `grid_rows` rows of the swizzle and
// the first `grid_entries` nonzeros of each: (m, n) as published, or trimmed to the nonempty rows
// and the longest one. What it does not cover is not written.
void sputnik_style_sddmm(const CsrView& pattern, const int32_t* row_swizzle, int64_t grid_rows,
                         int64_t grid_entries, const MatrixView& a, const MatrixView& b,
                         const VectorView& out, int device, Stream stream);

// c = S b, written completely.
void sputnik_style_spmm(const CsrView& pattern, const int32_t* row_swizzle,
                        const VectorView& values, const MatrixView& b, const MatrixView& c,
                        int device, Stream stream);

// Reads `bytes` (a multiple of 16) `passes` times, past L1, with `blocks` blocks of 512 threads.
// `sink` is four bytes that may be written to.
void read_bandwidth(const void* data, int64_t bytes, int passes, int blocks, void* sink, int device,
                    Stream stream);

// `count` launches, one after the other, of a kernel that does nothing.
void launch_empty(int count, int device, Stream stream);

}  // namespace rosa::cuda::baselines
