// The instruction sets that this build and this machine have, and the size of the second-level
// cache.
#include <unistd.h>

#include "cpu/isa/kernels.h"
#include "rosa/check.h"
#include "rosa/ops.h"

namespace rosa::cpu {

bool isa_available(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return true;
#if ROSA_X86
    case Isa::kAvx2:
      // F16C is not tested: every CPU with AVX2 has it, and Clang 14 cannot test for it.
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::kAvx512:
      return isa_available(Isa::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512dq");
#endif
    default:
      return false;
  }
}

const Kernels& kernels(Isa isa) {
  check(isa_available(isa), "expected an instruction set that this machine and build have");
#if ROSA_X86
  if (isa == Isa::kAvx512) return kAvx512Kernels;
  if (isa == Isa::kAvx2) return kAvx2Kernels;
#endif
  return kPortableKernels;
}

int64_t l2_bytes() {
  // `reported` is 0 if the system does not tell: in containers, other C libraries, most of aarch64.
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const long reported = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  static const long reported = 0;
#endif
  return reported > 0 ? reported : 512 * 1024;
}

}  // namespace rosa::cpu
