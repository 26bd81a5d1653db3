// Misdeeds for which a sanitizer ends the process. A child process commits them: the test starts
// itself again.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

#include "../check.h"

#ifndef __has_feature
#define __has_feature(x) 0
#endif

namespace rosa::test {

enum class Sanitizer { kNone, kAddress, kThread };

#if defined(__SANITIZE_ADDRESS__) || __has_feature(address_sanitizer)
constexpr Sanitizer kSanitizer = Sanitizer::kAddress;
#elif defined(__SANITIZE_THREAD__) || __has_feature(thread_sanitizer)
constexpr Sanitizer kSanitizer = Sanitizer::kThread;
#else
constexpr Sanitizer kSanitizer = Sanitizer::kNone;
#endif

struct Misdeed {
  const char* name;
  Sanitizer catcher;
  int (*commit)();  // returns what it read, so that the read is not optimised away
};

constexpr int kUncaught = 42;

// The child calls this.
template <int kCount>
int commit(const Misdeed (&misdeeds)[kCount], const std::string& name) {
  for (const Misdeed& misdeed : misdeeds) {
    if (misdeed.name == name) {
      std::printf("%d\n", misdeed.commit());
      std::fflush(stdout);
      std::_Exit(kUncaught);
    }
  }
  return 1;
}

// The parent calls this.
template <int kCount>
void expect_caught(const Misdeed (&misdeeds)[kCount], const std::string& executable) {
  for (const Misdeed& misdeed : misdeeds) {
    if (misdeed.catcher != kSanitizer) continue;
    const std::string command =
        "TSAN_OPTIONS=halt_on_error=1 '" + executable + "' '" + misdeed.name + "' > /dev/null 2>&1";
    const int status = std::system(command.c_str());
    ROSA_CHECK(status != 0 && status != kUncaught << 8, misdeed.name);
  }
}

}  // namespace rosa::test
