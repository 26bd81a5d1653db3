#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa/kernels.h"
#include "cpu/parallel_for.h"
#include "cpu/partition.h"
#include "rosa/check.h"
#include "rosa/ops.h"

namespace rosa::cpu {
namespace {

// Every group of tokens sums into nnz partial sums of its own, which are added in a fixed order at
// the end. More groups than this are not worth their memory, so further threads divide the rows
// instead.
constexpr int kMaxTokenGroups = 8;

struct Workspace {
  uint8_t* active_cols;
  void* partials;
  void* panels;
  void* chunks;
  int64_t partial_bytes;             // of one group of tokens
  int64_t panel_bytes, chunk_bytes;  // of one worker
};

Workspace lay_out(Arena& arena, const CsrView& pattern, int64_t k, DType dtype, const Grid& grid) {
  const int64_t size = accumulator_size(dtype);
  const int64_t block = widest_block((k + grid.token_groups - 1) / grid.token_groups);
  Workspace w;
  w.active_cols = static_cast<uint8_t*>(arena.take(pattern.cols));
  // Rounded up to whole cache lines, so that no two groups write to the same line.
  w.partial_bytes = (pattern.nnz * size + 63) / 64 * 64;
  w.panel_bytes = pattern.cols * block * size;
  w.chunk_bytes = kChunkRows * block * size;
  w.partials = arena.take(grid.token_groups * w.partial_bytes);
  w.panels = arena.take(grid.workers() * w.panel_bytes);
  w.chunks = arena.take(grid.workers() * w.chunk_bytes);
  return w;
}

Grid grid_of_call(const CsrView& pattern, int64_t k, int threads) {
  const int64_t work = (pattern.nnz + pattern.rows + pattern.cols) * k;
  return grid_of(k, useful_threads(work, threads), kMaxTokenGroups);
}

// out[t] = sum of the groups' partials, in the order of the groups.
template <class T>
void finish(const Workspace& w, int groups, const VectorView& out, int threads) {
  using A = Accumulator<T>;
  T* to = static_cast<T*>(out.data);
  const int workers = useful_threads(out.size * groups, threads);
  parallel_for(workers, [&](int worker) {
    const Range range = part_of(out.size, workers, worker);
    for (int64_t t = range.begin; t < range.end; ++t) {
      A sum = static_cast<const A*>(w.partials)[t];
      for (int g = 1; g < groups; ++g) {
        const char* partial = static_cast<const char*>(w.partials) + g * w.partial_bytes;
        sum += reinterpret_cast<const A*>(partial)[t];
      }
      to[t * out.stride] = Narrow<T>::from(sum);
    }
  });
}

}  // namespace

int64_t sddmm_workspace_bytes(const CsrView& pattern, int64_t k, DType dtype, int threads, Isa) {
  const Grid grid = grid_of_call(pattern, k, threads);
  return bytes_of([&](Arena& arena) { lay_out(arena, pattern, k, dtype, grid); });
}

void sddmm(const CsrView& pattern, const MatrixView& a, const MatrixView& b, const VectorView& out,
           void* workspace, int threads, Isa isa) {
  check_pattern(pattern);
  const int64_t k = a.cols;
  check(a.rows == pattern.rows, "sddmm: expected a to have the pattern's rows");
  check(b.rows == pattern.cols, "sddmm: expected b to have the pattern's columns as rows");
  check(b.cols == k, "sddmm: expected a and b to have one k");
  check(a.dtype == b.dtype, "sddmm: expected a and b of one dtype");
  check_values(out, a.dtype, pattern.nnz);
  const Kernels& table = kernels(isa);
  if (pattern.nnz == 0) return;

  const Grid grid = grid_of_call(pattern, k, threads);
  Arena arena(workspace);
  const Workspace w = lay_out(arena, pattern, k, a.dtype, grid);
  const int64_t active = mark_active_cols(pattern, k, w.active_cols, threads);

  parallel_for(grid.workers(), [&](int worker) {
    const int group = worker / grid.row_groups;
    const Range tokens = part_of(k, grid.token_groups, group, 16);
    const Range rows = rows_part_of(pattern, grid.row_groups, worker % grid.row_groups);
    SddmmTask task;
    task.pattern = pattern;
    task.a = a;
    task.b = b;
    task.active_cols = w.active_cols;
    task.row_begin = rows.begin;
    task.row_end = rows.end;
    task.token_begin = tokens.begin;
    task.token_end = tokens.end;
    task.block = block_of(tokens.end - tokens.begin, active, accumulator_size(a.dtype));
    task.panel = static_cast<char*>(w.panels) + worker * w.panel_bytes;
    task.chunk = static_cast<char*>(w.chunks) + worker * w.chunk_bytes;
    task.partial = static_cast<char*>(w.partials) + group * w.partial_bytes;
    table.sddmm(task);
  });

  with_type(out.dtype,
            [&](auto type) { finish<decltype(type)>(w, grid.token_groups, out, threads); });
}

}  // namespace rosa::cpu
