// Checks that count failures instead of aborting, so that one run shows many failures.
#pragma once

#include <atomic>
#include <cstdio>
#include <string>

namespace rosa::test {

inline std::atomic<int> failures{0};

inline void fail(const char* file, int line, const char* text, const std::string& context) {
  // A broken kernel fails thousands of checks. The first 20 lines are enough to see why.
  if (failures++ < 20) {
    std::fprintf(stderr, "%s:%d: %s [%s]\n", file, line, text, context.c_str());
  }
}

inline int exit_status() {
  if (failures > 0) std::fprintf(stderr, "%d checks failed\n", failures.load());
  return failures > 0 ? 1 : 0;
}

}  // namespace rosa::test

// `context` is evaluated only on failure.
#define ROSA_CHECK(condition, context)                                          \
  do {                                                                          \
    if (!(condition)) {                                                         \
      ::rosa::test::fail(__FILE__, __LINE__, #condition, std::string(context)); \
    }                                                                           \
  } while (false)
