// The tile plan: what the CUDA kernels know about a pattern beyond its indices. The host makes it
// once.
//
// Sort the rows and columns of a real mask by their number of nonzeros. Then 5-16 % of the tiles
// hold 99 % of the nonzeros. The plan holds this order, the tiles that are worth a dense product
// (heavy), and the nonzeros outside them (light).
#pragma once

#include <cstdint>
#include <vector>

#include "rosa/views.h"

namespace rosa {

// A tile is heavy if its fill is at least this. Between 0.8 and 1.5 % the modelled time of real
// masks changes by less than 3 %.
constexpr double kHeavyFill = 0.011;
// Original columns that a pack reads together: 32 bytes of a 16-bit type, which is the unit that
// DRAM delivers.
constexpr int kSector = 16;
// Number of slabs of rows. The header has the CSR offset at each slab boundary, for kernels that
// work slab by slab.
constexpr int kSlabs = 32;

// The header holds host integers in this order, then kSlabs + 1 CSR offsets. Offset s is the first
// entry of row rows * s / kSlabs.
enum PlanField : int {
  kPlanRows,
  kPlanCols,
  kPlanNnz,
  kPlanTileRows,
  kPlanTileCols,
  kPlanActiveRows,
  kPlanActiveCols,
  kPlanRowSectors,
  kPlanColSectors,
  kPlanTiles,
  kPlanHeavyNnz,
  kPlanFields,
};
constexpr int kPlanHeader = kPlanFields + kSlabs + 1;

// One axis of the permuted matrix. A position is a place in the order by descending nnz, with ties
// by index. Rows or columns without a nonzero have no position.
struct PlanAxis {
  int64_t size;             // of the original axis
  int32_t active;           // number of rows or columns with a nonzero
  int32_t padded;           // `active` rounded up to whole tiles
  int32_t sectors;          // groups of kSector originals, one of them active
  const int32_t* position;  // (size) original -> position, -1 where empty
  const int32_t* order;     // (active) position -> original
  const int32_t* sector;    // (sectors) numbers of these groups, ascending
};

// The plan as kernels see it. Sizes are on the host; arrays are where the blob is.
struct PlanView {
  int64_t nnz = 0, heavy_nnz = 0;
  int32_t tile_rows = 0, tile_cols = 0;
  int32_t tiles = 0, strips = 0;  // a strip is a row of tiles: padded rows / tile_rows
  PlanAxis rows = {}, cols = {};
  // Heavy tiles, sorted by (tile row, tile column).
  const int32_t* tile = nullptr;         // (tiles, 2) tile row, tile column
  const int32_t* tile_begin = nullptr;   // (tiles + 1) into the heavy part of plan order
  const int32_t* strip_tile = nullptr;   // (strips + 1) first heavy tile of each strip
  const int32_t* strip_light = nullptr;  // (strips + 1) first light entry of each strip
  // Plan order: first the nonzeros of heavy tiles 0, 1, ..., in CSR order within each tile. Then
  // the light nonzeros by (row position, column position).
  const int32_t* code = nullptr;       // (heavy_nnz) row in tile * tile_cols + column in tile
  const int32_t* entry = nullptr;      // (nnz) plan order -> CSR entry
  const int32_t* light_row = nullptr;  // (nnz - heavy_nnz) row position
  const int32_t* light_col = nullptr;  // (nnz - heavy_nnz) column position

  bool empty() const { return tile_rows == 0; }
  int64_t light_nnz() const { return nnz - heavy_nnz; }
};

struct TilePlan {
  std::vector<int64_t> header;  // kPlanHeader
  std::vector<int32_t> blob;
};

// Makes the plan of a pattern. Raises std::invalid_argument unless tile edges are positive
// multiples of 16, a tile has at most 65,536 elements, and heavy_fill is 0 or more.
TilePlan make_tile_plan(const CsrView& pattern, int tile_rows, int tile_cols,
                        double heavy_fill = kHeavyFill);

// A view of a plan. Its blob of `blob_size` integers lies at `blob`, in host or device memory.
// Raises std::invalid_argument if the header does not match the size.
PlanView plan_view(const int64_t* header, int64_t header_size, const int32_t* blob,
                   int64_t blob_size);

}  // namespace rosa
