// The properties of the devices, and whether this build has code for them.
#include <cstdlib>

#include "cuda/platform.h"
#include "rosa/cuda.h"

#ifndef ROSA_CUDA_ARCHITECTURES
#define ROSA_CUDA_ARCHITECTURES "unknown architectures"
#endif
#ifndef ROSA_HAS_WGMMA
#define ROSA_HAS_WGMMA 0
#endif

namespace rosa::cuda {

#if defined(ROSA_SIMT)

// The emulated devices have few multiprocessors and little scratch, so that small problems fill
// them several times.
std::string unavailable() { return ""; }
std::string unsupported(int) { return ""; }
DeviceProperties properties(int device) {
  constexpr int64_t kKib = 1024, kL2 = 50 << 20, kPanels = 256 * kKib;
  switch (device) {
    case 1:  // too little shared memory for kernels that keep an operand there
      return {3, 9, 0, kL2, 16 * kKib, kPanels, true};
    case 2:  // one block goes through many lines of a tile
      return {1, 9, 0, kL2, 227 * kKib, 4 << 20, true};
    case 3:  // like an A100
      return {3, 8, 0, kL2, 163 * kKib, kPanels, false};
    case 4:  // like an RTX 3090 or 4090
      return {3, 8, 6, kL2, 99 * kKib, kPanels, false};
    default:  // like an H100
      return {3, 9, 0, kL2, 227 * kKib, kPanels, true};
  }
}
bool has_wgmma() { return true; }

#else

namespace {

// The panels of one chunk of tokens, in MiB. More would cost memory. Less would cost launches: a
// chunk takes three, of 2.5 us each (an estimate). Packing this much takes 30 us and more.
constexpr int64_t kPanelMib = 128;

// For experiments: ROSA_PANEL_MIB replaces kPanelMib, and ROSA_EARLY_LAUNCH=1 lets launches
// overlap.
int64_t from_environment(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);
  const int64_t value = text != nullptr ? std::atoll(text) : 0;
  return value > 0 ? value : otherwise;
}

// unsupported() asks for its attributes, to learn whether this build has code for a device.
__global__ void probe_kernel() {}

}  // namespace

std::string unavailable() {
  int count = 0;  // stays 0 if there is no driver
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return "";
  cudaGetLastError();
  return std::string("needs a CUDA device and driver: ") +
         (status == cudaSuccess ? "no device was found" : cudaGetErrorString(status));
}

std::string unsupported(int device) {
  const DeviceGuard guard(device);
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (status == cudaSuccess) return "";
  cudaGetLastError();
  if (status != cudaErrorNoKernelImageForDevice && status != cudaErrorInvalidDeviceFunction)
    return cudaGetErrorString(status);
  const DeviceProperties p = properties(device);
  return "has no code for compute capability " + std::to_string(p.capability_major) + "." +
         std::to_string(p.capability_minor) + " in this build, which was made for " +
         ROSA_CUDA_ARCHITECTURES;
}

DeviceProperties properties(int device) {
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  return {attribute(cudaDevAttrMultiProcessorCount, device),
          major,
          attribute(cudaDevAttrComputeCapabilityMinor, device),
          attribute(cudaDevAttrL2CacheSize, device),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          from_environment("ROSA_PANEL_MIB", kPanelMib) << 20,
          major >= 9 && from_environment("ROSA_EARLY_LAUNCH", 0) > 0};
}

bool has_wgmma() { return ROSA_HAS_WGMMA; }

#endif

}  // namespace rosa::cuda
