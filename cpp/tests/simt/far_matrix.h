// A matrix whose elements lie farther apart than 32-bit offsets reach.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <new>

#include "../floats.h"
#include "rosa/views.h"

namespace rosa::test {

// Only pages that are written take memory.
class FarMatrix {
 public:
  static constexpr int64_t kFar = (int64_t{1} << 30) + 8;  // elements; aligned for any kernel

  // If `far_rows`, rows are far apart and columns are consecutive. Otherwise columns are far apart.
  FarMatrix(DType dtype, int64_t rows, int64_t cols, bool far_rows)
      : view_{nullptr, dtype, rows, cols, far_rows ? kFar : 1, far_rows ? 1 : kFar},
        bytes_((far_rows ? rows : cols) * kFar * item_size(dtype)) {
    view_.data = mmap(nullptr, static_cast<size_t>(bytes_), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (view_.data == MAP_FAILED) throw std::bad_alloc();
  }
  FarMatrix(const FarMatrix&) = delete;
  FarMatrix& operator=(const FarMatrix&) = delete;
  ~FarMatrix() { munmap(view_.data, static_cast<size_t>(bytes_)); }

  const MatrixView& view() const { return view_; }
  double at(int64_t i, int64_t j) const { return load(view_.dtype, address(i, j)); }
  void set(int64_t i, int64_t j, double value) { store(view_.dtype, address(i, j), value); }

 private:
  char* address(int64_t i, int64_t j) const {
    return static_cast<char*>(view_.data) +
           (i * view_.row_stride + j * view_.col_stride) * item_size(view_.dtype);
  }

  MatrixView view_;
  int64_t bytes_;
};

}  // namespace rosa::test
