// Argument checks of the native code.
#pragma once

#include <stdexcept>

#include "rosa/views.h"

namespace rosa {

// Throws std::invalid_argument, which becomes ValueError in Python, unless `ok`. The public ops
// already validate in Python, with full context. This second check protects native callers.
inline void check(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

// Checks in constant time that the pattern's entries are the nnz entries that the buffers hold.
inline void check_pattern(const CsrView& pattern) {
  check(pattern.crow_indices[0] == 0 && pattern.crow_indices[pattern.rows] == pattern.nnz,
        "expected crow_indices to run from 0 to nnz");
}

}  // namespace rosa
