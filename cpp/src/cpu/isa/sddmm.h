// The inner loops of sddmm: dot products at the nonzeros of a row, over a block of tokens.
#pragma once

#include <cstdint>

#include "cpu/isa/widths.h"

namespace rosa::cpu {
namespace {

// <row, x>, before the sum over lanes.
template <int kLanes, int kVectors, class A>
inline Vec<A, kLanes> dot(const Vec<A, kLanes> (&row)[kVectors], const A* x) {
  Vec<A, kLanes> sum = row[0] * load<kLanes>(x);
  for (int v = 1; v < kVectors; ++v) sum += row[v] * load<kLanes>(x + v * kLanes);
  return sum;
}

// partial[u] += <row, panel[col[u]]> for u < count <= kCount. The dots past count repeat the last
// column and are dropped.
template <int kCount, int kLanes, int kVectors, class A>
inline void dot_group(const int32_t* col, int count, const A* panel,
                      const Vec<A, kLanes> (&row)[kVectors], A* partial) {
  Vec<A, 8> dots[kCount];
  for (int u = 0; u < kCount; ++u) {
    const int64_t j = col[u < count ? u : count - 1];
    dots[u] = fold(dot<kLanes, kVectors, A>(row, panel + j * (kLanes * kVectors)));
  }
  const Vec<A, 8> sums = sum_lanes<A>(dots);
  if (count == 8) {
    store<8>(partial, load<8>(partial) + sums);
  } else {
    for (int u = 0; u < count; ++u) partial[u] += sums[u];
  }
}

// partial[0:count] += <row, panel[col[0:count]]>, for the entries of one row.
template <int kLanes, int kVectors, class A>
inline void dot_row(const int32_t* col, int64_t count, const A* panel,
                    const Vec<A, kLanes> (&row)[kVectors], A* partial) {
  int64_t t = 0;
  if constexpr (kLanes == 16) {  // sixteen sums at once take half the shuffles of two times eight
    for (; t + 16 <= count; t += 16) {
      Vec<A, 16> dots[16];
      for (int u = 0; u < 16; ++u)
        dots[u] = dot<kLanes, kVectors, A>(row, panel + col[t + u] * int64_t{16 * kVectors});
      store<16>(partial + t, load<16>(partial + t) + sum_lanes(dots));
    }
  }
  for (; t + 8 <= count; t += 8)
    dot_group<8, kLanes, kVectors, A>(col + t, 8, panel, row, partial + t);
  const int left = static_cast<int>(count - t);
  if (left > 4) {
    dot_group<8, kLanes, kVectors, A>(col + t, left, panel, row, partial + t);
  } else if (left > 0) {
    dot_group<4, kLanes, kVectors, A>(col + t, left, panel, row, partial + t);
  }
}

template <class T, int kLanes, int kVectors>
void sddmm_blocks(const SddmmTask& task) {
  using A = Accumulator<T>;
  constexpr int kBlock = kLanes * kVectors;
  const int32_t* crow = task.pattern.crow_indices;
  const int32_t* col = task.pattern.col_indices;
  A* panel = static_cast<A*>(task.panel);
  A* chunk = static_cast<A*>(task.chunk);
  A* partial = static_cast<A*>(task.partial);
  for (int64_t t = crow[task.row_begin]; t < crow[task.row_end]; ++t) partial[t] = A(0);

  for (int64_t first = task.token_begin; first < task.token_end; first += kBlock) {
    const int64_t left = task.token_end - first;
    const int64_t tokens = left < kBlock ? left : kBlock;
    pack<T>(task.b, task.active_cols, first, tokens, kBlock, panel);
    for (int64_t i0 = task.row_begin; i0 < task.row_end; i0 += kChunkRows) {
      const int64_t i1 = i0 + kChunkRows < task.row_end ? i0 + kChunkRows : task.row_end;
      uint8_t active_rows[kChunkRows];
      for (int64_t i = i0; i < i1; ++i) active_rows[i - i0] = crow[i + 1] > crow[i];
      pack<T>(rows_of(task.a, i0, i1), active_rows, first, tokens, kBlock, chunk);
      for (int64_t i = i0; i < i1; ++i) {
        if (crow[i] == crow[i + 1]) continue;
        Vec<A, kLanes> row[kVectors];
        for (int v = 0; v < kVectors; ++v)
          row[v] = load<kLanes>(chunk + (i - i0) * kBlock + v * kLanes);
        dot_row<kLanes, kVectors, A>(col + crow[i], crow[i + 1] - crow[i], panel, row,
                                     partial + crow[i]);
      }
    }
  }
}

template <int kFloatLanes>
void sddmm_worker(const SddmmTask& task) {
  with_width<kFloatLanes>(task, [&](auto width) {
    using W = decltype(width);
    sddmm_blocks<typename W::T, W::kLanes, W::kVectors>(task);
  });
}

}  // namespace
}  // namespace rosa::cpu
