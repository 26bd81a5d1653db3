// The emulator's version of every function of cuda/ptx.h. That header documents the functions.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/numeric.h"
#include "simt/emulator.h"

namespace rosa::simt {

uint32_t shared_address(const void* pointer, Where where);
void wait_for_kernel_ahead();
void load_matrix_x4(uint32_t* words, const void* row, bool transposed, Where where);
void mma_16x8x16(float* d, const uint32_t* a, const uint32_t* b, bool bf16, Where where);
void copy_async(void* shared, const void* global, int bytes, Where where);
void copy_async_commit();
void copy_async_wait(int groups);
void named_barrier(int barrier, int threads, bool wait, Where where);
void mbarrier_init(uint64_t* barrier, int arrivals, Where where);
void mbarrier_arrive(uint64_t* barrier, int bytes, Where where);
void mbarrier_wait(uint64_t* barrier, uint32_t parity, Where where);
void fence_proxy_async();
void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier, Where where);
void wgmma_fence(Where where);
void wgmma(float* d, int columns, uint64_t a, uint64_t b, bool accumulate, bool bf16, Where where);
void wgmma_commit(Where where);
void wgmma_wait(int groups, Where where);

}  // namespace rosa::simt

namespace rosa::cuda {

using simt::Where;

inline uint32_t shared_address(const void* pointer, Where where = Where::here()) {
  return simt::shared_address(pointer, where);
}
inline uint4 load_streaming(const uint4* from) { return *from; }

// Launches never overlap here. But every thread of a kernel that may begin early must still wait.
inline void let_next_kernel_begin() {}
inline void wait_for_kernel_ahead() { simt::wait_for_kernel_ahead(); }

inline void load_matrix_x4(uint32_t (&words)[4], const void* row, Where where = Where::here()) {
  simt::load_matrix_x4(words, row, false, where);
}
inline void load_matrix_x4_transposed(uint32_t (&words)[4], const void* row,
                                      Where where = Where::here()) {
  simt::load_matrix_x4(words, row, true, where);
}
template <class T>
inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                        Where where = Where::here()) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, Half>, "16-bit operands");
  const uint32_t b[2] = {b0, b1};
  simt::mma_16x8x16(d, a, b, std::is_same_v<T, Bf16>, where);
}

inline void copy_async_16(void* shared, const void* global, Where where = Where::here()) {
  simt::copy_async(shared, global, 16, where);
}
inline void copy_async_16(void* shared, const void* global, int bytes,
                          Where where = Where::here()) {
  simt::copy_async(shared, global, bytes, where);
}
inline void copy_async_commit() { simt::copy_async_commit(); }
template <int kGroups>
inline void copy_async_wait() {
  simt::copy_async_wait(kGroups);
}

inline void named_barrier_sync(int barrier, int threads, Where where = Where::here()) {
  simt::named_barrier(barrier, threads, true, where);
}
inline void named_barrier_arrive(int barrier, int threads, Where where = Where::here()) {
  simt::named_barrier(barrier, threads, false, where);
}

inline void mbarrier_init(uint64_t* barrier, int arrivals, Where where = Where::here()) {
  simt::mbarrier_init(barrier, arrivals, where);
}
inline void mbarrier_arrive(uint64_t* barrier, Where where = Where::here()) {
  simt::mbarrier_arrive(barrier, 0, where);
}
inline void mbarrier_expect_bytes(uint64_t* barrier, int bytes, Where where = Where::here()) {
  simt::mbarrier_arrive(barrier, bytes, where);
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity, Where where = Where::here()) {
  simt::mbarrier_wait(barrier, parity, where);
}
inline void fence_barrier_init() {}
// The emulator models only one effect of this fence: that bulk copies see initialised barriers.
inline void fence_proxy_async() { simt::fence_proxy_async(); }
inline void copy_bulk_global_to_shared(void* shared, const void* global, int bytes,
                                       uint64_t* barrier, Where where = Where::here()) {
  simt::copy_bulk(shared, global, bytes, barrier, where);
}

template <int kRegisters>
inline void register_budget_increase() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "setmaxnreg");
}
template <int kRegisters>
inline void register_budget_decrease() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "setmaxnreg");
}

inline uint64_t swizzled_descriptor(const void* operand, Where where = Where::here()) {
  const uint64_t address = simt::shared_address(operand, where);
  constexpr uint64_t kLeading = 1, kStride = 1024 / 16, kSwizzle128 = 1;
  return (address & 0x3ffff) >> 4 | kLeading << 16 | kStride << 32 | kSwizzle128 << 62;
}
inline void wgmma_fence(Where where = Where::here()) { simt::wgmma_fence(where); }
inline void wgmma_commit(Where where = Where::here()) { simt::wgmma_commit(where); }
template <int kGroups>
inline void wgmma_wait(Where where = Where::here()) {
  simt::wgmma_wait(kGroups, where);
}
template <class T>
inline void wgmma_64x128x16(float (&d)[64], uint64_t a, uint64_t b, bool accumulate,
                            Where where = Where::here()) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, Half>, "16-bit operands");
  simt::wgmma(d, 128, a, b, accumulate, std::is_same_v<T, Bf16>, where);
}
template <class T>
inline void wgmma_64x256x16(float (&d)[128], uint64_t a, uint64_t b, bool accumulate,
                            Where where = Where::here()) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, Half>, "16-bit operands");
  simt::wgmma(d, 256, a, b, accumulate, std::is_same_v<T, Bf16>, where);
}

}  // namespace rosa::cuda
