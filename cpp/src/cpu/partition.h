// How a call's work is divided: who does what is a function of the sizes and the thread count
// alone.
#pragma once

#include <cstdint>

#include "arena.h"
#include "cpu/isa/kernels.h"
#include "rosa/views.h"

namespace rosa::cpu {

// Below this many multiply-adds a second thread costs more than it brings: waking one takes about
// 5 us (an estimate), in which one core does some 200,000 of them.
constexpr int64_t kWorkPerThread = 200'000;

inline int useful_threads(int64_t work, int threads) {
  const int64_t useful = 1 + work / kWorkPerThread;
  return static_cast<int>(useful < threads ? useful : threads < 1 ? 1 : threads);
}

// The `part`-th of `parts` nearly equal ranges of [0, total), cut at multiples of `grain`.
struct Range {
  int64_t begin, end;
};
inline Range part_of(int64_t total, int parts, int part, int64_t grain = 1) {
  const int64_t grains = (total + grain - 1) / grain;
  const int64_t begin = grains * part / parts * grain;
  const int64_t end = grains * (part + 1) / parts * grain;
  return {begin < total ? begin : total, end < total ? end : total};
}

// Likewise the rows, cut so that every part has about the same number of rows plus nonzeros.
inline Range rows_part_of(const CsrView& pattern, int parts, int part) {
  const auto first_row_of = [&](int p) {
    const int64_t target = (pattern.nnz + pattern.rows) * p / parts;
    int64_t low = 0, high = pattern.rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (pattern.crow_indices[middle] + middle < target) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  return {first_row_of(part), part + 1 == parts ? pattern.rows : first_row_of(part + 1)};
}

// Workers form a grid: a worker has one group of tokens and one group of rows.
struct Grid {
  int token_groups, row_groups;
  int workers() const { return token_groups * row_groups; }
};

// Tokens first, because workers that share tokens would each pack the same panel.
inline Grid grid_of(int64_t tokens, int threads, int max_token_groups) {
  int64_t groups = (tokens + 15) / 16;
  if (groups > max_token_groups) groups = max_token_groups;
  if (groups > threads) groups = threads;
  if (groups < 1) groups = 1;
  return {static_cast<int>(groups), static_cast<int>(threads / groups)};
}

// The widest block worth having for a worker with this many tokens.
inline int widest_block(int64_t tokens) { return tokens <= 16 ? 16 : tokens <= 32 ? 32 : 64; }

// The block to use: 64 tokens if the panel then leaves a quarter of the second-level cache to the
// rest, else 32. A narrower one loses more to short vectors than a wider one to cache misses
// (at 4096 columns, 1 MiB of cache and 1 % density: 126, 148 and 141 GFLOP/s for 16, 32 and 64).
inline int block_of(int64_t tokens, int64_t active_cols, int64_t accumulator_size) {
  const int widest = widest_block(tokens);
  if (widest < 64 || active_cols * 64 * accumulator_size <= l2_bytes() / 4 * 3) return widest;
  return 32;
}

// Sets active[j] to whether column j is to be packed; returns how many are. Columns without a
// nonzero need not be, but for few tokens finding them costs more than packing them.
int64_t mark_active_cols(const CsrView& pattern, int64_t tokens, uint8_t* active, int threads);

}  // namespace rosa::cpu
