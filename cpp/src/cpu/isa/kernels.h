// The task of one worker of sddmm and of spmm. The code for it is compiled once per instruction
// set.
#pragma once

#include <cstdint>

#include "rosa/ops.h"
#include "rosa/views.h"

namespace rosa::cpu {

// Rows of the second panel, called a chunk. It stays in the first-level cache between write and
// read.
constexpr int64_t kChunkRows = 128;
// Maximum tokens per block. A block is 16, 32 or 64 tokens wide.
constexpr int kMaxBlock = 64;

// Computes c[row_begin:row_end, token_begin:token_end] of spmm.
struct SpmmTask {
  CsrView pattern;
  const void* values;          // (nnz) in the accumulator's type, contiguous
  MatrixView b;                // (n, k)
  MatrixView c;                // (m, k)
  const uint8_t* active_cols;  // (n) whether a column has a nonzero in any row
  int64_t row_begin, row_end;
  int64_t token_begin, token_end;
  int block;
  void* panel;  // (n, kMaxBlock) of the accumulator's type, 64-byte aligned
  void* chunk;  // (kChunkRows, kMaxBlock), the same type and alignment
};

// Computes partial[t] = sum over [token_begin, token_end) for the entries t of [row_begin,
// row_end).
struct SddmmTask {
  CsrView pattern;
  MatrixView a;  // (m, k)
  MatrixView b;  // (n, k)
  const uint8_t* active_cols;
  int64_t row_begin, row_end;
  int64_t token_begin, token_end;
  int block;
  void* panel;
  void* chunk;
  void* partial;  // (nnz) of the accumulator's type
};

struct Kernels {
  void (*spmm)(const SpmmTask&);
  void (*sddmm)(const SddmmTask&);
};

extern const Kernels kPortableKernels;
#if ROSA_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// The table for `isa`. Throws std::invalid_argument if `isa` is not available.
const Kernels& kernels(Isa isa);

// Size of one core's second-level cache in bytes; 512 KiB if the system does not tell.
int64_t l2_bytes();

}  // namespace rosa::cpu
