// The one way native code refuses its arguments.
#pragma once

#include <stdexcept>

#include "rosa/views.h"

namespace rosa {

// The public ops validate in Python with full context; this is the second fence, for native
// callers. Becomes ValueError in Python.
inline void check(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

// What of a pattern can be checked in no time: that its entries are the nnz ones the buffers hold.
inline void check_pattern(const CsrView& pattern) {
  check(pattern.crow_indices[0] == 0 && pattern.crow_indices[pattern.rows] == pattern.nnz,
        "expected crow_indices to run from 0 to nnz");
}

}  // namespace rosa
