// The one way native code refuses its arguments.
#pragma once

#include <stdexcept>
#include <string>

namespace rosa {

// The public ops validate in Python with full context; this is the second fence, for native
// callers. Becomes ValueError in Python.
inline void check(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

}  // namespace rosa
