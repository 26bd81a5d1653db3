// What every entry needs: from a run-time dtype to a type, checks, the arithmetic of grids.
#pragma once

#include <string>

#include "cuda/numeric.h"
#include "rosa/check.h"
#include "rosa/cuda.h"
#include "rosa/tile_plan.h"
#include "rosa/views.h"

namespace rosa::cuda {

inline int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }

// How many blocks of so much shared memory a multiprocessor holds at once: it has what one block
// may have, plus 1 KiB a block that the system keeps.
inline int64_t blocks_per_multiprocessor(int64_t block_bytes, const DeviceProperties& device) {
  return (device.shared_bytes + 1024) / (block_bytes + 1024);
}

// The launch would be refused, in words that name neither.
inline void check_shared_bytes(int64_t block_bytes, const DeviceProperties& device) {
  if (block_bytes <= device.shared_bytes) return;
  throw std::invalid_argument(
      "expected a device that gives a block " + std::to_string(block_bytes) +
      " bytes of shared memory, got one with " + std::to_string(device.shared_bytes));
}

// body(T{}) for the storage type T of `dtype`.
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

// Values and results beside dense operands of one dtype have that dtype or float32.
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
