// Maps a run-time dtype to a C++ type.
#pragma once

#include "cpu/floats.h"
#include "rosa/check.h"
#include "rosa/views.h"

namespace rosa::cpu {

// Calls body(T{}) with the storage type T of `dtype`.
template <class Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
    case DType::kFloat64:
      return body(double{});
  }
  check(false, "expected a dtype among float32, bfloat16, float16, float64");
}

inline int64_t accumulator_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

inline DType accumulator_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// Values and results have the dense operands' dtype, or float32 beside a 16-bit dtype.
inline void check_values(const VectorView& values, DType dense, int64_t nnz) {
  check(values.size == nnz, "expected as many values as the pattern has nonzeros");
  check(values.dtype == dense || (values.dtype == DType::kFloat32 && dense != DType::kFloat64),
        "expected values of the dense operands' dtype or float32");
}

}  // namespace rosa::cpu
