#include "rosa/tile_plan.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include "rosa/check.h"

namespace rosa {
namespace {

int32_t tiles_along(int64_t active, int64_t edge) {
  return static_cast<int32_t>((active + edge - 1) / edge);
}

// The header determines the size of every array in the blob. `take` is called for each array in
// turn.
template <class Take>
PlanView lay_out(const int64_t* header, const Take& take) {
  const auto field = [&](PlanField f) { return static_cast<int32_t>(header[f]); };
  PlanView plan;
  plan.nnz = header[kPlanNnz];
  plan.heavy_nnz = header[kPlanHeavyNnz];
  plan.tile_rows = field(kPlanTileRows);
  plan.tile_cols = field(kPlanTileCols);
  plan.tiles = field(kPlanTiles);
  plan.strips = tiles_along(header[kPlanActiveRows], plan.tile_rows);
  const auto axis = [&](PlanField size, PlanField active, PlanField sectors, int32_t edge) {
    PlanAxis a;
    a.size = header[size];
    a.active = field(active);
    a.padded = tiles_along(a.active, edge) * edge;
    a.sectors = field(sectors);
    a.position = take(a.size);
    a.order = take(a.active);
    a.sector = take(a.sectors);
    return a;
  };
  plan.rows = axis(kPlanRows, kPlanActiveRows, kPlanRowSectors, plan.tile_rows);
  plan.cols = axis(kPlanCols, kPlanActiveCols, kPlanColSectors, plan.tile_cols);
  plan.tile = take(int64_t{2} * plan.tiles);
  plan.tile_begin = take(plan.tiles + 1);
  plan.strip_tile = take(plan.strips + 1);
  plan.strip_light = take(plan.strips + 1);
  plan.code = take(plan.heavy_nnz);
  plan.entry = take(plan.nnz);
  plan.light_row = take(plan.light_nnz());
  plan.light_col = take(plan.light_nnz());
  return plan;
}

int64_t blob_size(const int64_t* header) {
  int64_t total = 0;
  lay_out(header, [&](int64_t size) {
    total += size;
    return static_cast<const int32_t*>(nullptr);
  });
  return total;
}

struct Axis {
  std::vector<int32_t> position, order, sector;

  // A bucket sort by descending count, which keeps ties in index order.
  explicit Axis(const std::vector<int32_t>& count) : position(count.size(), -1) {
    const int32_t most = count.empty() ? 0 : *std::max_element(count.begin(), count.end());
    std::vector<int32_t> first(static_cast<size_t>(most) + 2, 0);
    for (int32_t c : count) ++first[static_cast<size_t>(most - c) + 1];
    std::partial_sum(first.begin(), first.end(), first.begin());
    order.resize(count.size());
    for (size_t i = 0; i < count.size(); ++i)
      order[static_cast<size_t>(first[static_cast<size_t>(most - count[i])]++)] =
          static_cast<int32_t>(i);
    while (!order.empty() && count[static_cast<size_t>(order.back())] == 0) order.pop_back();
    for (size_t p = 0; p < order.size(); ++p)
      position[static_cast<size_t>(order[p])] = static_cast<int32_t>(p);
    for (size_t i = 0; i < count.size(); ++i) {
      const int32_t s = static_cast<int32_t>(i) / kSector;
      if (count[i] > 0 && (sector.empty() || sector.back() != s)) sector.push_back(s);
    }
  }
  int32_t active() const { return static_cast<int32_t>(order.size()); }
};

// Sorts entries into tiles. It works strip by strip, so it counts only one row of tiles at a time.
// A diagonal of a million rows has 61 million tiles, of which 7,813 hold a nonzero.
class Tiler {
 public:
  Tiler(const CsrView& pattern, const Axis& rows, const Axis& cols, int tile_rows, int tile_cols)
      : pattern_(pattern),
        rows_(rows),
        cols_(cols),
        tile_rows_(tile_rows),
        tile_cols_(tile_cols),
        strips_(tiles_along(rows.active(), tile_rows)),
        tile_col_of_(cols.position.size()),
        of_tile_col_(static_cast<size_t>(tiles_along(cols.active(), tile_cols))) {
    for (size_t j = 0; j < tile_col_of_.size(); ++j) tile_col_of_[j] = cols.position[j] / tile_cols;
  }

  // Finds the tiles of at least `need` nonzeros.
  void find_heavy(int32_t need) {
    for (int32_t s = 0; s < strips_; ++s) {
      std::fill(of_tile_col_.begin(), of_tile_col_.end(), 0);
      for_each_entry(s, [&](int32_t, int32_t, int32_t c) { ++of_tile_col_[c]; });
      for (size_t c = 0; c < of_tile_col_.size(); ++c) {
        if (of_tile_col_[c] < need) continue;
        tile.insert(tile.end(), {s, static_cast<int32_t>(c)});
        tile_begin.push_back(tile_begin.back() + of_tile_col_[c]);
      }
      strip_tile.push_back(count());
    }
  }

  // Writes the entries in plan order, and the place where the light entries of each strip begin.
  void list_entries(int32_t* code, int32_t* entry, int32_t* light_row, int32_t* light_col,
                    int32_t* strip_light) {
    const int32_t heavy = tile_begin.back();
    std::vector<int32_t> next(tile_begin.begin(), tile_begin.end());
    std::vector<int32_t>& tile_of = of_tile_col_;
    std::vector<int32_t> by_row;
    std::vector<std::pair<int32_t, int32_t>> in_row;  // column position, entry
    int32_t light = 0;
    for (int32_t s = 0; s < strips_; ++s) {
      std::fill(tile_of.begin(), tile_of.end(), -1);
      for (int32_t k = strip_tile[s]; k < strip_tile[s + 1]; ++k) tile_of[tile[2 * k + 1]] = k;

      const int32_t first = s * tile_rows_, end = std::min(first + tile_rows_, rows_.active());
      by_row.assign(rows_.order.begin() + first, rows_.order.begin() + end);
      std::sort(by_row.begin(), by_row.end());  // CSR order, which each tile's list keeps
      for (int32_t i : by_row) {
        const int32_t in_tile = (rows_.position[i] - first) * tile_cols_;
        for_each_in_row(i, [&](int32_t t, int32_t q, int32_t c) {
          if (tile_of[c] < 0) return;
          const int32_t at = next[tile_of[c]]++;
          code[at] = in_tile + q - c * tile_cols_;
          entry[at] = t;
        });
      }

      strip_light[s] = light;
      for (int32_t p = first; p < end; ++p) {
        in_row.clear();
        for_each_in_row(rows_.order[p], [&](int32_t t, int32_t q, int32_t c) {
          if (tile_of[c] < 0) in_row.emplace_back(q, t);
        });
        std::sort(in_row.begin(), in_row.end());
        for (const auto& [q, t] : in_row) {
          light_row[light] = p;
          light_col[light] = q;
          entry[heavy + light++] = t;
        }
      }
    }
    strip_light[strips_] = light;
  }

  int32_t count() const { return static_cast<int32_t>(tile.size() / 2); }

  std::vector<int32_t> tile, tile_begin = {0}, strip_tile = {0};

 private:
  // Calls visit(entry, column position, tile column) for each entry of row i.
  template <class Visit>
  void for_each_in_row(int32_t i, const Visit& visit) const {
    for (int32_t t = pattern_.crow_indices[i]; t < pattern_.crow_indices[i + 1]; ++t) {
      const int32_t j = pattern_.col_indices[t];
      visit(t, cols_.position[j], tile_col_of_[j]);
    }
  }
  template <class Visit>
  void for_each_entry(int32_t strip, const Visit& visit) const {
    const int32_t end = std::min((strip + 1) * tile_rows_, rows_.active());
    for (int32_t p = strip * tile_rows_; p < end; ++p) for_each_in_row(rows_.order[p], visit);
  }

  const CsrView& pattern_;
  const Axis &rows_, &cols_;
  const int32_t tile_rows_, tile_cols_, strips_;
  // The tile column of each column. A table costs less than a division per nonzero.
  std::vector<int32_t> tile_col_of_;
  // Per tile column of the current strip: first its count, then its tile's number.
  std::vector<int32_t> of_tile_col_;
};

}  // namespace

TilePlan make_tile_plan(const CsrView& pattern, int tile_rows, int tile_cols, double heavy_fill) {
  check(tile_rows > 0 && tile_cols > 0 && tile_rows % kSector == 0 && tile_cols % kSector == 0 &&
            int64_t{tile_rows} * tile_cols <= 65536,
        "tile_plan: expected tile edges that are multiples of 16 and at most 65,536 elements");
  check(heavy_fill >= 0, "tile_plan: expected a heavy fill of 0 or more");
  check_pattern(pattern);
  const int32_t* crow = pattern.crow_indices;
  std::vector<int32_t> row_count(static_cast<size_t>(pattern.rows));
  std::vector<int32_t> col_count(static_cast<size_t>(pattern.cols), 0);
  for (int64_t i = 0; i < pattern.rows; ++i) row_count[i] = crow[i + 1] - crow[i];
  for (int64_t t = 0; t < pattern.nnz; ++t) ++col_count[pattern.col_indices[t]];
  const Axis rows(row_count), cols(col_count);

  // With a fill above 1 no tile is heavy. With a fill of 0 every tile that has a nonzero is heavy.
  const double area = static_cast<double>(tile_rows) * tile_cols;
  const double need = std::ceil(std::min(heavy_fill * area, area + 1));
  Tiler tiler(pattern, rows, cols, tile_rows, tile_cols);
  tiler.find_heavy(std::max(static_cast<int32_t>(need), 1));

  TilePlan plan;
  plan.header.resize(kPlanHeader);
  plan.header[kPlanRows] = pattern.rows;
  plan.header[kPlanCols] = pattern.cols;
  plan.header[kPlanNnz] = pattern.nnz;
  plan.header[kPlanTileRows] = tile_rows;
  plan.header[kPlanTileCols] = tile_cols;
  plan.header[kPlanActiveRows] = rows.active();
  plan.header[kPlanActiveCols] = cols.active();
  plan.header[kPlanRowSectors] = static_cast<int64_t>(rows.sector.size());
  plan.header[kPlanColSectors] = static_cast<int64_t>(cols.sector.size());
  plan.header[kPlanTiles] = tiler.count();
  plan.header[kPlanHeavyNnz] = tiler.tile_begin.back();
  for (int64_t s = 0; s <= kSlabs; ++s)
    plan.header[kPlanFields + s] = crow[pattern.rows * s / kSlabs];

  plan.blob.resize(static_cast<size_t>(blob_size(plan.header.data())));
  const PlanView view = plan_view(plan.header.data(), kPlanHeader, plan.blob.data(),
                                  static_cast<int64_t>(plan.blob.size()));
  const auto writable = [&](const int32_t* at) {
    return plan.blob.data() + (at - plan.blob.data());
  };
  const auto fill = [&](const int32_t* at, const std::vector<int32_t>& from) {
    std::copy(from.begin(), from.end(), writable(at));
  };
  fill(view.rows.position, rows.position);
  fill(view.rows.order, rows.order);
  fill(view.rows.sector, rows.sector);
  fill(view.cols.position, cols.position);
  fill(view.cols.order, cols.order);
  fill(view.cols.sector, cols.sector);
  fill(view.tile, tiler.tile);
  fill(view.tile_begin, tiler.tile_begin);
  fill(view.strip_tile, tiler.strip_tile);
  tiler.list_entries(writable(view.code), writable(view.entry), writable(view.light_row),
                     writable(view.light_col), writable(view.strip_light));
  return plan;
}

PlanView plan_view(const int64_t* header, int64_t header_size, const int32_t* blob, int64_t size) {
  check(header_size == kPlanHeader && header[kPlanTileRows] > 0 && header[kPlanTileCols] > 0 &&
            blob_size(header) == size,
        "expected a tile plan's header and a blob of the size that it states");
  const int32_t* next = blob;
  return lay_out(header, [&](int64_t count) {
    const int32_t* array = next;
    next += count;
    return array;
  });
}

}  // namespace rosa
