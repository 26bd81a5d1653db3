#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/parallel_for.h"
#include "cpu/partition.h"
#include "rosa/check.h"
#include "rosa/ops.h"

namespace rosa::cpu {
namespace {

// w + alpha * value in double, rounded to T. A 16-bit result is rounded to float first. Double is
// exact enough for every T, and costs nothing beside the scattered access.
template <class T>
T add(T w, double alpha, double value) {
  return Narrow<T>::from(static_cast<Accumulator<T>>(widen(w) + alpha * value));
}

template <class T, class V>
void add_rows(const MatrixView& w, const CsrView& pattern, const VectorView& values, double alpha,
              Range rows) {
  const int32_t* crow = pattern.crow_indices;
  const int32_t* col = pattern.col_indices;
  const V* from = static_cast<const V*>(values.data);
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    T* row = static_cast<T*>(w.data) + i * w.row_stride;
    if (i + 1 < rows.end)  // each entry is a cache miss: prefetch the next row
      for (int64_t t = crow[i + 1]; t < crow[i + 2]; ++t)
        __builtin_prefetch(row + w.row_stride + col[t] * w.col_stride, 1);
    for (int64_t t = crow[i]; t < crow[i + 1]; ++t) {
      T& element = row[col[t] * w.col_stride];
      element = add(element, alpha, widen(from[t * values.stride]));
    }
  }
}

}  // namespace

void csr_add_(const MatrixView& w, const CsrView& pattern, const VectorView& values, double alpha,
              int threads) {
  check_pattern(pattern);
  check(w.rows == pattern.rows && w.cols == pattern.cols,
        "csr_add_: expected w of the pattern's shape");
  check_values(values, w.dtype, pattern.nnz);
  // An entry costs a cache miss, which counts as 16 multiply-adds.
  const int workers = useful_threads(pattern.nnz * 16, threads);
  with_type(w.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(workers, [&](int worker) {
      const Range rows = rows_part_of(pattern, workers, worker);
      if (values.dtype == w.dtype) {
        add_rows<T, T>(w, pattern, values, alpha, rows);
      } else {
        add_rows<T, float>(w, pattern, values, alpha, rows);
      }
    });
  });
}

}  // namespace rosa::cpu
