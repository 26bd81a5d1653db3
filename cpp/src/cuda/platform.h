// Where kernels run: on a GPU when nvcc compiles them, in the SIMT emulator of the tests when a
// C++ compiler does (ROSA_SIMT=1). No other file here asks which of the two it is.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "rosa/cuda.h"

#if defined(ROSA_SIMT)
#include "simt/emulator.h"
#else
#include <cuda_runtime.h>
#endif

namespace rosa::cuda {

constexpr int kWarp = 32;

struct Grid {
  dim3 blocks, threads;
  int64_t shared_bytes = 0;  // dynamic shared memory
  Stream stream = nullptr;
  // From compute capability 9.0 on: the kernel may begin before the one ahead of it in the stream
  // has ended, and calls wait_for_kernel_ahead() (ptx.h) before it touches global memory.
  bool early = false;
};

// A type as a template argument can hold it: `Type<float[4][32]> x` declares an array.
template <class T>
using Type = T;

#if defined(ROSA_SIMT)

// ROSA_DYNAMIC_SHARED(name) declares `unsigned char* name`, a block's dynamic shared memory,
// 1024-byte aligned. ROSA_SHARED(name, T[4][8]) declares an array (or anything) in static shared
// memory, 16-byte aligned. Both say where it is, which __shared__ does not: the emulator fills them
// with NaN before every block and sees accesses past their ends.
#define ROSA_DYNAMIC_SHARED(name) unsigned char* const name = ::rosa::simt::dynamic_shared()
#define ROSA_SHARED(name, ...) \
  auto& name = ::rosa::simt::static_shared<::rosa::cuda::Type<__VA_ARGS__>>([] {})

// The next launch may use all shared memory of the device. On a GPU the permission lasts; here
// every launch is as the first of a process.
template <auto kKernel>
void allow_shared_memory() {
  ::rosa::simt::allow_shared_memory();
}

template <auto kKernel, class... Args>
void start(const Grid& grid, Args... args) {
  ::rosa::simt::launch(
      grid.blocks, grid.threads, grid.shared_bytes, [&] { kKernel(args...); }, grid.early);
}

// The device of the calling thread for as long as it lives, then the one before.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device)
      : before_(::rosa::simt::set_shared_bytes(properties(device).shared_bytes)) {}
  ~DeviceGuard() { ::rosa::simt::set_shared_bytes(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int64_t before_;
};

#else

#define ROSA_DYNAMIC_SHARED(name)                                               \
  extern __shared__ __align__(1024) unsigned char rosa_dynamic_shared_memory[]; \
  unsigned char* const name = rosa_dynamic_shared_memory
#define ROSA_SHARED(name, ...) __shared__ __align__(16)::rosa::cuda::Type<__VA_ARGS__> name

// Errors of the launch itself. cudaGetLastError clears the code, so that the next caller, who may
// be another library, does not take it for its own.
inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ")");
}

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// Lets a kernel have as much dynamic shared memory as a block of the current device may have beside
// the kernel's static part. The limit belongs to the kernel, not to a launch: were it set to what
// each launch needs, a thread could lower it between another thread's setting and its launch.
template <auto kKernel>
void allow_shared_memory() {
  static std::atomic<uint64_t> allowed{0};  // by device; from 64 on they are asked every time
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (allowed.load(std::memory_order_relaxed) & bit) return;
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, kKernel), "cudaFuncGetAttributes");
  const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) -
                   static_cast<int>(attributes.sharedSizeBytes);
  check_cuda(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
             "dynamic shared memory of a kernel");
  allowed.fetch_or(bit, std::memory_order_relaxed);  // two threads may both have set it: the same
}

template <auto kKernel, class... Args>
void start(const Grid& grid, Args... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid.blocks;
  config.blockDim = grid.threads;
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = static_cast<cudaStream_t>(grid.stream);
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  if (grid.early) {
    config.attrs = &early;
    config.numAttrs = 1;
  }
  // Unlike <<<>>> this returns the launch's own error, not one that somebody left behind.
  check_cuda(cudaLaunchKernelEx(&config, kKernel, args...), "kernel launch");
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check_cuda(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

#endif

// Runs a kernel. It is a template argument so that each has its own record of permissions.
template <auto kKernel, class... Args>
void launch(const Grid& grid, Args... args) {
  // Without permission a block has 48 KiB, static and dynamic shared memory together. Only the
  // compiler knows how much of that is static (12 to 19 KiB of spmm_staged). So every kernel with
  // dynamic shared memory asks, however small it is.
  if (grid.shared_bytes > 0) allow_shared_memory<kKernel>();
  start<kKernel>(grid, args...);
}

}  // namespace rosa::cuda
