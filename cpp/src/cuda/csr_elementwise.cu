// csr_add_, csr_gather and csr_scatter_: one kernel launch each.
#include "cuda/csr_entries.cuh"
#include "cuda/dispatch.h"
#include "rosa/cuda.h"

namespace rosa::cuda {
namespace {

EntryArgs entry_args(const MatrixView& w, const CsrView& pattern, const VectorView& values) {
  return {pattern.crow_indices, pattern.col_indices, pattern.rows, pattern.nnz,  w.data,
          w.row_stride,         w.col_stride,        values.data,  values.stride};
}

Grid entry_grid(const CsrView& pattern, Stream stream) {
  const int64_t blocks = (pattern.nnz + kEntriesPerBlock - 1) / kEntriesPerBlock;
  return {dim3(static_cast<unsigned>(blocks)), dim3(kEntryWarps * kWarp), 0, stream};
}

}  // namespace

void csr_add_(const MatrixView& w, const CsrView& pattern, const VectorView& values, double alpha,
              int device, Stream stream) {
  check(w.rows == pattern.rows && w.cols == pattern.cols,
        "csr_add_: expected w of the pattern's shape");
  check_values(values, w.dtype, pattern.nnz);
  with_float(w.dtype, [&](auto type) {
    using T = decltype(type);
    if (pattern.nnz == 0) return;
    const DeviceGuard guard(device);
    const EntryArgs args = entry_args(w, pattern, values);
    const Grid grid = entry_grid(pattern, stream);
    if (values.dtype == w.dtype) {
      launch<csr_add_kernel<T, T>>(grid, args, alpha);
    } else {
      launch<csr_add_kernel<T, float>>(grid, args, alpha);
    }
  });
}

void csr_gather(const MatrixView& w, const CsrView& pattern, const VectorView& out, int device,
                Stream stream) {
  check(w.rows == pattern.rows && w.cols == pattern.cols,
        "csr_gather: expected w of the pattern's shape");
  check(out.size == pattern.nnz, "csr_gather: expected out to have nnz elements");
  check(out.dtype == w.dtype, "csr_gather: expected out of w's dtype");
  check(w.dtype != DType::kFloat64, "csr_gather: expected float32, bfloat16 or float16 on CUDA");
  if (pattern.nnz == 0) return;
  const DeviceGuard guard(device);
  const EntryArgs args = entry_args(w, pattern, out);
  const Grid grid = entry_grid(pattern, stream);
  if (item_size(w.dtype) == 4) {
    launch<csr_gather_kernel<uint32_t>>(grid, args);
  } else {
    launch<csr_gather_kernel<uint16_t>>(grid, args);
  }
}

void csr_scatter_(const MatrixView& w, const CsrView& pattern, const VectorView& values, int device,
                  Stream stream) {
  check(w.rows == pattern.rows && w.cols == pattern.cols,
        "csr_scatter_: expected w of the pattern's shape");
  check_values(values, w.dtype, pattern.nnz);
  check(w.dtype != DType::kFloat64, "csr_scatter_: expected float32, bfloat16 or float16 on CUDA");
  if (pattern.nnz == 0) return;
  const DeviceGuard guard(device);
  const EntryArgs args = entry_args(w, pattern, values);
  const Grid grid = entry_grid(pattern, stream);
  if (w.dtype == DType::kFloat32) {
    launch<csr_scatter_kernel<uint32_t, uint32_t>>(grid, args);
  } else if (values.dtype == w.dtype) {
    launch<csr_scatter_kernel<uint16_t, uint16_t>>(grid, args);
  } else if (w.dtype == DType::kBFloat16) {
    launch<csr_scatter_kernel<Bf16, float>>(grid, args);
  } else {
    launch<csr_scatter_kernel<Half, float>>(grid, args);
  }
}

}  // namespace rosa::cuda
