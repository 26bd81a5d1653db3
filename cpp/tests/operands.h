// Guarded operands in every layout, and the data that fills them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "floats.h"
#include "rosa/views.h"

#ifndef __has_feature
#define __has_feature(x) 0
#endif

namespace rosa::test {

// Under AddressSanitizer a buffer ends exactly where its data ends. AddressSanitizer then reports
// stray reads, which guard bytes cannot show.
#if defined(__SANITIZE_ADDRESS__) || __has_feature(address_sanitizer)
constexpr int64_t kGuardBytes = 0;
#else
constexpr int64_t kGuardBytes = 64;
#endif

// Fills guards, gaps and unwritten outputs. All ones is NaN in every dtype. So a stray read makes
// the result NaN, and a stray write changes these bytes.
constexpr unsigned char kPoison = 0xFF;

// splitmix64. It gives the same data on every platform. The standard distributions do not.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  double unit() { return static_cast<double>(bits() >> 11) * 0x1p-53; }  // [0, 1)
  double symmetric(double scale) { return scale * (2 * unit() - 1); }

 private:
  uint64_t state_;
};

// Poisoned bytes between guards. They begin `offset` bytes past a 64-byte boundary.
class Buffer {
 public:
  explicit Buffer(int64_t bytes, int64_t offset = 0)
      : bytes_(bytes), offset_(offset), total_(kGuardBytes + offset + bytes + kGuardBytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, static_cast<size_t>(total_ > 0 ? total_ : 1)) != 0) {
      throw std::bad_alloc();
    }
    memory_ = static_cast<char*>(memory);
    std::memset(memory_, kPoison, static_cast<size_t>(total_));
  }
  Buffer(const Buffer& other) : Buffer(other.bytes_, other.offset_) {
    std::memcpy(memory_, other.memory_, static_cast<size_t>(total_));
  }
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(memory_); }

  char* data() const { return memory_ + kGuardBytes + offset_; }
  int64_t size() const { return bytes_; }
  bool same_bytes(const Buffer& other) const {
    return total_ == other.total_ &&
           std::memcmp(memory_, other.memory_, static_cast<size_t>(total_)) == 0;
  }
  bool all_poison() const { return poisoned(0, total_); }
  bool guards_intact() const {
    return poisoned(0, kGuardBytes + offset_) && poisoned(total_ - kGuardBytes, total_);
  }

 private:
  bool poisoned(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      if (static_cast<unsigned char>(memory_[i]) != kPoison) return false;
    }
    return true;
  }

  int64_t bytes_, offset_, total_;
  char* memory_;
};

// The first kWritableLayouts have no internal overlap, so that outputs may have them.
enum class Layout {
  kRow,
  kColumn,
  kRowMisaligned,  // by one element
  kColumnMisaligned,
  kRowSliced,  // odd leading dimension, misaligned base
  kColumnSliced,
  kBothStrided,
  kRowBroadcast,  // row stride 0
  kColumnBroadcast,
  kScalar,  // both strides 0, as the gradient in y.sum().backward()
};
constexpr int kLayouts = 10;
constexpr int kWritableLayouts = 7;

inline Layout layout(int64_t index) { return static_cast<Layout>(index % kLayouts); }
inline Layout writable_layout(int64_t index) {
  return static_cast<Layout>(index % kWritableLayouts);
}

struct Strides {
  int64_t row, col, offset;
};

inline Strides strides_of(Layout layout, int64_t rows, int64_t cols) {
  switch (layout) {
    case Layout::kRow:
      return {cols, 1, 0};
    case Layout::kColumn:
      return {1, rows, 0};
    case Layout::kRowMisaligned:
      return {cols, 1, 1};
    case Layout::kColumnMisaligned:
      return {1, rows, 1};
    case Layout::kRowSliced:
      return {(cols + 3) | 1, 1, 1};
    case Layout::kColumnSliced:
      return {1, (rows + 3) | 1, 1};
    case Layout::kBothStrided:
      return {2 * cols + 3, 2, 1};
    case Layout::kRowBroadcast:
      return {0, 1, 0};
    case Layout::kColumnBroadcast:
      return {1, 0, 0};
    case Layout::kScalar:
      return {0, 0, 0};
  }
  return {};
}

// A strided operand. Its elements are poisoned until they are set. A matrix with one column serves
// as a vector.
class Matrix {
 public:
  Matrix(DType dtype, int64_t rows, int64_t cols, Layout layout)
      : dtype_(dtype),
        rows_(rows),
        cols_(cols),
        strides_(strides_of(layout, rows, cols)),
        buffer_(span() * item_size(dtype), strides_.offset * item_size(dtype)) {}

  Matrix& fill(Random& random, double scale = 1) {
    for_each([&](int64_t i, int64_t j) { set(i, j, random.symmetric(scale)); });
    return *this;
  }
  double at(int64_t i, int64_t j = 0) const { return load(dtype_, address(i, j)); }
  void set(int64_t i, int64_t j, double value) { store(dtype_, address(i, j), value); }

  MatrixView view() const {
    return {buffer_.data(), dtype_, rows_, cols_, strides_.row, strides_.col};
  }
  VectorView vector() const { return {buffer_.data(), dtype_, rows_, strides_.row}; }
  DType dtype() const { return dtype_; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }

  bool same_bytes(const Matrix& other) const { return buffer_.same_bytes(other.buffer_); }
  // Whether the guards and the gaps between elements are intact. The elements do not matter.
  bool surroundings_intact() const {
    Matrix copy = *this;
    copy.for_each([&](int64_t i, int64_t j) {
      std::memset(copy.address(i, j), kPoison, static_cast<size_t>(item_size(dtype_)));
    });
    return copy.buffer_.all_poison();
  }

 private:
  int64_t span() const {
    if (rows_ == 0 || cols_ == 0) return 0;
    return (rows_ - 1) * strides_.row + (cols_ - 1) * strides_.col + 1;
  }
  char* address(int64_t i, int64_t j) const {
    return buffer_.data() + (i * strides_.row + j * strides_.col) * item_size(dtype_);
  }
  template <typename Function>
  void for_each(Function function) {
    for (int64_t i = 0; i < rows_; ++i) {
      for (int64_t j = 0; j < cols_; ++j) function(i, j);
    }
  }

  DType dtype_;
  int64_t rows_, cols_;
  Strides strides_;
  Buffer buffer_;
};

}  // namespace rosa::test
