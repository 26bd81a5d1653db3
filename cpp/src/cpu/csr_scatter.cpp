#include <cstdint>
#include <type_traits>

#include "cpu/dtype.h"
#include "cpu/parallel_for.h"
#include "cpu/partition.h"
#include "rosa/check.h"
#include "rosa/ops.h"

namespace rosa::cpu {
namespace {

// Values of w's own type are copied without conversion, so NaN payloads survive.
template <class T, class V>
T to_element(V value) {
  if constexpr (std::is_same_v<T, V>) {
    return value;
  } else {
    return Narrow<T>::from(value);
  }
}

template <class T, class V>
void scatter_rows(const MatrixView& w, const CsrView& pattern, const VectorView& values,
                  Range rows) {
  const int32_t* crow = pattern.crow_indices;
  const int32_t* col = pattern.col_indices;
  const V* from = static_cast<const V*>(values.data);
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    T* row = static_cast<T*>(w.data) + i * w.row_stride;
    for (int64_t t = crow[i]; t < crow[i + 1]; ++t)
      row[col[t] * w.col_stride] = to_element<T>(from[t * values.stride]);
  }
}

}  // namespace

void csr_scatter_(const MatrixView& w, const CsrView& pattern, const VectorView& values,
                  int threads) {
  check_pattern(pattern);
  check(w.rows == pattern.rows && w.cols == pattern.cols,
        "csr_scatter_: expected w of the pattern's shape");
  check_values(values, w.dtype, pattern.nnz);
  // An entry costs a cache miss, which counts as 16 multiply-adds.
  const int workers = useful_threads(pattern.nnz * 16, threads);
  with_type(w.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(workers, [&](int worker) {
      const Range rows = rows_part_of(pattern, workers, worker);
      if (values.dtype == w.dtype) {
        scatter_rows<T, T>(w, pattern, values, rows);
      } else {
        scatter_rows<T, float>(w, pattern, values, rows);
      }
    });
  });
}

}  // namespace rosa::cpu
