// The inner loops of spmm: sums of a row of the result, for a block of tokens.
#pragma once

#include <cstdint>

#include "cpu/isa/widths.h"

namespace rosa::cpu {
namespace {

// Independent sums per row: two FMA pipes of latency 4 need 8 in flight.
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

template <int kFloatLanes>
void spmm_worker(const SpmmTask& task) {
  with_width<kFloatLanes>(task, [&](auto width) {
    using W = decltype(width);
    spmm_blocks<typename W::T, W::kLanes, W::kVectors>(task);
  });
}

}  // namespace
}  // namespace rosa::cpu
