// Runs CUDA kernels on the CPU. A C++ compiler compiles the text that nvcc compiles for a GPU. An
// operating-system thread runs one block at a time. The block's CUDA threads are fibers on it.
//
// A seed (set_seed) decides the order in which threads run. With seed 0 they run in order.
// Otherwise they run at random, so that warps drift apart and a missing barrier shows. Memory that
// a kernel may not rely on holds NaN. What is undefined on a GPU is an Error that names block,
// thread and line. Examples are a divergent barrier, a lane that a mask names but that does not
// come, and a deadlock. An address that is not shared memory and a launch beyond the limits are
// errors, too.
//
// The emulator does not model speed, caches, bank conflicts, or waiting for other blocks of the
// same launch. docs/emulator.md describes it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "simt/vector_types.h"

namespace rosa::simt {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A line of a kernel. The default argument `Where where = Where::here()` is the caller's line.
struct Where {
  const char* file;
  int line;
  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// ---- launches -------------------------------------------------------------------------------

// Sets the seed of launches by this operating-system thread. With 0, threads run in order. With any
// other seed they run at random.
void set_seed(uint64_t seed);
uint64_t seed();
// Sets how many blocks run at once in launches by this operating-system thread. 0 is the number of
// cores. Small grids always run on the calling thread.
void set_blocks_at_once(int blocks);

constexpr int64_t kMaxSharedBytes = 227 * 1024;  // of a block at compute capability 9.0
// The limit of the static part. It is also the limit of static and dynamic parts together, unless a
// launch is allowed more.
constexpr int64_t kDefaultSharedBytes = 48 * 1024;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxGridYZ = 65535;

// Sets how much shared memory the device gives a block, for launches by this operating-system
// thread. At first it is kMaxSharedBytes. Any device gives at least kDefaultSharedBytes. Returns
// the previous value.
int64_t set_shared_bytes(int64_t bytes);
// Lets this thread's next launch use all that the device gives. Other launches may use only
// kDefaultSharedBytes.
void allow_shared_memory();

struct KernelCall {
  void (*run)(const void* kernel);
  const void* kernel;
  bool early;  // every thread must call wait_for_kernel_ahead
};
void launch(dim3 blocks, dim3 threads, int64_t shared_bytes, KernelCall call);

// Runs kernel() for every thread, and returns when the grid is done.
template <class Kernel>
void launch(dim3 blocks, dim3 threads, int64_t shared_bytes, const Kernel& kernel,
            bool early = false) {
  const auto run = [](const void* kernel) { (*static_cast<const Kernel*>(kernel))(); };
  launch(blocks, threads, shared_bytes, KernelCall{run, &kernel, early});
}

// ---- what a running thread sees -------------------------------------------------------------

struct BlockIndex {
  uint3 index;
  dim3 dim, grid;
};
struct ThreadIndex {
  uint3 index;
  int linear;  // in the block
  const BlockIndex* block;
};
inline thread_local ThreadIndex* running = nullptr;

unsigned char* dynamic_shared();
void* static_shared(const void* declaration, int64_t bytes, Where where);

// `declaration` is a lambda expression, because every lambda has a type of its own.
template <class T, class Declaration>
T& static_shared(Declaration, Where where = Where::here()) {
  static_assert(std::is_trivially_default_constructible_v<T>, "shared memory is not initialised");
  static_assert(alignof(T) <= 16, "static shared memory is 16-byte aligned");
  static char identity;
  return *static_cast<T*>(static_shared(&identity, static_cast<int64_t>(sizeof(T)), where));
}

// ---- collectives ----------------------------------------------------------------------------

void sync_warp(uint32_t mask, Where where);
// __syncthreads. The second function returns to every thread the number of nonzero predicates.
void sync_threads(Where where);
int sync_threads_count(int predicate, Where where);

enum class ShuffleKind { kIndex, kUp, kDown, kXor };
uint64_t shuffle(ShuffleKind kind, uint32_t mask, uint64_t value, int operand, int width,
                 Where where);
uint32_t ballot(uint32_t mask, bool predicate, Where where);
uint32_t match_any(uint32_t mask, uint64_t value, Where where);
enum class ReduceKind { kAdd, kMin, kMax, kAnd, kOr, kXor };
uint64_t reduce(ReduceKind kind, bool is_signed, uint32_t mask, uint32_t value, Where where);

// Lets other threads run: at random in a random schedule, and in any schedule if `always`.
void yield(bool always);
void fence();
void trap(Where where);

template <class T>
T shuffle_any(ShuffleKind kind, uint32_t mask, T value, int operand, int width, Where where) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "a shuffle moves 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, operand, width, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
uint64_t bits_of(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

// Stores change(old) atomically, and returns old.
template <class T, class Change>
T atomic_change(T* address, Change change) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "32 or 64 bits");
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  yield(false);
  Bits* bits = reinterpret_cast<Bits*>(address);
  Bits before = __atomic_load_n(bits, __ATOMIC_RELAXED);
  for (;;) {
    T old;
    std::memcpy(&old, &before, sizeof(T));
    const T next = change(old);
    Bits after;
    std::memcpy(&after, &next, sizeof(T));
    if (__atomic_compare_exchange_n(bits, &before, after, false, __ATOMIC_RELAXED,
                                    __ATOMIC_RELAXED)) {
      return old;
    }
  }
}

}  // namespace rosa::simt

// ---- CUDA's names ---------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
// The emulator cannot learn the address of a plain array in a function.
#define __shared__ \
  static_assert(false, "declare shared memory with ROSA_SHARED(name, type), see platform.h");

#define threadIdx (::rosa::simt::running->index)
#define blockIdx (::rosa::simt::running->block->index)
#define blockDim (::rosa::simt::running->block->dim)
#define gridDim (::rosa::simt::running->block->grid)
constexpr int warpSize = 32;

inline void __syncthreads(rosa::simt::Where where = rosa::simt::Where::here()) {
  rosa::simt::sync_threads(where);
}
inline int __syncthreads_count(int predicate, rosa::simt::Where where = rosa::simt::Where::here()) {
  return rosa::simt::sync_threads_count(predicate, where);
}
inline int __syncthreads_or(int predicate, rosa::simt::Where where = rosa::simt::Where::here()) {
  return rosa::simt::sync_threads_count(predicate, where) > 0;
}
inline int __syncthreads_and(int predicate, rosa::simt::Where where = rosa::simt::Where::here()) {
  return rosa::simt::sync_threads_count(!predicate, where) == 0;
}
inline void __syncwarp(uint32_t mask = 0xffffffffu,
                       rosa::simt::Where where = rosa::simt::Where::here()) {
  rosa::simt::sync_warp(mask, where);
}

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32,
              rosa::simt::Where where = rosa::simt::Where::here()) {
  return rosa::simt::shuffle_any(rosa::simt::ShuffleKind::kIndex, mask, value, source, width,
                                 where);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                 rosa::simt::Where where = rosa::simt::Where::here()) {
  return rosa::simt::shuffle_any(rosa::simt::ShuffleKind::kUp, mask, value, static_cast<int>(delta),
                                 width, where);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                   rosa::simt::Where where = rosa::simt::Where::here()) {
  return rosa::simt::shuffle_any(rosa::simt::ShuffleKind::kDown, mask, value,
                                 static_cast<int>(delta), width, where);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32,
                  rosa::simt::Where where = rosa::simt::Where::here()) {
  return rosa::simt::shuffle_any(rosa::simt::ShuffleKind::kXor, mask, value, lanes, width, where);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate,
                              rosa::simt::Where where = rosa::simt::Where::here()) {
  return rosa::simt::ballot(mask, predicate != 0, where);
}
inline int __any_sync(uint32_t mask, int predicate,
                      rosa::simt::Where where = rosa::simt::Where::here()) {
  return rosa::simt::ballot(mask, predicate != 0, where) != 0;
}
inline int __all_sync(uint32_t mask, int predicate,
                      rosa::simt::Where where = rosa::simt::Where::here()) {
  return rosa::simt::ballot(mask, predicate != 0, where) == mask;
}
template <class T>
uint32_t __match_any_sync(uint32_t mask, T value,
                          rosa::simt::Where where = rosa::simt::Where::here()) {
  return rosa::simt::match_any(mask, rosa::simt::bits_of(value), where);
}
template <class T>
uint32_t __match_all_sync(uint32_t mask, T value, int* all,
                          rosa::simt::Where where = rosa::simt::Where::here()) {
  *all = rosa::simt::match_any(mask, rosa::simt::bits_of(value), where) == mask;
  return *all ? mask : 0;
}

#define ROSA_SIMT_REDUCE(name, kind, type, is_signed)                                          \
  inline type name(uint32_t mask, type value,                                                  \
                   rosa::simt::Where where = rosa::simt::Where::here()) {                      \
    return static_cast<type>(rosa::simt::reduce(rosa::simt::ReduceKind::kind, is_signed, mask, \
                                                static_cast<uint32_t>(value), where));         \
  }
ROSA_SIMT_REDUCE(__reduce_add_sync, kAdd, int, true)
ROSA_SIMT_REDUCE(__reduce_add_sync, kAdd, unsigned, false)
ROSA_SIMT_REDUCE(__reduce_min_sync, kMin, int, true)
ROSA_SIMT_REDUCE(__reduce_min_sync, kMin, unsigned, false)
ROSA_SIMT_REDUCE(__reduce_max_sync, kMax, int, true)
ROSA_SIMT_REDUCE(__reduce_max_sync, kMax, unsigned, false)
ROSA_SIMT_REDUCE(__reduce_and_sync, kAnd, unsigned, false)
ROSA_SIMT_REDUCE(__reduce_or_sync, kOr, unsigned, false)
ROSA_SIMT_REDUCE(__reduce_xor_sync, kXor, unsigned, false)
#undef ROSA_SIMT_REDUCE

inline void __threadfence() { rosa::simt::fence(); }
inline void __threadfence_block() { rosa::simt::fence(); }
inline void __nanosleep(unsigned) { rosa::simt::yield(true); }
inline void __trap(rosa::simt::Where where = rosa::simt::Where::here()) { rosa::simt::trap(where); }

template <class T>
T atomicAdd(T* address, T value) {
  return rosa::simt::atomic_change(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicSub(T* address, T value) {
  return rosa::simt::atomic_change(address, [=](T old) { return static_cast<T>(old - value); });
}
template <class T>
T atomicMin(T* address, T value) {
  return rosa::simt::atomic_change(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicMax(T* address, T value) {
  return rosa::simt::atomic_change(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicAnd(T* address, T value) {
  return rosa::simt::atomic_change(address, [=](T old) { return static_cast<T>(old & value); });
}
template <class T>
T atomicOr(T* address, T value) {
  return rosa::simt::atomic_change(address, [=](T old) { return static_cast<T>(old | value); });
}
template <class T>
T atomicXor(T* address, T value) {
  return rosa::simt::atomic_change(address, [=](T old) { return static_cast<T>(old ^ value); });
}
template <class T>
T atomicExch(T* address, T value) {
  return rosa::simt::atomic_change(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, T expected, T value) {
  return rosa::simt::atomic_change(
      address, [=](T old) { return std::memcmp(&old, &expected, sizeof(T)) == 0 ? value : old; });
}

// Loads and stores with cache hints, which the emulator ignores.
template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T>
T __ldca(const T* from) {
  return *from;
}
template <class T>
void __stcs(T* to, T value) {
  *to = value;
}
template <class T>
void __stcg(T* to, T value) {
  *to = value;
}

constexpr int __popc(unsigned x) { return __builtin_popcount(x); }
constexpr int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
constexpr int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
constexpr int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
constexpr int __ffs(int x) { return __builtin_ffs(x); }
constexpr int __ffsll(long long x) { return __builtin_ffsll(x); }
constexpr unsigned __umulhi(unsigned x, unsigned y) {
  return static_cast<unsigned>(static_cast<uint64_t>(x) * y >> 32);
}
// Selects four of the eight bytes of y:x. The low three bits of each hexadecimal digit of the
// selector name a byte.
constexpr unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned from = selector >> (4 * i) & 7;
    result |= static_cast<unsigned>(bytes >> (8 * from) & 0xff) << (8 * i);
  }
  return result;
}

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fmaf(x, y, z); }

// CUDA's min and max take two numbers of any types.
template <class X, class Y>
constexpr std::common_type_t<X, Y> min(X x, Y y) {
  using Both = std::common_type_t<X, Y>;
  return static_cast<Both>(y) < static_cast<Both>(x) ? static_cast<Both>(y) : static_cast<Both>(x);
}
template <class X, class Y>
constexpr std::common_type_t<X, Y> max(X x, Y y) {
  using Both = std::common_type_t<X, Y>;
  return static_cast<Both>(x) < static_cast<Both>(y) ? static_cast<Both>(y) : static_cast<Both>(x);
}
