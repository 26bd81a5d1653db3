// Maps a task's dtype and block to the type and vector width of a compiled inner loop.
//
// spmm and sddmm both take a block of 16, 32 or 64 tokens. They pack the gathered operand into a
// panel that stays in the second-level cache, and walk the CSR once per block. A nonzero costs
// kVectors contiguous loads and fused multiply-adds, and no gather. One file per instruction set
// includes this header and sets the width.
#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/isa/panel.h"
#include "cpu/isa/simd.h"

namespace rosa::cpu {
namespace {

// One block of tokens: kVectors vectors of kLanes sums. It is not std::integral_constant: the
// linker might keep the functions of that type in a form that older machines cannot run.
template <class T_, int kLanes_, int kVectors_>
struct Width {
  using T = T_;
  static constexpr int kLanes = kLanes_, kVectors = kVectors_;
};

template <class T, int kFloatLanes, class Task, class Body>
void with_block(const Task& task, const Body& body) {
  // float sums are kFloatLanes wide. double sums are always 8 wide: float64 serves only for
  // checking.
  constexpr int kLanes = sizeof(Accumulator<T>) == 8 ? 8 : kFloatLanes;
  if (task.block == 64) return body(Width<T, kLanes, 64 / kLanes>{});
  if (task.block == 32) return body(Width<T, kLanes, 32 / kLanes>{});
  return body(Width<T, kLanes, 16 / kLanes>{});
}

// Calls body(Width<...>{}) for the dtype of the dense operands and the block of `task`.
template <int kFloatLanes, class Task, class Body>
void with_width(const Task& task, const Body& body) {
  switch (task.b.dtype) {
    case DType::kFloat32:
      return with_block<float, kFloatLanes>(task, body);
    case DType::kBFloat16:
      return with_block<BFloat16, kFloatLanes>(task, body);
    case DType::kFloat16:
      return with_block<Float16, kFloatLanes>(task, body);
    case DType::kFloat64:
      return with_block<double, kFloatLanes>(task, body);
  }
}

}  // namespace
}  // namespace rosa::cpu
