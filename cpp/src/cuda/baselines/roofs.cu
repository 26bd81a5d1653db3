// Measures the limits of the device, in the same run whose results are compared with them.
#include "cuda/platform.h"
#include "rosa/baselines.h"
#include "rosa/check.h"

namespace rosa::cuda::baselines {
namespace {

constexpr int kReadThreads = 512;
constexpr int kReadsInFlight = 4;

// Every thread has kReadsInFlight loads of 16 bytes under way. They go past L1. Otherwise L1 would
// serve a second pass over the same lines: 132 L1 caches hold more than the buffer that should stay
// in L2.
__global__ void __launch_bounds__(kReadThreads)
    read_kernel(const uint4* data, int64_t vectors, int passes, uint32_t* sink) {
  const int64_t threads = int64_t{gridDim.x} * kReadThreads;
  const int64_t thread = int64_t{blockIdx.x} * kReadThreads + threadIdx.x;
  uint32_t bits = 0;
  for (int pass = 0; pass < passes; ++pass) {
    for (int64_t i = thread; i < vectors; i += threads * kReadsInFlight) {
      uint4 loaded[kReadsInFlight] = {};
#pragma unroll
      for (int j = 0; j < kReadsInFlight; ++j) {
        if (i + j * threads < vectors) loaded[j] = __ldcg(data + i + j * threads);
      }
#pragma unroll
      for (int j = 0; j < kReadsInFlight; ++j)
        bits ^= loaded[j].x ^ loaded[j].y ^ loaded[j].z ^ loaded[j].w;
    }
  }
  // This is hardly ever true, but the compiler cannot know that, so it keeps the loads.
  if (bits == 0x9e3779b9u) *sink = bits;
}

__global__ void empty_kernel() {}

}  // namespace

void read_bandwidth(const void* data, int64_t bytes, int passes, int blocks, void* sink, int device,
                    Stream stream) {
  check(bytes % 16 == 0, "read_bandwidth: expected a multiple of 16 bytes");
  if (bytes == 0 || passes == 0 || blocks == 0) return;
  const DeviceGuard guard(device);
  const Grid grid = {dim3(static_cast<unsigned>(blocks)), dim3(kReadThreads), 0, stream};
  launch<read_kernel>(grid, static_cast<const uint4*>(data), bytes / 16, passes,
                      static_cast<uint32_t*>(sink));
}

void launch_empty(int count, int device, Stream stream) {
  const DeviceGuard guard(device);
  for (int i = 0; i < count; ++i) launch<empty_kernel>(Grid{dim3(1), dim3(kWarp), 0, stream});
}

}  // namespace rosa::cuda::baselines
