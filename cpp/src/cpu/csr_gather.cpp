#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/parallel_for.h"
#include "cpu/partition.h"
#include "rosa/check.h"
#include "rosa/ops.h"

namespace rosa::cpu {

void csr_gather(const MatrixView& w, const CsrView& pattern, const VectorView& out, int threads) {
  check_pattern(pattern);
  check(w.rows == pattern.rows && w.cols == pattern.cols,
        "csr_gather: expected w of the pattern's shape");
  check(out.size == pattern.nnz, "csr_gather: expected out to have nnz elements");
  check(out.dtype == w.dtype, "csr_gather: expected out of w's dtype");
  const int workers = useful_threads(pattern.nnz * 16, threads);
  with_type(w.dtype, [&](auto type) {
    using T = decltype(type);
    T* to = static_cast<T*>(out.data);
    parallel_for(workers, [&](int worker) {
      const Range rows = rows_part_of(pattern, workers, worker);
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        const T* row = static_cast<const T*>(w.data) + i * w.row_stride;
        for (int64_t t = pattern.crow_indices[i]; t < pattern.crow_indices[i + 1]; ++t)
          to[t * out.stride] = row[pattern.col_indices[t] * w.col_stride];
      }
    });
  });
}

}  // namespace rosa::cpu
