// PTX instructions that C++ cannot express: matrix fragments, asynchronous copies, barriers in
// shared memory, wgmma. Each has one function. The emulator has the same functions (simt/ptx.h).
//
// Layouts are those of the PTX ISA. Pointers to shared memory are generic pointers.
#pragma once

#include <type_traits>

#include "cuda/numeric.h"

#if defined(ROSA_SIMT)

#include "simt/ptx.h"

#else

// SM90 marks instructions of compute capability 9.0 and newer, SM90A those of exactly 9.0. nvcc
// also reads kernels once without __CUDA_ARCH__, when it compiles for the host.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define ROSA_PTX_SM90 1
#endif
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ROSA_PTX_SM90A 1
#endif

namespace rosa::cuda {

// ---- addresses and loads --------------------------------------------------------------------

// The address of generic `pointer` in the shared window.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Loads bytes that are read only once. They are the first to be evicted from L1 and L2.
__device__ __forceinline__ uint4 load_streaming(const uint4* from) { return __ldcs(from); }

// ---- overlapping launches (sm_90; no effect elsewhere) ---------------------------------------

// Lets the next kernel begin once every block of this kernel has called this function. The next
// launch then costs no extra time. The next kernel decides what it may read before this kernel has
// ended.
__device__ __forceinline__ void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Returns when the previous kernel has ended and its writes can be read.
__device__ __forceinline__ void wait_for_kernel_ahead() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- matrix fragments (sm_80) ---------------------------------------------------------------

// ldmatrix loads four 8 x 8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of
// matrix l / 8, which has 16 bytes. Word q of lane l receives elements (l / 4, l % 4 * 2) and the
// next of matrix q. The transposed load gives the elements of the transpose.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}

// d (16 x 8, float32) += a (16 x 16, row-major) * b (16 x 8, column-major), T = Bf16 or Half.
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, Half>, "16-bit operands");
  if constexpr (std::is_same_v<T, Bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// ---- cp.async (sm_80) -----------------------------------------------------------------------

// Copies 16 bytes from global to shared memory, past L1. Both ends are 16-byte aligned.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(global)
               : "memory");
}
// Copies only the first `bytes` (0 to 16) and zeroes the rest. If `bytes` is 0, `global` is not
// read.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}
// Closes a group. It holds the copies issued since the last group was closed.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most the kGroups newest of this thread's groups are under way.
template <int kGroups>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// ---- named barriers (sm_80) -----------------------------------------------------------------

// Barriers 1 to 15, for `threads` threads of the block, a multiple of 32. Barrier 0 is
// __syncthreads.
__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

#if defined(ROSA_PTX_SM90)

// ---- mbarrier and bulk copies (sm_90) -------------------------------------------------------

// A barrier in shared memory. Its phase ends when `arrivals` threads have arrived and all announced
// bytes have landed. The next phase begins at once.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Arrives, and announces `bytes` of bulk copies in this phase.
__device__ __forceinline__ void mbarrier_expect_bytes(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Waits for the end of the phase of this parity: 0 for the first phase, 1 for the second, 0 again
// ... On a new barrier, the phase of parity 1 counts as ended.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@ended bra done;\n"
      "bra again;\n"
      "done:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// Call this after mbarrier_init, before other threads or bulk copies use the barriers.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Call this between a thread's own accesses to shared memory and later ones by bulk copies or
// wgmma.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Copies `bytes`, a multiple of 16, between 16-byte aligned addresses. They count towards
// `barrier`.
__device__ __forceinline__ void copy_bulk_global_to_shared(void* shared, const void* global,
                                                           int bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

#endif  // ROSA_PTX_SM90

#if defined(ROSA_PTX_SM90A)

// ---- wgmma (sm_90a) -------------------------------------------------------------------------

// Sets the registers per thread of a warpgroup from now on: a multiple of 8 from 24 to 256.
template <int kRegisters>
__device__ __forceinline__ void register_budget_increase() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "setmaxnreg");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void register_budget_decrease() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "setmaxnreg");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The descriptor of a K-major operand with the 128-byte swizzle, which begins at `operand`. Its
// rows have 128 bytes, and segment s of row r lies at s ^ (r % 8). Groups of eight rows are 1024
// bytes apart, and the first one is 1024-byte aligned. The next 16 columns of a row of 16-bit
// elements begin at `operand` + 32 bytes.
__device__ __forceinline__ uint64_t swizzled_descriptor(const void* operand) {
  const uint64_t address = shared_address(operand);
  constexpr uint64_t kLeading = 1;         // has no meaning in this layout
  constexpr uint64_t kStride = 1024 / 16;  // between groups of eight rows
  constexpr uint64_t kSwizzle128 = 1;
  return (address & 0x3ffff) >> 4 | kLeading << 16 | kStride << 32 | kSwizzle128 << 62;
}

// Call this between the last access to accumulators or shared memory and the wgmma that uses them.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most the kGroups newest groups are under way.
template <int kGroups>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// d (64 x N, float32) = a (64 x 16) * b (N x 16)^T, plus d if `accumulate`. Both operands are in
// shared memory, behind descriptors. T = Bf16 or Half. Warp w of the four holds rows 16 w to 16 w +
// 15. d[4 * j + 2 * i + c] of its lane l is row l / 4 + 8 * i, column 8 * j + l % 4 * 2 + c.

#define ROSA_IN_OUT_8(d, i)                                                                   \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define ROSA_IN_OUT_64(d, i)                                                        \
  ROSA_IN_OUT_8(d, i), ROSA_IN_OUT_8(d, i + 8), ROSA_IN_OUT_8(d, i + 16),           \
      ROSA_IN_OUT_8(d, i + 24), ROSA_IN_OUT_8(d, i + 32), ROSA_IN_OUT_8(d, i + 40), \
      ROSA_IN_OUT_8(d, i + 48), ROSA_IN_OUT_8(d, i + 56)
#define ROSA_WGMMA_128(type)                                                         \
  "{\n.reg .pred accumulate;\n"                                                      \
  "setp.ne.b32 accumulate, %66, 0;\n"                                                \
  "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                       \
  " {"                                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"   \
  "}, %64, %65, accumulate, 1, 1, 0, 0;\n}\n"
#define ROSA_WGMMA_256(type)                                                                       \
  "{\n.reg .pred accumulate;\n"                                                                    \
  "setp.ne.b32 accumulate, %130, 0;\n"                                                             \
  "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                     \
  " {"                                                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                         \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "               \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "               \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "               \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "               \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "               \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "   \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127" \
  "}, %128, %129, accumulate, 1, 1, 0, 0;\n}\n"

template <class T>
__device__ __forceinline__ void wgmma_64x128x16(float (&d)[64], uint64_t a, uint64_t b,
                                                bool accumulate) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, Half>, "16-bit operands");
  if constexpr (std::is_same_v<T, Bf16>) {
    asm volatile(ROSA_WGMMA_128("bf16")
                 : ROSA_IN_OUT_64(d, 0)
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  } else {
    asm volatile(ROSA_WGMMA_128("f16")
                 : ROSA_IN_OUT_64(d, 0)
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  }
}
template <class T>
__device__ __forceinline__ void wgmma_64x256x16(float (&d)[128], uint64_t a, uint64_t b,
                                                bool accumulate) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, Half>, "16-bit operands");
  if constexpr (std::is_same_v<T, Bf16>) {
    asm volatile(ROSA_WGMMA_256("bf16")
                 : ROSA_IN_OUT_64(d, 0), ROSA_IN_OUT_64(d, 64)
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  } else {
    asm volatile(ROSA_WGMMA_256("f16")
                 : ROSA_IN_OUT_64(d, 0), ROSA_IN_OUT_64(d, 64)
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  }
}

#undef ROSA_IN_OUT_8
#undef ROSA_IN_OUT_64
#undef ROSA_WGMMA_128
#undef ROSA_WGMMA_256

#endif  // ROSA_PTX_SM90A

}  // namespace rosa::cuda

#endif  // ROSA_SIMT
