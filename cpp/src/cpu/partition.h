// Divides a call's work among threads. The division depends only on the sizes and the number of
// threads.
#pragma once

#include <cstdint>

#include "arena.h"
#include "cpu/isa/kernels.h"
#include "rosa/views.h"

namespace rosa::cpu {

// Below this many multiply-adds, a second thread costs more than it saves. Waking a thread takes
// about 5 us (an estimate). In that time one core does about 200,000 multiply-adds.
constexpr int64_t kWorkPerThread = 200'000;

inline int useful_threads(int64_t work, int threads) {
  const int64_t useful = 1 + work / kWorkPerThread;
  return static_cast<int>(useful < threads ? useful : threads < 1 ? 1 : threads);
}

// Range number `part` of `parts` nearly equal ranges of [0, total), cut at multiples of `grain`.
struct Range {
  int64_t begin, end;
};
inline Range part_of(int64_t total, int parts, int part, int64_t grain = 1) {
  const int64_t grains = (total + grain - 1) / grain;
  const int64_t begin = grains * part / parts * grain;
  const int64_t end = grains * (part + 1) / parts * grain;
  return {begin < total ? begin : total, end < total ? end : total};
}

// The rows of part number `part`. Every part has about the same number of rows plus nonzeros.
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

// Workers form a grid. Each worker has one group of tokens and one group of rows.
struct Grid {
  int token_groups, row_groups;
  int workers() const { return token_groups * row_groups; }
};

// Divides the tokens first, because each of the workers that share tokens packs the same panel.
inline Grid grid_of(int64_t tokens, int threads, int max_token_groups) {
  int64_t groups = (tokens + 15) / 16;
  if (groups > max_token_groups) groups = max_token_groups;
  if (groups > threads) groups = threads;
  if (groups < 1) groups = 1;
  return {static_cast<int>(groups), static_cast<int>(threads / groups)};
}

// The widest block that is useful for a worker with this many tokens.
inline int widest_block(int64_t tokens) { return tokens <= 16 ? 16 : tokens <= 32 ? 32 : 64; }

// The block to use: 64 tokens if the panel then leaves a quarter of the second-level cache free,
// else 32. A narrower block loses more to short vectors than a wider one loses to cache misses. At
// 4096 columns, 1 MiB of cache and 1 % density, blocks of 16, 32 and 64 tokens reach 126, 148 and
// 141 GFLOP/s.
inline int block_of(int64_t tokens, int64_t active_cols, int64_t accumulator_size) {
  const int widest = widest_block(tokens);
  if (widest < 64 || active_cols * 64 * accumulator_size <= l2_bytes() / 4 * 3) return widest;
  return 32;
}

// Sets active[j] to whether column j must be packed, and returns how many must. Columns without a
// nonzero need no packing. For few tokens, finding them costs more than packing them; then all
// columns are marked.
int64_t mark_active_cols(const CsrView& pattern, int64_t tokens, uint8_t* active, int threads);

}  // namespace rosa::cpu
