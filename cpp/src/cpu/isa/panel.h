// Panels: a block of tokens of a dense operand, one contiguous run of tokens per row.
//
// panel[i * block + t] = x(i, first + t). Every nonzero then meets a contiguous vector, whatever the
// strides of the operand were. Rows that nobody reads are not packed.
#pragma once

#include <cstdint>

#include "cpu/isa/simd.h"
#include "rosa/views.h"

namespace rosa::cpu {
namespace {

// Rows are packed in groups of this many: a 64-byte line of float32 token-major memory.
constexpr int64_t kGroup = 16;

template <class T>
inline T* at(const MatrixView& x, int64_t i, int64_t t) {
  return static_cast<T*>(x.data) + i * x.row_stride + t * x.col_stride;
}

// Whether any of rows [begin, end) is read; without a list, all are.
inline bool any_active(const uint8_t* active, int64_t begin, int64_t end) {
  if (active == nullptr) return true;
  uint8_t any = 0;
  for (int64_t i = begin; i < end; ++i) any |= active[i];
  return any != 0;
}

template <class T, class A>
inline void pack_scalar(const MatrixView& x, int64_t begin, int64_t end, int64_t first,
                        int64_t token_begin, int64_t tokens, int block, A* panel) {
  for (int64_t i = begin; i < end; ++i)
    for (int64_t t = token_begin; t < tokens; ++t)
      panel[i * block + t] = widen(*at<T>(x, i, first + t));
}

// Packs rows [0, x.rows) of tokens [first, first + tokens); pads the block with zeros.
template <class T, class A>
void pack(const MatrixView& x, const uint8_t* active, int64_t first, int64_t tokens, int block,
          A* panel) {
  const int64_t whole = tokens - tokens % 8;
  for (int64_t i0 = 0; i0 < x.rows; i0 += kGroup) {
    const int64_t i1 = i0 + kGroup < x.rows ? i0 + kGroup : x.rows;
    if (!any_active(active, i0, i1)) continue;
    if (x.row_stride == 1 && i1 - i0 == kGroup) {
      for (int64_t t = 0; t < whole; t += 8) {
        for (int64_t i = i0; i < i1; i += 8) {
          Vec<A, 8> r[8];
          for (int j = 0; j < 8; ++j) r[j] = load8(at<T>(x, i, first + t + j));
          transpose8<A>(r);
          for (int j = 0; j < 8; ++j) store<8>(panel + (i + j) * block + t, r[j]);
        }
      }
    } else if (x.col_stride == 1) {
      for (int64_t i = i0; i < i1; ++i)
        for (int64_t t = 0; t < whole; t += 8)
          store<8>(panel + i * block + t, load8(at<T>(x, i, first + t)));
    } else {
      pack_scalar<T>(x, i0, i1, first, 0, whole, block, panel);
    }
    pack_scalar<T>(x, i0, i1, first, whole, tokens, block, panel);
    for (int64_t i = i0; i < i1; ++i)
      for (int64_t t = tokens; t < block; ++t) panel[i * block + t] = A(0);
  }
}

// The way back: rows [0, x.rows) of tokens [first, first + tokens) of x from the panel.
template <class T, class A>
void unpack(const A* panel, int block, const MatrixView& x, int64_t first, int64_t tokens) {
  const int64_t whole = tokens - tokens % 8;
  int64_t done = 0;  // rows whose whole groups of eight tokens are written
  if (x.row_stride == 1) {
    for (; done + 8 <= x.rows; done += 8) {
      for (int64_t t = 0; t < whole; t += 8) {
        Vec<A, 8> r[8];
        for (int j = 0; j < 8; ++j) r[j] = load<8>(panel + (done + j) * block + t);
        transpose8<A>(r);
        for (int j = 0; j < 8; ++j) store8(at<T>(x, done, first + t + j), r[j]);
      }
    }
  } else if (x.col_stride == 1) {
    for (; done < x.rows; ++done)
      for (int64_t t = 0; t < whole; t += 8)
        store8(at<T>(x, done, first + t), load<8>(panel + done * block + t));
  }
  for (int64_t i = 0; i < x.rows; ++i)
    for (int64_t t = i < done ? whole : 0; t < tokens; ++t)
      *at<T>(x, i, first + t) = Narrow<T>::from(panel[i * block + t]);
}

// Rows [begin, end) of x.
inline MatrixView rows_of(MatrixView x, int64_t begin, int64_t end) {
  x.data = static_cast<char*>(x.data) + begin * x.row_stride * item_size(x.dtype);
  x.rows = end - begin;
  return x;
}

}  // namespace
}  // namespace rosa::cpu
