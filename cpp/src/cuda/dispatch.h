// Helpers of every entry point: the type of a run-time dtype, argument checks, sizes of grids.
#pragma once

#include <string>

#include "cuda/numeric.h"
#include "rosa/check.h"
#include "rosa/cuda.h"
#include "rosa/tile_plan.h"
#include "rosa/views.h"

namespace rosa::cuda {

inline int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }

// The number of blocks of this much shared memory that a multiprocessor holds at once. A
// multiprocessor has 1 KiB more than the maximum of one block. The system keeps 1 KiB per block.
inline int64_t blocks_per_multiprocessor(int64_t block_bytes, const DeviceProperties& device) {
  return (device.shared_bytes + 1024) / (block_bytes + 1024);
}

// Throws if a block needs more shared memory than the device gives. CUDA would refuse the launch
// too, but its message names neither number.
inline void check_shared_bytes(int64_t block_bytes, const DeviceProperties& device) {
  if (block_bytes <= device.shared_bytes) return;
  throw std::invalid_argument(
      "expected a device that gives a block " + std::to_string(block_bytes) +
      " bytes of shared memory, got one with " + std::to_string(device.shared_bytes));
}

// Calls body(T{}) with the storage type T of `dtype`.
template <class Body>
void with_float(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(Bf16{});
    case DType::kFloat16:
      return body(Half{});
    case DType::kFloat64:
      break;
  }
  check(false, "expected a dtype among float32, bfloat16 and float16 on CUDA");
}

// Values and results have the dense operands' dtype or float32.
inline void check_values(const VectorView& values, DType dense, int64_t nnz) {
  check(values.size == nnz, "expected as many values as the pattern has nonzeros");
  check(values.dtype == dense || values.dtype == DType::kFloat32,
        "expected values of the dense operands' dtype or float32");
}

inline void check_plan(const PlanView& plan, const CsrView& pattern) {
  check(plan.empty() || (plan.rows.size == pattern.rows && plan.cols.size == pattern.cols &&
                         plan.nnz == pattern.nnz),
        "expected the tile plan of this pattern");
}

}  // namespace rosa::cuda
