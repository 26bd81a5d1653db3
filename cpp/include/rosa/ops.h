// Every CPU entry point. Shapes: the pattern is (m, n) with nnz entries t at (i_t, j_t). If values
// may be float32 beside another dtype, that dtype is bfloat16 or float16.
#pragma once

#include <cstddef>
#include <cstdint>

#include "rosa/views.h"

namespace rosa::cpu {

// Instruction sets for which the kernels are built. kPortable is plain C++ for any architecture.
enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// Whether this build has kernels for `isa` and this machine can run them.
bool isa_available(Isa isa);

// Scratch in bytes that a call with `threads` threads needs. The caller passes a buffer of at least
// that size, with any alignment. So scratch is allocated and counted in the same place as the
// outputs.
int64_t sddmm_workspace_bytes(const CsrView& pattern, int64_t k, DType dtype, int threads, Isa isa);
int64_t spmm_workspace_bytes(const CsrView& pattern, int64_t k, DType dtype, int threads, Isa isa);

// out[t] = sum_l a[i_t, l] * b[j_t, l]. Shapes: a (m, k), b (n, k), out (nnz). a and b have one
// dtype. out has that dtype or float32. Sums are taken in float32, or in float64 if that is the
// dtype of a and b.
void sddmm(const CsrView& pattern, const MatrixView& a, const MatrixView& b, const VectorView& out,
           void* workspace, int threads, Isa isa);

// c[i, l] = sum_{t in row i} values[t] * b[j_t, l]. Shapes: b (n, k), c (m, k), values (nnz). b and
// c have one dtype. values have that dtype or float32. All of c is written. c may have either
// stride order.
void spmm(const CsrView& pattern, const VectorView& values, const MatrixView& b,
          const MatrixView& c, void* workspace, int threads, Isa isa);

// w[i_t, j_t] += alpha * values[t], computed in float64 and then rounded to w's dtype. A 16-bit
// result is rounded to float32 first. w (m, n) must not overlap itself. values have w's dtype or
// float32.
void csr_add_(const MatrixView& w, const CsrView& pattern, const VectorView& values, double alpha,
              int threads);

// out[t] = w[i_t, j_t], in w's dtype. w may have any strides.
void csr_gather(const MatrixView& w, const CsrView& pattern, const VectorView& out, int threads);

// w[i_t, j_t] = values[t]. float32 values are rounded if w has another dtype. Values of w's dtype
// are copied bit by bit, so what csr_gather read is restored exactly. w (m, n) must not overlap
// itself.
void csr_scatter_(const MatrixView& w, const CsrView& pattern, const VectorView& values,
                  int threads);

// The pattern of the transpose, and the source of each of its entries: values_t[s] =
// values[permutation[s]]. Shapes: crow_t (n + 1), col_t (nnz), permutation (nnz).
void csr_transpose(const CsrView& pattern, int32_t* crow_t, int32_t* col_t, int32_t* permutation);

}  // namespace rosa::cpu
