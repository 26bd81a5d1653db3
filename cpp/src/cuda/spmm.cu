// SpMM: the choice of a kernel, the division of a call, and the addresses of its scratch.
#include <cmath>

#include "arena.h"
#include "cuda/dispatch.h"
#include "cuda/pack.cuh"
#include "cuda/spmm_gather.cuh"
#include "cuda/spmm_staged.cuh"
#include "cuda/spmm_tile.cuh"
#include "rosa/cuda.h"

namespace rosa::cuda {
namespace {

int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
int64_t larger(int64_t x, int64_t y) { return x > y ? x : y; }

// ---- slots in shared memory ----------------------------------------------------------------

// Slots of 16 bytes are best at any number of tokens. A block of compute capability 9.0 has room
// for such slots of 13,000 columns. Narrower slots need proportionally more passes over the CSR
// arrays. Beyond these numbers of tokens, gathering lines reads less, and the launch of its pack no
// longer matters (estimates).
constexpr int64_t kMostTokensOfSlots8 = 512;
constexpr int64_t kMostTokensOfSlots4 = 64;
// The static shared memory of a block with 16-byte slots. Blocks with other slots have less.
// Dynamic shared memory begins at a multiple of 1024. On compute capability 9.0 the compiler counts
// 1 KiB more as static, which the system keeps. The last term allows for a runtime that counts it
// too.
template <class T>
constexpr int64_t kStagedStatic =
    (sizeof(StagedShared<T, kPerVec16<T>>) + 1023) / 1024 * 1024 + 1024;

struct StagedChoice {
  int slot_bytes;  // 0: slots do not fit, or do not pay
  int64_t shared_bytes;
};

template <class T>
StagedChoice choose_slots(int64_t cols, int64_t tokens, const DeviceProperties& device) {
  for (int bytes = 16; bytes >= 4; bytes /= 2) {
    const int64_t per_slot = bytes / static_cast<int64_t>(sizeof(T));
    if (bytes > 4 && tokens <= per_slot / 2) continue;  // half of the slot would be empty
    const int64_t shared = slots_for(cols) * bytes;
    if (shared + kStagedStatic<T> > device.shared_bytes) continue;
    if (bytes == 8 && tokens > kMostTokensOfSlots8) break;
    if (bytes == 4 && tokens > kMostTokensOfSlots4) break;
    return {bytes, shared};
  }
  return {0, 0};
}

StagedChoice choose_slots(const MatrixView& b, const DeviceProperties& device) {
  return item_size(b.dtype) == 4 ? choose_slots<float>(b.rows, b.cols, device)
                                 : choose_slots<Bf16>(b.rows, b.cols, device);
}

template <class T, class V, int kTokens>
void launch_staged(StagedArgs& args, int64_t nnz, const StagedChoice& choice,
                   const DeviceProperties& device, Stream stream) {
  constexpr int64_t item = sizeof(T);
  const int64_t groups = divide_up(args.tokens, kTokens);
  const int64_t shared = choice.shared_bytes + kStagedStatic<T>;
  const int64_t per_sm = smaller(blocks_per_multiprocessor(shared, device), 2);
  // More parts of the rows divide the work, but each part reads all of b again. The sum of both
  // times is least at a square root. Times are in ns. An entry or a row takes a multiprocessor 0.1
  // clocks, and 0.03 more per token. L2 delivers 5.5 TB/s to all of them (estimates). At 4096 x
  // 4096 and 0.6 % this gives 56 parts for 2 tokens, 41 for 8, and 14 for 64.
  const double work_ns = (0.06 + 0.018 * kTokens) * static_cast<double>(nnz + args.rows);
  const double stage_ns = static_cast<double>(larger(args.cols, 1) * kTokens * item) / 5500.0 *
                          static_cast<double>(groups);
  int64_t parts = static_cast<int64_t>(std::sqrt(work_ns / stage_ns));
  parts = smaller(parts, device.multiprocessors * per_sm / groups);
  parts = larger(smaller(parts, args.rows), 1);
  args.share = (nnz + args.rows) / parts;

  // As many warps as a multiprocessor holds at 64 registers, in one block or in two. Fewer if there
  // is not an entry or a store of staging for every thread.
  const bool alone = per_sm == 1 || parts * groups <= device.multiprocessors;
  const int64_t most = alone ? kStagedMostThreads : kStagedMostThreads / 2;
  const int64_t useful = nnz / parts + choice.shared_bytes / 16;
  int64_t threads = 2 * kWarp;
  while (threads < most && threads < useful) threads *= 2;
  launch<spmm_staged_kernel<T, V, kTokens>>(
      Grid{dim3(static_cast<unsigned>(groups), static_cast<unsigned>(parts)),
           dim3(static_cast<unsigned>(threads)), choice.shared_bytes, stream},
      args);
}

template <class T, class V>
void launch_staged(StagedArgs& args, int64_t nnz, const StagedChoice& choice,
                   const DeviceProperties& device, Stream stream) {
  constexpr int kMost = kPerVec16<T>;
  if (choice.slot_bytes == 16) {
    launch_staged<T, V, kMost>(args, nnz, choice, device, stream);
  } else if (choice.slot_bytes == 8) {
    launch_staged<T, V, kMost / 2>(args, nnz, choice, device, stream);
  } else {
    launch_staged<T, V, kMost / 4>(args, nnz, choice, device, stream);
  }
}

Staging staging_of(const MatrixView& b, int slot_bytes) {
  const int64_t size = item_size(b.dtype);
  const uintptr_t at = reinterpret_cast<uintptr_t>(b.data);
  const bool one_token = b.cols == 1;
  if (b.row_stride == 1 && at % 16 == 0 && (one_token || b.col_stride * size % 16 == 0))
    return Staging::kColumns;
  if (b.col_stride == 1 && at % static_cast<uintptr_t>(slot_bytes) == 0 &&
      b.row_stride * size % slot_bytes == 0)
    return Staging::kSlots;
  return Staging::kElements;
}

void run_staged(const CsrView& pattern, const VectorView& values, const MatrixView& b,
                const MatrixView& c, const StagedChoice& choice, const DeviceProperties& device,
                Stream stream) {
  StagedArgs args;
  args.crow = pattern.crow_indices;
  args.col = pattern.col_indices;
  args.values = values.data;
  args.value_stride = values.stride;
  args.b = b.data;
  args.b_row_stride = b.row_stride;
  args.b_token_stride = b.col_stride;
  args.c = c.data;
  args.c_row_stride = c.row_stride;
  args.c_token_stride = c.col_stride;
  args.rows = pattern.rows;
  args.tokens = b.cols;
  args.cols = static_cast<int32_t>(pattern.cols);
  args.staging = staging_of(b, choice.slot_bytes);
  with_float(b.dtype, [&](auto type) {
    using T = decltype(type);
    if (values.dtype == b.dtype) {
      launch_staged<T, T>(args, pattern.nnz, choice, device, stream);
    } else {
      launch_staged<T, float>(args, pattern.nnz, choice, device, stream);
    }
  });
}

// ---- lines ---------------------------------------------------------------------------------

// Maximum blocks along y of the grids. They are the lines of a chunk.
constexpr int64_t kMostLines = 65535;

// Tokens are processed in chunks, which bounds the size of the panels.
struct Schedule {
  bool packed;         // otherwise b is read in place
  bool through_panel;  // results go through a panel, too
  int64_t lines, chunk_lines;
  void *panel_b, *panel_c;
};

int64_t padded_cols(const PlanView& plan, const MatrixView& b) {
  return plan.empty() ? b.rows : plan.cols.padded;
}

Schedule schedule(Arena& arena, SpmmVariant variant, const PlanView& plan, const MatrixView& b,
                  const MatrixView& c, const DeviceProperties& device) {
  const bool tiles = variant == SpmmVariant::kTile;
  Schedule s = {};
  s.packed = tiles || !readable_in_place(b);
  s.through_panel = tiles && c.col_stride != 1;
  s.lines = divide_up(b.cols, tokens_per_line(b.dtype));
  const int64_t line_b = s.packed ? padded_cols(plan, b) * kLineBytes : 0;
  const int64_t line_c = s.through_panel ? plan.rows.padded * int64_t{kLineBytes} : 0;
  int64_t most = kMostLines;
  if (line_b + line_c > 0) most = smaller(most, device.panel_bytes / (line_b + line_c));
  const int64_t least = tiles ? 2 : 1;  // lines that a block takes at a time
  s.chunk_lines = smaller(s.lines, larger(most / least, 1) * least);
  s.panel_b = arena.take(line_b * s.chunk_lines);
  s.panel_c = arena.take(line_c * s.chunk_lines);
  return s;
}

// One chunk of tokens.
struct Chunk {
  int64_t first, tokens, lines;
  Lines b;
  void* c;  // at the first token
};

template <class Run>
void for_each_chunk(const Schedule& s, const PlanView& plan, const MatrixView& b,
                    const MatrixView& c, Stream stream, const Run& run) {
  const PackSide none = {};
  PackSide side = {};
  if (s.packed) side = pack_side(b, plan.empty() ? nullptr : &plan.cols, s.panel_b);
  const int64_t size = item_size(b.dtype), per_line = tokens_per_line(b.dtype);
  for (int64_t line = 0; line < s.lines; line += s.chunk_lines) {
    Chunk chunk;
    chunk.first = line * per_line;
    chunk.lines = smaller(s.chunk_lines, s.lines - line);
    chunk.tokens = smaller(chunk.lines * per_line, b.cols - chunk.first);
    chunk.c = static_cast<char*>(c.data) + chunk.first * c.col_stride * size;
    pack(side, none, b.dtype, chunk.first, chunk.tokens, stream);
    if (s.packed) {
      chunk.b = panel_lines(s.panel_b, padded_cols(plan, b), chunk.lines);
    } else {
      MatrixView part = b;
      part.data = static_cast<char*>(b.data) + chunk.first * size;
      part.cols = chunk.tokens;
      chunk.b = lines_in_place(part);
    }
    run(chunk);
  }
}

void run_gather(const Schedule& s, const CsrView& pattern, const PlanView& plan,
                const VectorView& values, const MatrixView& b, const MatrixView& c,
                const DeviceProperties& device, Stream stream) {
  for_each_chunk(s, plan, b, c, stream, [&](const Chunk& chunk) {
    GatherRowsArgs args;
    args.crow = pattern.crow_indices;
    args.col = pattern.col_indices;
    args.position = s.packed ? plan.cols.position : nullptr;
    args.values = values.data;
    args.value_stride = values.stride;
    args.b = chunk.b;
    args.c = chunk.c;
    args.c_row_stride = c.row_stride;
    args.c_token_stride = c.col_stride;
    args.rows = pattern.rows;
    args.tokens = chunk.tokens;
    // A block takes kGatherRows rows, and so writes whole lines of the output, if there are enough
    // blocks for that: two rounds of four blocks per multiprocessor.
    args.rows_per_block = kGatherRows;
    while (args.rows_per_block > 16 &&
           divide_up(pattern.rows, args.rows_per_block) * chunk.lines < 8 * device.multiprocessors)
      args.rows_per_block /= 2;
    const Grid grid = {dim3(static_cast<unsigned>(divide_up(pattern.rows, args.rows_per_block)),
                            static_cast<unsigned>(chunk.lines)),
                       dim3(kGatherRowsThreads), 0, stream};
    with_float(b.dtype, [&](auto type) {
      using T = decltype(type);
      if (values.dtype == b.dtype) {
        launch<spmm_gather_kernel<T, T>>(grid, args);
      } else {
        launch<spmm_gather_kernel<T, float>>(grid, args);
      }
    });
  });
}

// ---- tiles ---------------------------------------------------------------------------------

void run_tiles(const Schedule& s, const CsrView& pattern, const PlanView& plan,
               const VectorView& values, const MatrixView& b, const MatrixView& c, Stream stream) {
  SpmmTileArgs args;
  args.tile_cols = plan.tile_cols;
  args.tile_col_bits = plan.tile_cols == 256 ? 8 : 7;
  args.active_rows = plan.rows.active;
  args.active_cols = plan.cols.active;
  args.padded_rows = plan.rows.padded;
  args.tile = plan.tile;
  args.tile_begin = plan.tile_begin;
  args.strip_tile = plan.strip_tile;
  args.strip_light = plan.strip_light;
  args.code = plan.code;
  args.entry = plan.entry;
  args.light_row = plan.light_row;
  args.light_col = plan.light_col;
  args.row_order = plan.rows.order;
  args.row_position = plan.rows.position;
  args.heavy_nnz = plan.heavy_nnz;
  args.values = values.data;
  args.value_stride = values.stride;
  args.panel = s.through_panel ? static_cast<unsigned char*>(s.panel_c) : nullptr;
  args.rows = pattern.rows;
  args.c_row_stride = c.row_stride;
  args.c_token_stride = c.col_stride;

  for_each_chunk(s, plan, b, c, stream, [&](const Chunk& chunk) {
    args.b = chunk.b;
    args.c = chunk.c;
    args.lines = chunk.lines;
    args.tokens = chunk.tokens;
    args.token_blocks = static_cast<uint32_t>(divide_up(chunk.lines, 2));
    args.strip_blocks = static_cast<uint32_t>(plan.strips) * args.token_blocks;
    uint32_t blocks = args.strip_blocks;
    if (!s.through_panel && plan.rows.active < pattern.rows)
      blocks += static_cast<uint32_t>(divide_up(pattern.rows, kSpmmTileRows)) * args.token_blocks;
    if (blocks > 0) {
      const Grid grid = {dim3(blocks), dim3(kSpmmTileThreads), kSpmmTileSharedBytes, stream};
      if (b.dtype == DType::kBFloat16) {
        launch<spmm_tile_kernel<Bf16>>(grid, args);
      } else {
        launch<spmm_tile_kernel<Half>>(grid, args);
      }
    }
    if (s.through_panel) {
      UnpermuteArgs back;
      back.panel = static_cast<const unsigned char*>(s.panel_c);
      back.padded_rows = plan.rows.padded;
      back.position = plan.rows.position;
      back.c = chunk.c;
      back.rows = pattern.rows;
      back.tokens = chunk.tokens;
      back.row_stride = c.row_stride;
      back.token_stride = c.col_stride;
      const Grid grid = {dim3(static_cast<unsigned>(divide_up(pattern.rows, kUnpermuteRows)),
                              static_cast<unsigned>(chunk.lines)),
                         dim3(kUnpermuteThreads), 0, stream};
      launch<spmm_unpermute_kernel<uint16_t>>(grid, back);
    }
  });
}

// ---- checks --------------------------------------------------------------------------------

void check_operands(SpmmVariant variant, const CsrView& pattern, const PlanView& plan,
                    const MatrixView& b, const MatrixView& c) {
  check(b.rows == pattern.cols, "spmm: expected b to have the pattern's columns as rows");
  check(c.rows == pattern.rows && c.cols == b.cols, "spmm: expected c of shape (m, k)");
  check(b.dtype == c.dtype, "spmm: expected b and c of one dtype");
  check(b.dtype != DType::kFloat64, "spmm: expected float32, bfloat16 or float16 on CUDA");
  check_plan(plan, pattern);
  if (variant != SpmmVariant::kTile) return;
  check(!plan.empty(), "spmm: expected a tile plan for the tile kernel");
  check(b.dtype != DType::kFloat32, "spmm: expected bfloat16 or float16 for the tile kernel");
  check(plan.tile_rows == kSpmmTileRows && (plan.tile_cols == 128 || plan.tile_cols == 256),
        "spmm: expected a plan of 128 x 128 or 128 x 256 tiles");
}

// Whether the kernel with slots serves the call. It needs no scratch.
bool stages(SpmmVariant variant, const StagedChoice& choice) {
  return variant == SpmmVariant::kGather && choice.slot_bytes > 0;
}

}  // namespace

int64_t spmm_shared_bytes(SpmmVariant variant) {
  return variant == SpmmVariant::kTile ? kSpmmTileSharedBytes : 0;
}

int64_t spmm_workspace_bytes(SpmmVariant variant, const CsrView& pattern, const PlanView& plan,
                             const MatrixView& b, const MatrixView& c, int device) {
  check_operands(variant, pattern, plan, b, c);
  const DeviceProperties on = properties(device);
  check_shared_bytes(spmm_shared_bytes(variant), on);
  if (c.rows == 0 || c.cols == 0 || stages(variant, choose_slots(b, on))) return 0;
  return bytes_of([&](Arena& arena) { schedule(arena, variant, plan, b, c, on); });
}

void spmm(SpmmVariant variant, const CsrView& pattern, const PlanView& plan,
          const VectorView& values, const MatrixView& b, const MatrixView& c, void* workspace,
          int device, Stream stream) {
  check_operands(variant, pattern, plan, b, c);
  check_values(values, b.dtype, pattern.nnz);
  check(variant != SpmmVariant::kTile || values.dtype == b.dtype,
        "spmm: expected values of b's dtype for the tile kernel");
  if (c.rows == 0 || c.cols == 0) return;

  const DeviceGuard guard(device);
  const DeviceProperties on = properties(device);
  check_shared_bytes(spmm_shared_bytes(variant), on);
  const StagedChoice choice = choose_slots(b, on);
  if (stages(variant, choice)) {
    run_staged(pattern, values, b, c, choice, on, stream);
    return;
  }
  Arena arena(workspace);
  const Schedule s = schedule(arena, variant, plan, b, c, on);
  if (variant == SpmmVariant::kTile) {
    run_tiles(s, pattern, plan, values, b, c, stream);
  } else {
    run_gather(s, pattern, plan, values, b, c, on, stream);
  }
}

}  // namespace rosa::cuda
