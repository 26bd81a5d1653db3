// SDDMM packs the operands, computes heavy tiles on the tensor cores, gathers the light nonzeros,
// and finalizes. The gather variant does the same without heavy tiles.
#include "arena.h"
#include "cuda/dispatch.h"
#include "cuda/pack.cuh"
#include "cuda/sddmm_finalize.cuh"
#include "cuda/sddmm_gather.cuh"
#include "cuda/sddmm_tile.cuh"
#include "cuda/sddmm_wgmma.h"
#include "rosa/cuda.h"

namespace rosa::cuda {
namespace {

// Maximum blocks along y of a grid. They are the lines of a chunk.
constexpr int64_t kMostLines = 65535;
// Warps that a multiprocessor needs to hide L2's latency.
constexpr int64_t kWarpsPerSm = 16;

using Tile128 = TileShape<128, 128, 3>;
using Tile128Short = TileShape<128, 128, 2>;
using Tile256 = TileShape<128, 256, 3>;

// How a device computes the tiles of a plan.
struct TileChoice {
  int stages;            // of the ring; 0 for wgmma, which has its own ring
  int64_t shared_bytes;  // of a block
  int64_t blocks;        // per multiprocessor at once
};

template <class Shape>
TileChoice choice_of(const DeviceProperties& device) {
  const int64_t fit = blocks_per_multiprocessor(Shape::kSharedBytes, device);
  return {Shape::kStages, Shape::kSharedBytes, fit < Shape::kMostBlocks ? fit : Shape::kMostBlocks};
}

TileChoice choose_tile(SddmmVariant variant, int tile_cols, const DeviceProperties& device) {
  if (variant == SddmmVariant::kWgmma) return {0, wgmma_shared_bytes(), 1};
  if (tile_cols == Tile256::kCols) return choice_of<Tile256>(device);
  // Two stages take 68 KiB, three take 96. On compute capability 8.0, two stages leave room for a
  // second block on a multiprocessor. That should hide L2's latency and the first block's sampling
  // better than a third stage does (not measured). 9.0 holds two blocks of three stages. 8.6 and
  // 8.9 hold one block of either.
  const TileChoice two = choice_of<Tile128Short>(device), three = choice_of<Tile128>(device);
  return two.blocks > three.blocks ? two : three;
}

// The division of a call, and the addresses of its scratch.
struct Schedule {
  bool packed_a, packed_b;
  int64_t lines;        // along an index, for all tokens
  int64_t chunk_lines;  // of one chunk
  int64_t chunks;
  int64_t light_nnz;  // nonzeros that are gathered
  int64_t heavy_nnz;  // nonzeros in tiles
  int32_t splits;     // of the tokens, for the gathered nonzeros
  int32_t slices;     // of partial sums, for the tiles
  TileChoice tile;
  int64_t tile_blocks;  // in the grid
  void *panel_a, *panel_b;
  float *heavy, *light;
};

int64_t padded_rows(const PlanView& plan, const MatrixView& x) {
  return plan.empty() ? x.rows : plan.rows.padded;
}
int64_t padded_cols(const PlanView& plan, const MatrixView& x) {
  return plan.empty() ? x.rows : plan.cols.padded;
}

Schedule schedule(Arena& arena, SddmmVariant variant, const CsrView& pattern, const PlanView& plan,
                  const MatrixView& a, const MatrixView& b, const DeviceProperties& device) {
  const bool tiles = variant != SddmmVariant::kGather;
  Schedule s = {};
  s.packed_a = tiles || !readable_in_place(a);
  s.packed_b = tiles || !readable_in_place(b);
  s.lines = divide_up(a.cols, tokens_per_line(a.dtype));
  const int64_t panel_a = s.packed_a ? padded_rows(plan, a) * kLineBytes : 0;
  const int64_t panel_b = s.packed_b ? padded_cols(plan, b) * kLineBytes : 0;
  s.chunk_lines = s.lines;
  if (panel_a + panel_b > 0) {
    const int64_t most = device.panel_bytes / (panel_a + panel_b);
    s.chunk_lines = most < 1 ? 1 : most > kMostLines ? kMostLines : most;
  }
  s.chunks = s.lines == 0 ? 1 : divide_up(s.lines, s.chunk_lines);
  s.chunk_lines = divide_up(s.lines, s.chunks);

  s.heavy_nnz = tiles ? plan.heavy_nnz : 0;
  s.light_nnz = pattern.nnz - s.heavy_nnz;
  if (s.light_nnz > 0) {
    const int64_t warps = divide_up(s.light_nnz, kWarp);
    const int64_t wanted = device.multiprocessors * kWarpsPerSm / warps;
    const int64_t most = s.chunk_lines / kGatherLines;
    s.splits = static_cast<int32_t>(wanted < most ? wanted : most);
    if (s.splits < 1) s.splits = 1;
  }
  if (s.heavy_nnz > 0) {
    s.tile = choose_tile(variant, plan.tile_cols, device);
    check_shared_bytes(s.tile.shared_bytes, device);
    s.tile_blocks = device.multiprocessors * s.tile.blocks;
    s.slices = 1;
    // The last chunk may be shorter than the others.
    for (int64_t lines : {s.chunk_lines, s.lines - (s.chunks - 1) * s.chunk_lines}) {
      const int64_t units = lines * plan.tiles;
      const StreamK work = {units, s.tile_blocks < units ? s.tile_blocks : units};
      const int32_t owners = static_cast<int32_t>(work.most_owners(lines));
      if (owners > s.slices) s.slices = owners;
    }
  }
  s.panel_a = arena.take(panel_a * s.chunk_lines);
  s.panel_b = arena.take(panel_b * s.chunk_lines);
  s.heavy = static_cast<float*>(arena.take(s.slices * s.heavy_nnz * 4));
  s.light = static_cast<float*>(arena.take(s.splits * s.light_nnz * 4));
  return s;
}

// The lines of one chunk of tokens, in a panel or in place.
Lines chunk_of(const MatrixView& x, bool packed, const void* panel, int64_t padded, int64_t first,
               int64_t tokens) {
  const int64_t lines = divide_up(tokens, tokens_per_line(x.dtype));
  if (packed) return panel_lines(panel, padded, lines);
  MatrixView part = x;
  part.data = static_cast<char*>(x.data) + first * item_size(x.dtype);
  part.cols = tokens;
  return lines_in_place(part);
}

template <class Shape>
void launch_tile(const TileArgs& args, DType dtype, Stream stream, bool early) {
  const Grid grid = {dim3(static_cast<unsigned>(args.work.blocks)), dim3(Shape::kThreads),
                     Shape::kSharedBytes, stream, early};
  if (dtype == DType::kBFloat16) {
    launch<sddmm_tile_kernel<Bf16, Shape>>(grid, args);
  } else {
    launch<sddmm_tile_kernel<Half, Shape>>(grid, args);
  }
}

void run_tiles(SddmmVariant variant, const PlanView& plan, const TileChoice& tile,
               const TileArgs& args, DType dtype, Stream stream, bool early) {
  if (variant == SddmmVariant::kWgmma) {
    launch_wgmma(args, dtype, stream, early);
  } else if (plan.tile_cols == Tile256::kCols) {
    launch_tile<Tile256>(args, dtype, stream, early);
  } else if (tile.stages == Tile128Short::kStages) {
    launch_tile<Tile128Short>(args, dtype, stream, early);
  } else {
    launch_tile<Tile128>(args, dtype, stream, early);
  }
}

void check_variant(SddmmVariant variant, const PlanView& plan, DType dtype) {
  if (variant == SddmmVariant::kGather) return;
  check(!plan.empty(), "sddmm: expected a tile plan for a tile kernel");
  check(dtype == DType::kBFloat16 || dtype == DType::kFloat16,
        "sddmm: expected bfloat16 or float16 for a tile kernel");
  const bool wide = plan.tile_cols == Tile256::kCols;
  check(plan.tile_rows == 128 && (wide || plan.tile_cols == Tile128::kCols),
        "sddmm: expected a plan of 128 x 128 or 128 x 256 tiles");
  check(variant == SddmmVariant::kTile || wide, "sddmm: expected a plan of 128 x 256 tiles");
}

}  // namespace

int64_t sddmm_shared_bytes(SddmmVariant variant, int tile_cols, int device) {
  if (variant == SddmmVariant::kGather) return 0;
  return choose_tile(variant, tile_cols, properties(device)).shared_bytes;
}

int64_t sddmm_workspace_bytes(SddmmVariant variant, const CsrView& pattern, const PlanView& plan,
                              const MatrixView& a, const MatrixView& b, int device) {
  check_variant(variant, plan, a.dtype);
  if (a.cols == 0) variant = SddmmVariant::kGather;
  const DeviceProperties on = properties(device);
  return bytes_of([&](Arena& arena) { schedule(arena, variant, pattern, plan, a, b, on); });
}

void sddmm(SddmmVariant variant, const CsrView& pattern, const PlanView& plan, const MatrixView& a,
           const MatrixView& b, const VectorView& out, void* workspace, int device, Stream stream) {
  check(a.rows == pattern.rows, "sddmm: expected a to have the pattern's rows");
  check(b.rows == pattern.cols, "sddmm: expected b to have the pattern's columns as rows");
  check(a.cols == b.cols, "sddmm: expected a and b to have one k");
  check(a.dtype == b.dtype, "sddmm: expected a and b of one dtype");
  check_values(out, a.dtype, pattern.nnz);
  check_plan(plan, pattern);
  check_variant(variant, plan, a.dtype);
  if (pattern.nnz == 0) return;
  // Without tokens there is nothing to multiply. The gather then writes the zeros.
  if (a.cols == 0) variant = SddmmVariant::kGather;

  const DeviceGuard guard(device);
  Arena arena(workspace);
  const DeviceProperties on = properties(device);
  const Schedule s = schedule(arena, variant, pattern, plan, a, b, on);
  PackSide pack_a = {}, pack_b = {};
  if (s.packed_a) pack_a = pack_side(a, plan.empty() ? nullptr : &plan.rows, s.panel_a);
  if (s.packed_b) pack_b = pack_side(b, plan.empty() ? nullptr : &plan.cols, s.panel_b);

  GatherEntries entries = {};
  entries.count = s.light_nnz;
  if (variant == SddmmVariant::kGather) {
    entries.crow = pattern.crow_indices;
    entries.rows = static_cast<int32_t>(pattern.rows);
    entries.col = pattern.col_indices;
    entries.row_position = s.packed_a ? plan.rows.position : nullptr;
    entries.col_position = s.packed_b ? plan.cols.position : nullptr;
  } else {
    entries.row = plan.light_row;
    entries.col = plan.light_col;
  }

  // No kernel of this call overlaps with what the caller launched before it.
  bool early = false;
  for (int64_t chunk = 0; chunk < s.chunks; ++chunk) {
    const int64_t per_line = tokens_per_line(a.dtype);
    const int64_t first = chunk * s.chunk_lines * per_line;
    const int64_t left = a.cols - first;
    const int64_t tokens = left < s.chunk_lines * per_line ? left : s.chunk_lines * per_line;
    const int64_t lines = divide_up(tokens, per_line);
    pack(pack_a, pack_b, a.dtype, first, tokens, stream, early);
    if (pack_a.groups + pack_b.groups > 0) early = on.early_launch;
    if (s.light_nnz > 0) {
      GatherArgs args;
      args.a = chunk_of(a, s.packed_a, s.panel_a, padded_rows(plan, a), first, tokens);
      args.b = chunk_of(b, s.packed_b, s.panel_b, padded_cols(plan, b), first, tokens);
      args.entries = entries;
      args.blocks = lines;
      args.partial = s.light;
      args.accumulate = chunk > 0;
      const Grid grid = {dim3(static_cast<unsigned>(divide_up(s.light_nnz, kGatherWarps * kWarp)),
                              static_cast<unsigned>(s.splits)),
                         dim3(kGatherWarps * kWarp), 0, stream, early};
      with_float(a.dtype,
                 [&](auto type) { launch<sddmm_gather_kernel<decltype(type)>>(grid, args); });
    }
    if (s.heavy_nnz > 0) {
      TileArgs args;
      args.a = static_cast<const unsigned char*>(s.panel_a);
      args.b = static_cast<const unsigned char*>(s.panel_b);
      args.padded_rows = plan.rows.padded;
      args.padded_cols = plan.cols.padded;
      args.blocks = static_cast<int32_t>(lines);
      args.tile = plan.tile;
      args.tile_begin = plan.tile_begin;
      args.code = plan.code;
      args.partial = s.heavy;
      args.heavy_nnz = s.heavy_nnz;
      args.slices = s.slices;
      const int64_t units = lines * plan.tiles;
      args.work = {units, s.tile_blocks < units ? s.tile_blocks : units};
      args.accumulate = chunk > 0;
      run_tiles(variant, plan, s.tile, args, a.dtype, stream, on.early_launch);
    }
  }

  const Slices heavy = {s.heavy, s.heavy_nnz, s.slices}, light = {s.light, s.light_nnz, s.splits};
  const int32_t* entry = variant == SddmmVariant::kGather ? nullptr : plan.entry;
  const Grid grid = {dim3(static_cast<unsigned>(divide_up(pattern.nnz, kFinalizeThreads))),
                     dim3(kFinalizeThreads), 0, stream, on.early_launch};
  with_float(out.dtype, [&](auto type) {
    using T = decltype(type);
    launch<sddmm_finalize_kernel<T>>(grid, heavy, light, entry, static_cast<T*>(out.data),
                                     out.stride);
  });
}

}  // namespace rosa::cuda
