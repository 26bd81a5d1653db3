// Every native entry. Shapes: the pattern is (m, n) with nnz entries t at (i_t, j_t). Where values
// may be float32 beside another dtype, that dtype is bfloat16 or float16.
#pragma once

#include <cstddef>
#include <cstdint>

#include "rosa/views.h"

namespace rosa::cpu {

// Instruction sets a kernel is built for. kPortable is plain C++ for any architecture.
enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// Whether this build holds `isa` and this machine can run it.
bool isa_available(Isa isa);

// Scratch a call needs, in bytes, for `threads` threads. Callers hand over a buffer of at least
// that size (any alignment), so that it is allocated and counted where the outputs are.
int64_t sddmm_workspace_bytes(const CsrView& pattern, int64_t k, DType dtype, int threads, Isa isa);
int64_t spmm_workspace_bytes(const CsrView& pattern, int64_t k, DType dtype, int threads, Isa isa);

// out[t] = sum_l a[i_t, l] * b[j_t, l]; a (m, k), b (n, k) of one dtype; out (nnz) of that dtype
// or float32. Accumulates in float32 (float64 for float64).
void sddmm(const CsrView& pattern, const MatrixView& a, const MatrixView& b, const VectorView& out,
           void* workspace, int threads, Isa isa);

// c[i, l] = sum_{t in row i} values[t] * b[j_t, l]; b (n, k) and c (m, k) of one dtype; values of
// that dtype or float32. c is written completely and may lie in either stride order.
void spmm(const CsrView& pattern, const VectorView& values, const MatrixView& b,
          const MatrixView& c, void* workspace, int threads, Isa isa);

// w[i_t, j_t] += alpha * values[t], rounded once; w (m, n) without internal overlap; values of
// w's dtype or float32.
void csr_add_(const MatrixView& w, const CsrView& pattern, const VectorView& values, double alpha,
              int threads);

// out[t] = w[i_t, j_t], in w's dtype; w may be any strided matrix.
void csr_gather(const MatrixView& w, const CsrView& pattern, const VectorView& out, int threads);

// w[i_t, j_t] = values[t], rounded where values are float32 beside another dtype, else bit for bit:
// what csr_gather read goes back. w (m, n) without internal overlap.
void csr_scatter_(const MatrixView& w, const CsrView& pattern, const VectorView& values,
                  int threads);

// The pattern of the transpose, and where its entries come from:
// values_t[s] = values[permutation[s]]. crow_t (n + 1), col_t and permutation (nnz).
void csr_transpose(const CsrView& pattern, int32_t* crow_t, int32_t* col_t, int32_t* permutation);

}  // namespace rosa::cpu
