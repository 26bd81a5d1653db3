// The inner loops of spmm and sddmm. Included by one file per instruction set, which sets the
// width.
//
// Both take a block of 16, 32 or 64 tokens, pack the gathered operand into a panel that stays in
// the second-level cache, and walk the CSR once per block: a nonzero costs kVectors contiguous
// loads and fused multiply-adds, and no gather.
#pragma once

#include <cstdint>

#include "cpu/isa/kernels.h"
#include "cpu/isa/panel.h"
#include "cpu/isa/simd.h"

namespace rosa::cpu {
namespace {

// Independent sums per row: two FMA pipes of latency 4 want 8 in flight.
constexpr int kChains = 8;

// sums[v] += values[t] * panel[col[t]] over entries [begin, end) of one row.
template <int kLanes, int kVectors, class A>
inline void accumulate_row(const int32_t* col, const A* values, int64_t begin, int64_t end,
                           const A* panel, Vec<A, kLanes> (&sums)[kVectors]) {
  constexpr int kBlock = kLanes * kVectors;
  constexpr int kUnroll = kVectors >= kChains ? 1 : kChains / kVectors;
  using V = Vec<A, kLanes>;
  int64_t t = begin;
  if (kUnroll > 1 && end - begin >= kUnroll) {
    V parts[kUnroll][kVectors] = {};
    for (; t + kUnroll <= end; t += kUnroll)
      for (int u = 0; u < kUnroll; ++u) {
        const A* row = panel + col[t + u] * int64_t{kBlock};
        for (int v = 0; v < kVectors; ++v)
          parts[u][v] += values[t + u] * load<kLanes>(row + v * kLanes);
      }
    for (int u = 0; u < kUnroll; ++u)
      for (int v = 0; v < kVectors; ++v) sums[v] += parts[u][v];
  }
  for (; t < end; ++t) {
    const A* row = panel + col[t] * int64_t{kBlock};
    for (int v = 0; v < kVectors; ++v) sums[v] += values[t] * load<kLanes>(row + v * kLanes);
  }
}

template <class T, int kLanes, int kVectors>
void spmm_blocks(const SpmmTask& task) {
  using A = Accumulator<T>;
  constexpr int kBlock = kLanes * kVectors;
  const int32_t* crow = task.pattern.crow_indices;
  const int32_t* col = task.pattern.col_indices;
  const A* values = static_cast<const A*>(task.values);
  A* panel = static_cast<A*>(task.panel);
  A* chunk = static_cast<A*>(task.chunk);
  for (int64_t first = task.token_begin; first < task.token_end; first += kBlock) {
    const int64_t left = task.token_end - first;
    const int64_t tokens = left < kBlock ? left : kBlock;
    pack<T>(task.b, task.active_cols, first, tokens, kBlock, panel);
    for (int64_t i0 = task.row_begin; i0 < task.row_end; i0 += kChunkRows) {
      const int64_t i1 = i0 + kChunkRows < task.row_end ? i0 + kChunkRows : task.row_end;
      for (int64_t i = i0; i < i1; ++i) {
        Vec<A, kLanes> sums[kVectors] = {};
        accumulate_row<kLanes, kVectors, A>(col, values, crow[i], crow[i + 1], panel, sums);
        for (int v = 0; v < kVectors; ++v)
          store<kLanes>(chunk + (i - i0) * kBlock + v * kLanes, sums[v]);
      }
      unpack<T>(chunk, kBlock, rows_of(task.c, i0, i1), first, tokens);
    }
  }
}

// <row, x>, not yet summed over lanes.
template <int kLanes, int kVectors, class A>
inline Vec<A, kLanes> dot(const Vec<A, kLanes> (&row)[kVectors], const A* x) {
  Vec<A, kLanes> sum = row[0] * load<kLanes>(x);
  for (int v = 1; v < kVectors; ++v) sum += row[v] * load<kLanes>(x + v * kLanes);
  return sum;
}

// partial[u] += <row, panel[col[u]]> for u < count <= kCount; what is computed past count repeats
// the last column and is dropped.
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

// float sums are kFloatLanes wide; double sums always 8, which is fast enough for what checks.
template <class T, int kFloatLanes>
constexpr int kLanesOf = sizeof(Accumulator<T>) == 8 ? 8 : kFloatLanes;

template <class T, int kFloatLanes>
void spmm_of(const SpmmTask& task) {
  constexpr int kLanes = kLanesOf<T, kFloatLanes>;
  if (task.block == 64) return spmm_blocks<T, kLanes, 64 / kLanes>(task);
  if (task.block == 32) return spmm_blocks<T, kLanes, 32 / kLanes>(task);
  return spmm_blocks<T, kLanes, 16 / kLanes>(task);
}

template <class T, int kFloatLanes>
void sddmm_of(const SddmmTask& task) {
  constexpr int kLanes = kLanesOf<T, kFloatLanes>;
  if (task.block == 64) return sddmm_blocks<T, kLanes, 64 / kLanes>(task);
  if (task.block == 32) return sddmm_blocks<T, kLanes, 32 / kLanes>(task);
  return sddmm_blocks<T, kLanes, 16 / kLanes>(task);
}

template <int kFloatLanes>
void spmm_worker(const SpmmTask& task) {
  switch (task.b.dtype) {
    case DType::kFloat32:
      return spmm_of<float, kFloatLanes>(task);
    case DType::kBFloat16:
      return spmm_of<BFloat16, kFloatLanes>(task);
    case DType::kFloat16:
      return spmm_of<Float16, kFloatLanes>(task);
    case DType::kFloat64:
      return spmm_of<double, kFloatLanes>(task);
  }
}

template <int kFloatLanes>
void sddmm_worker(const SddmmTask& task) {
  switch (task.b.dtype) {
    case DType::kFloat32:
      return sddmm_of<float, kFloatLanes>(task);
    case DType::kBFloat16:
      return sddmm_of<BFloat16, kFloatLanes>(task);
    case DType::kFloat16:
      return sddmm_of<Float16, kFloatLanes>(task);
    case DType::kFloat64:
      return sddmm_of<double, kFloatLanes>(task);
  }
}

}  // namespace
}  // namespace rosa::cpu
