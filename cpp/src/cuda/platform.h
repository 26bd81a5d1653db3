// Where kernels run: on a GPU when nvcc compiles them, in the SIMT emulator of the tests when a
// C++ compiler does (ROSA_SIMT=1). No other file here asks which of the two it is.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(ROSA_SIMT)
#include "simt/emulator.h"
#else
#include <cuda_runtime.h>
#endif

namespace rosa::cuda {

using Stream = void*;  // a cudaStream_t

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

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const Grid& grid, Args... args) {
  ::rosa::simt::launch(
      grid.blocks, grid.threads, grid.shared_bytes, [&] { kernel(args...); }, grid.early);
}

// The device of the calling thread for as long as it lives, then the one before.
class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
};

// Zeroes device memory, in stream order.
inline void fill_zero(void* data, int64_t bytes, Stream) {
  std::memset(data, 0, static_cast<size_t>(bytes));
}

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

// Up to this much dynamic shared memory needs no leave.
constexpr int64_t kDefaultSharedBytes = 48 * 1024;

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const Grid& grid, Args... args) {
  if (grid.shared_bytes > kDefaultSharedBytes) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(grid.shared_bytes)),
               "shared memory of a kernel");
  }
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
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), "kernel launch");
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

inline void fill_zero(void* data, int64_t bytes, Stream stream) {
  check_cuda(
      cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)),
      "cudaMemsetAsync");
}

#endif

}  // namespace rosa::cuda
