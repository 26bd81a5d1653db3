#include <cstdint>
#include <cstring>

#include "rosa/check.h"
#include "rosa/ops.h"

namespace rosa::cpu {

// A counting sort by column in O(nnz + m + n). It is stable, so the rows of every column are
// sorted.
void csr_transpose(const CsrView& pattern, int32_t* crow_t, int32_t* col_t, int32_t* permutation) {
  check_pattern(pattern);
  std::memset(crow_t, 0, static_cast<size_t>(pattern.cols + 1) * sizeof(int32_t));
  for (int64_t t = 0; t < pattern.nnz; ++t) ++crow_t[pattern.col_indices[t] + 1];
  for (int64_t j = 0; j < pattern.cols; ++j) crow_t[j + 1] += crow_t[j];
  // crow_t[j] is the next free place of column j. It ends where column j + 1 starts.
  for (int64_t i = 0; i < pattern.rows; ++i) {
    for (int64_t t = pattern.crow_indices[i]; t < pattern.crow_indices[i + 1]; ++t) {
      const int32_t place = crow_t[pattern.col_indices[t]]++;
      col_t[place] = static_cast<int32_t>(i);
      permutation[place] = static_cast<int32_t>(t);
    }
  }
  for (int64_t j = pattern.cols; j > 0; --j) crow_t[j] = crow_t[j - 1];
  crow_t[0] = 0;
}

}  // namespace rosa::cpu
