// Non-owning views, the arguments of every native entry point. They need neither torch nor
// pybind11.
#pragma once

#include <cstdint>

namespace rosa {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

constexpr int64_t item_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// CSR sparsity pattern: crow_indices[0] = 0, crow_indices[rows] = nnz, columns strictly increase
// within a row. The caller must have checked all of this. CsrPattern does so once.
struct CsrView {
  const int32_t* crow_indices;
  const int32_t* col_indices;
  int64_t rows;
  int64_t cols;
  int64_t nnz;
};

// Element (i, j) lies at data + i * row_stride + j * col_stride, with strides in elements. Any
// stride is legal for reading, 0 included. The first element must be aligned to its own size.
struct MatrixView {
  void* data;
  DType dtype;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
  int64_t col_stride;
};

struct VectorView {
  void* data;
  DType dtype;
  int64_t size;
  int64_t stride;
};

}  // namespace rosa
