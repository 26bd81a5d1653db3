// Finalize adds the slices of every nonzero in order and writes the sum to its CSR place.
#pragma once

#include "cuda/numeric.h"
#include "cuda/ptx.h"

namespace rosa::cuda {

constexpr int kFinalizeThreads = 256;

// One part of plan order: `count` nonzeros in `slices` slices of partial sums.
struct Slices {
  const float* partial;
  int64_t count;
  int32_t slices;
};

// Writes out[entry[e] * stride] for every e of the heavy part, then of the light part. If `entry`
// is null, the entry is e itself.
template <class T>
__global__ void __launch_bounds__(kFinalizeThreads)
    sddmm_finalize_kernel(Slices heavy, Slices light, const int32_t* entry, T* out,
                          int64_t stride) {
  let_next_kernel_begin();
  wait_for_kernel_ahead();
  const int64_t e = int64_t{blockIdx.x} * kFinalizeThreads + threadIdx.x;
  if (e >= heavy.count + light.count) return;
  const bool is_heavy = e < heavy.count;
  const int64_t count = is_heavy ? heavy.count : light.count;
  const int32_t slices = is_heavy ? heavy.slices : light.slices;
  const float* at = is_heavy ? heavy.partial + e : light.partial + (e - heavy.count);
  float sum = at[0];
  for (int32_t s = 1; s < slices; ++s) sum += at[s * count];
  out[(entry != nullptr ? entry[e] : e) * stride] = from_float<T>(sum);
}

}  // namespace rosa::cuda
