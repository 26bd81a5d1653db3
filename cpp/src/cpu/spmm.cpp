#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa/kernels.h"
#include "cpu/pages.h"
#include "cpu/parallel_for.h"
#include "cpu/partition.h"
#include "rosa/check.h"
#include "rosa/ops.h"

namespace rosa::cpu {
namespace {

struct Workspace {
  uint8_t* active_cols;
  void* values;
  void* panels;
  void* chunks;
  int64_t panel_bytes, chunk_bytes;  // of one worker
};

Workspace lay_out(Arena& arena, const CsrView& pattern, int64_t k, DType dtype, const Grid& grid) {
  const int64_t size = accumulator_size(dtype);
  const int64_t block = widest_block((k + grid.token_groups - 1) / grid.token_groups);
  Workspace w;
  w.active_cols = static_cast<uint8_t*>(arena.take(pattern.cols));
  w.values = arena.take(pattern.nnz * size);
  w.panel_bytes = pattern.cols * block * size;
  w.chunk_bytes = kChunkRows * block * size;
  w.panels = arena.take(grid.workers() * w.panel_bytes);
  w.chunks = arena.take(grid.workers() * w.chunk_bytes);
  return w;
}

Grid grid_of_call(const CsrView& pattern, int64_t k, int threads) {
  const int64_t work = (pattern.nnz + pattern.rows + pattern.cols) * k;
  return grid_of(k, useful_threads(work, threads), threads);
}

// Returns the values in the form that the kernels read: contiguous, in the accumulator's type.
const void* wide_values(const VectorView& values, DType dtype, void* buffer, int threads) {
  if (values.dtype == accumulator_dtype(dtype) && values.stride == 1) return values.data;
  with_type(values.dtype, [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(values.data);
    Accumulator<T>* to = static_cast<Accumulator<T>*>(buffer);
    const int workers = useful_threads(values.size, threads);
    parallel_for(workers, [&](int worker) {
      const Range range = part_of(values.size, workers, worker);
      for (int64_t t = range.begin; t < range.end; ++t) to[t] = widen(from[t * values.stride]);
    });
  });
  return buffer;
}

}  // namespace

int64_t spmm_workspace_bytes(const CsrView& pattern, int64_t k, DType dtype, int threads, Isa) {
  const Grid grid = grid_of_call(pattern, k, threads);
  return bytes_of([&](Arena& arena) { lay_out(arena, pattern, k, dtype, grid); });
}

void spmm(const CsrView& pattern, const VectorView& values, const MatrixView& b,
          const MatrixView& c, void* workspace, int threads, Isa isa) {
  check_pattern(pattern);
  const int64_t k = b.cols;
  check(b.rows == pattern.cols, "spmm: expected b to have the pattern's columns as rows");
  check(c.rows == pattern.rows && c.cols == k, "spmm: expected c of shape (m, k)");
  check(b.dtype == c.dtype, "spmm: expected b and c of one dtype");
  check_values(values, b.dtype, pattern.nnz);
  const Kernels& table = kernels(isa);
  if (c.rows == 0 || k == 0) return;

  const Grid grid = grid_of_call(pattern, k, threads);
  Arena arena(workspace);
  const Workspace w = lay_out(arena, pattern, k, b.dtype, grid);
  const int64_t active = mark_active_cols(pattern, k, w.active_cols, threads);
  // A dense output is one span in either stride order. If c is a slice, the span also covers
  // elements that are not written.
  prefer_huge_pages(
      c.data, ((c.rows - 1) * c.row_stride + (k - 1) * c.col_stride + 1) * item_size(c.dtype));
  const void* wide = wide_values(values, b.dtype, w.values, threads);

  parallel_for(grid.workers(), [&](int worker) {
    const Range tokens = part_of(k, grid.token_groups, worker / grid.row_groups, 16);
    const Range rows = rows_part_of(pattern, grid.row_groups, worker % grid.row_groups);
    SpmmTask task;
    task.pattern = pattern;
    task.values = wide;
    task.b = b;
    task.c = c;
    task.active_cols = w.active_cols;
    task.row_begin = rows.begin;
    task.row_end = rows.end;
    task.token_begin = tokens.begin;
    task.token_end = tokens.end;
    task.block = block_of(tokens.end - tokens.begin, active, accumulator_size(b.dtype));
    task.panel = static_cast<char*>(w.panels) + worker * w.panel_bytes;
    task.chunk = static_cast<char*>(w.chunks) + worker * w.chunk_bytes;
    table.spmm(task);
  });
}

}  // namespace rosa::cpu
