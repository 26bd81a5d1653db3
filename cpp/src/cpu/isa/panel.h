// A panel holds a block of tokens of a dense operand. The tokens of each row are contiguous.
//
// panel[i * block + t] = x(i, first + t). So every nonzero reads a contiguous vector, for any
// strides of the operand. Rows that nobody reads are not packed.
#pragma once

#include <cstdint>

#include "cpu/isa/simd.h"
#include "rosa/views.h"

namespace rosa::cpu {
namespace {

// Rows are packed in groups of this many, a 64-byte line of token-major float32 memory.
constexpr int64_t kGroup = 16;

template <class T>
inline T* at(const MatrixView& x, int64_t i, int64_t t) {
  return static_cast<T*>(x.data) + i * x.row_stride + t * x.col_stride;
}

// Whether any of rows [begin, end) is read.
inline bool any_active(const uint8_t* active, int64_t begin, int64_t end) {
  uint8_t any = 0;
  for (int64_t i = begin; i < end; ++i) any |= active[i];
  return any != 0;
}

// How far ahead of the transposition token-major memory is prefetched. With only the hardware
// prefetcher it takes 1.5x as long, and that prefetcher gives up at the end of a chunk.
constexpr int64_t kPrefetchBytes = 512;

constexpr int64_t kRowsAhead = 16;
constexpr int64_t kLine = 64;

// Packs rows [i, i_end) of tokens [t, t_end) one element at a time: the edges, and any other
// stride.
template <class T, class A>
inline void pack_scalar(const MatrixView& x, int64_t i, int64_t i_end, int64_t first, int64_t t,
                        int64_t t_end, int block, A* panel) {
  for (; i < i_end; ++i)
    for (int64_t u = t; u < t_end; ++u) panel[i * block + u] = widen(*at<T>(x, i, first + u));
}

// Packs a token-major x. Its rows are adjacent in memory, so 8 x 8 squares are transposed in
// registers. Eight tokens at a time go across all rows, because the hardware still prefetches that
// many streams of memory.
template <class T, class A>
inline void pack_token_major(const MatrixView& x, const uint8_t* active, int64_t first,
                             int64_t tokens, int block, A* panel) {
  for (int64_t t = 0; t < tokens; t += 8) {
    const int64_t t_end = t + 8 < tokens ? t + 8 : tokens;
    for (int64_t i0 = 0; i0 < x.rows; i0 += kGroup) {
      const int64_t i1 = i0 + kGroup < x.rows ? i0 + kGroup : x.rows;
      if (!any_active(active, i0, i1)) continue;
      for (int64_t u = t; u < t_end; ++u)
        __builtin_prefetch(reinterpret_cast<const char*>(at<T>(x, i0, first + u)) + kPrefetchBytes);
      for (int64_t i = i0; i < i1; i += 8) {
        if (i + 8 > i1 || t + 8 > t_end) {
          pack_scalar<T>(x, i, i + 8 < i1 ? i + 8 : i1, first, t, t_end, block, panel);
          continue;
        }
        Vec<A, 8> r[8];
        for (int j = 0; j < 8; ++j) r[j] = load8(at<T>(x, i, first + t + j));
        transpose8<A>(r);
        for (int j = 0; j < 8; ++j) store<8>(panel + (i + j) * block + t, r[j]);
      }
    }
  }
}

// Packs rows [0, x.rows) of tokens [first, first + tokens). Pads the block with zeros.
template <class T, class A>
void pack(const MatrixView& x, const uint8_t* active, int64_t first, int64_t tokens, int block,
          A* panel) {
  const int64_t whole = tokens - tokens % 8;
  if (x.row_stride == 1) {
    pack_token_major<T>(x, active, first, tokens, block, panel);
  } else {
    for (int64_t i = 0; i < x.rows; ++i) {
      if (!active[i]) continue;
      // A row is a short run of tokens, often the only one on its page. It is prefetched a few rows
      // ahead, because no hardware prefetcher crosses pages.
      for (int64_t t = 0; t < tokens; t += kLine / static_cast<int64_t>(sizeof(T)))
        __builtin_prefetch(at<T>(x, i + kRowsAhead, first) + t);
      int64_t t = 0;
      if (x.col_stride == 1)
        for (; t < whole; t += 8) store<8>(panel + i * block + t, load8(at<T>(x, i, first + t)));
      pack_scalar<T>(x, i, i + 1, first, t, tokens, block, panel);
    }
  }
  for (int64_t i = 0; tokens < block && i < x.rows; ++i)
    for (int64_t t = tokens; t < block; ++t) panel[i * block + t] = A(0);
}

template <class T, class A>
inline void unpack_scalar(const A* panel, int block, const MatrixView& x, int64_t i, int64_t i_end,
                          int64_t first, int64_t t, int64_t t_end) {
  for (; i < i_end; ++i)
    for (int64_t u = t; u < t_end; ++u)
      *at<T>(x, i, first + u) = Narrow<T>::from(panel[i * block + u]);
}

// Copies the panel back to rows [0, x.rows) of tokens [first, first + tokens) of x.
template <class T, class A>
void unpack(const A* panel, int block, const MatrixView& x, int64_t first, int64_t tokens) {
  const int64_t whole = tokens - tokens % 8;
  int64_t rows = 0;  // rows whose whole groups of eight tokens are written as vectors
  if (x.row_stride == 1) {
    rows = x.rows - x.rows % 8;
    for (int64_t t = 0; t < whole; t += 8) {
      for (int64_t i = 0; i < rows; i += 8) {
        Vec<A, 8> r[8];
        for (int j = 0; j < 8; ++j) r[j] = load<8>(panel + (i + j) * block + t);
        transpose8<A>(r);
        for (int j = 0; j < 8; ++j) store8(at<T>(x, i, first + t + j), r[j]);
      }
    }
  } else if (x.col_stride == 1) {
    rows = x.rows;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t t = 0; t < whole; t += 8)
        store8(at<T>(x, i, first + t), load<8>(panel + i * block + t));
  }
  unpack_scalar<T>(panel, block, x, 0, rows, first, whole, tokens);
  unpack_scalar<T>(panel, block, x, rows, x.rows, first, 0, tokens);
}

// Rows [begin, end) of x.
inline MatrixView rows_of(MatrixView x, int64_t begin, int64_t end) {
  x.data = static_cast<char*>(x.data) + begin * x.row_stride * item_size(x.dtype);
  x.rows = end - begin;
  return x;
}

}  // namespace
}  // namespace rosa::cpu
