// Where kernels run. nvcc compiles them for a GPU. A C++ compiler with ROSA_SIMT=1 compiles them
// for the SIMT emulator of the tests. Besides this file, only numeric.h, ptx.h, device.cu and
// sddmm_wgmma.h ask which of the two it is.
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
  // Has an effect from compute capability 9.0 on. The kernel may begin before the previous kernel
  // in the stream has ended. It calls wait_for_kernel_ahead() (ptx.h) before it touches global
  // memory.
  bool early = false;
};

// Names an array type in front of the variable: `Type<float[4][32]> x` declares an array.
template <class T>
using Type = T;

#if defined(ROSA_SIMT)

// ROSA_DYNAMIC_SHARED(name) declares `unsigned char* name`, a block's dynamic shared memory,
// aligned to 1024 bytes. ROSA_SHARED(name, T[4][8]) declares an array, or any other type, in static
// shared memory, aligned to 16 bytes. Unlike __shared__, both tell the emulator where the memory
// is. The emulator fills it with NaN before every block and detects accesses past its end.
#define ROSA_DYNAMIC_SHARED(name) unsigned char* const name = ::rosa::simt::dynamic_shared()
#define ROSA_SHARED(name, ...) \
  auto& name = ::rosa::simt::static_shared<::rosa::cuda::Type<__VA_ARGS__>>([] {})

// Allows the next launch to use all shared memory of the device. On a GPU the permission lasts. In
// the emulator every launch is like the first of a process.
template <auto kKernel>
void allow_shared_memory() {
  ::rosa::simt::allow_shared_memory();
}

template <auto kKernel, class... Args>
void start(const Grid& grid, Args... args) {
  ::rosa::simt::launch(
      grid.blocks, grid.threads, grid.shared_bytes, [&] { kKernel(args...); }, grid.early);
}

// Sets the calling thread's device for as long as the guard lives, then restores the previous one.
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

// Throws if a CUDA call failed. cudaGetLastError clears the error code. So the next caller, which
// may be another library, does not see it as its own error.
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
// the kernel's static part. The limit belongs to the kernel, not to a launch. If each launch set
// only what it needs, a thread could lower the limit between another thread's setting and its
// launch.
template <auto kKernel>
void allow_shared_memory() {
  static std::atomic<uint64_t> allowed{0};  // a bit per device; device 64 and up ask every time
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
  // Two threads may both have set the limit, to the same value.
  allowed.fetch_or(bit, std::memory_order_relaxed);
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
  // Unlike <<<>>>, this returns the error of this launch, not one that an earlier call left behind.
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

// Runs a kernel. The kernel is a template argument, so that each has its own record of permissions.
template <auto kKernel, class... Args>
void launch(const Grid& grid, Args... args) {
  // Without permission a block has 48 KiB of static and dynamic shared memory together. Only the
  // compiler knows how much of that is static (12 to 19 KiB for spmm_staged). So every kernel with
  // dynamic shared memory asks for permission, even if it needs little.
  if (grid.shared_bytes > 0) allow_shared_memory<kKernel>();
  start<kKernel>(grid, args...);
}

}  // namespace rosa::cuda
