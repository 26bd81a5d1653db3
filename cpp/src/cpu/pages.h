// Fewer page faults under large fresh buffers.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rosa::cpu {

// Asks for 2 MiB pages under [data, data + bytes), where the system leaves that to the program. A
// hint: contents, ownership and results do not change. Writing a fresh 32 MiB output through 4 KiB
// pages spends 8,192 faults, 12 ms where the product itself takes 5.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace rosa::cpu
