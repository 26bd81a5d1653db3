// A stand-in for the part of the CUDA runtime that cuda/platform.h calls. It records what a launch
// asks for, and refuses what a device would refuse. It runs no kernels. The emulator in simt/ runs
// them, and does not use this runtime.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace fake_cuda {

using Kernel = const void*;

// The state of the runtime. Tests read and write it between their calls.
struct Runtime {
  std::mutex mutex;
  int optin_bytes = 232448;                     // shared memory of a block that opted in
  std::map<Kernel, size_t> static_bytes;        // static shared memory of kernels, 0 by default
  std::map<std::pair<Kernel, int>, int> limit;  // of dynamic shared memory, by kernel and device
  int limits_set = 0, attributes_read = 0, launches = 0;
  unsigned last_attributes = 0;  // number of attributes of the last launch
  cudaError_t sticky = cudaSuccess;
};
inline Runtime runtime;
inline thread_local int device = 0;

inline cudaError_t result(cudaError_t status) {
  if (status != cudaSuccess) runtime.sticky = status;
  return status;
}

}  // namespace fake_cuda

inline cudaError_t cudaGetLastError() {
  const std::lock_guard<std::mutex> lock(fake_cuda::runtime.mutex);
  return std::exchange(fake_cuda::runtime.sticky, cudaSuccess);
}
inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : "invalid argument";
}
inline const char* cudaGetErrorName(cudaError_t status) {
  return status == cudaSuccess ? "cudaSuccess" : "cudaErrorInvalidValue";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = fake_cuda::device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  fake_cuda::device = device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = fake_cuda::runtime.optin_bytes;
  return cudaSuccess;
}
template <class T>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, T* kernel) {
  const std::lock_guard<std::mutex> lock(fake_cuda::runtime.mutex);
  ++fake_cuda::runtime.attributes_read;
  attributes->sharedSizeBytes =
      fake_cuda::runtime.static_bytes[reinterpret_cast<fake_cuda::Kernel>(kernel)];
  return cudaSuccess;
}
template <class T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute, int value) {
  fake_cuda::Runtime& runtime = fake_cuda::runtime;
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  const auto key = reinterpret_cast<fake_cuda::Kernel>(kernel);
  ++runtime.limits_set;
  if (value < 0 || value + static_cast<int>(runtime.static_bytes[key]) > runtime.optin_bytes)
    return fake_cuda::result(cudaErrorInvalidValue);
  runtime.limit[{key, fake_cuda::device}] = value;
  return cudaSuccess;
}
template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&...) {
  static_assert(sizeof...(Params) == sizeof...(Args), "a kernel's arguments");
  fake_cuda::Runtime& runtime = fake_cuda::runtime;
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  const auto key = reinterpret_cast<fake_cuda::Kernel>(kernel);
  const auto limit = runtime.limit.find({key, fake_cuda::device});
  const size_t most = limit == runtime.limit.end() ? 48 * 1024 - runtime.static_bytes[key]
                                                   : static_cast<size_t>(limit->second);
  ++runtime.launches;
  runtime.last_attributes = config->numAttrs;
  return fake_cuda::result(config->dynamicSmemBytes > most ? cudaErrorInvalidValue : cudaSuccess);
}
