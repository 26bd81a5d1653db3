// Compares make_tile_plan, array by array, with straightforward counting and sorting.
#include "rosa/tile_plan.h"

#include <algorithm>
#include <limits>
#include <map>
#include <stdexcept>
#include <tuple>

#include "support.h"

namespace rosa::test {
namespace {

using Ints = std::vector<int32_t>;

// The lengths come from the plan. Each comparison checks them against the test's own counts.
Ints copy_of(const int32_t* array, int64_t size) { return {array, array + size}; }

struct Entry {
  int32_t t, i, j;
  int32_t p, q;  // positions
};

// One axis as expected: a stable sort of the indices that have a nonzero.
struct ExpectedAxis {
  Ints position, order, sector;
  int32_t padded;

  ExpectedAxis(const Ints& count, int32_t edge) : position(count.size(), -1) {
    for (size_t i = 0; i < count.size(); ++i) {
      if (count[i] == 0) continue;
      order.push_back(static_cast<int32_t>(i));
      const int32_t s = static_cast<int32_t>(i / 16);
      if (std::find(sector.begin(), sector.end(), s) == sector.end()) sector.push_back(s);
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t i, int32_t j) { return count[i] > count[j]; });
    for (size_t p = 0; p < order.size(); ++p) position[order[p]] = static_cast<int32_t>(p);
    padded = (static_cast<int32_t>(order.size()) + edge - 1) / edge * edge;
  }
};

void check_axis(const PlanAxis& got, const ExpectedAxis& expected, const std::string& context) {
  ROSA_CHECK(got.size == static_cast<int64_t>(expected.position.size()), context);
  ROSA_CHECK(got.active == static_cast<int32_t>(expected.order.size()), context);
  ROSA_CHECK(got.padded == expected.padded, context);
  ROSA_CHECK(got.sectors == static_cast<int32_t>(expected.sector.size()), context);
  ROSA_CHECK(copy_of(got.position, got.size) == expected.position, context);
  ROSA_CHECK(copy_of(got.order, got.active) == expected.order, context);
  ROSA_CHECK(copy_of(got.sector, got.sectors) == expected.sector, context);
}

void check_tiles(const PlanView& plan, const std::vector<Entry>& entries, double heavy_fill,
                 const std::string& context) {
  std::map<std::pair<int32_t, int32_t>, std::vector<Entry>> tiles;  // in the plan's order of tiles
  for (const Entry& e : entries) tiles[{e.p / plan.tile_rows, e.q / plan.tile_cols}].push_back(e);
  const double need = heavy_fill * plan.tile_rows * plan.tile_cols;
  Ints tile, tile_begin = {0}, code, heavy;
  std::vector<Entry> light;
  for (const auto& [at, members] : tiles) {
    if (static_cast<double>(members.size()) < need) {
      light.insert(light.end(), members.begin(), members.end());
      continue;
    }
    tile.insert(tile.end(), {at.first, at.second});
    for (const Entry& e : members) {  // in CSR order, as `entries` are
      code.push_back(e.p % plan.tile_rows * plan.tile_cols + e.q % plan.tile_cols);
      heavy.push_back(e.t);
    }
    tile_begin.push_back(static_cast<int32_t>(heavy.size()));
  }
  std::sort(light.begin(), light.end(),
            [](const Entry& x, const Entry& y) { return std::tie(x.p, x.q) < std::tie(y.p, y.q); });
  Ints entry = heavy, light_row, light_col;
  for (const Entry& e : light) {
    entry.push_back(e.t);
    light_row.push_back(e.p);
    light_col.push_back(e.q);
  }
  Ints strip_tile, strip_light;
  ROSA_CHECK(plan.strips == plan.rows.padded / plan.tile_rows, context);
  for (int32_t s = 0; s <= plan.strips; ++s) {
    int32_t before = 0;
    while (before < static_cast<int32_t>(tile.size() / 2) && tile[2 * before] < s) ++before;
    strip_tile.push_back(before);
    const auto first = std::lower_bound(light_row.begin(), light_row.end(), s * plan.tile_rows);
    strip_light.push_back(static_cast<int32_t>(first - light_row.begin()));
  }

  ROSA_CHECK(plan.nnz == static_cast<int64_t>(entries.size()), context);
  ROSA_CHECK(plan.tiles == static_cast<int32_t>(tile.size() / 2), context);
  ROSA_CHECK(plan.heavy_nnz == static_cast<int64_t>(heavy.size()), context);
  ROSA_CHECK(plan.light_nnz() == static_cast<int64_t>(light.size()), context);
  ROSA_CHECK(copy_of(plan.tile, int64_t{2} * plan.tiles) == tile, context);
  ROSA_CHECK(copy_of(plan.tile_begin, plan.tiles + 1) == tile_begin, context);
  ROSA_CHECK(copy_of(plan.strip_tile, plan.strips + 1) == strip_tile, context);
  ROSA_CHECK(copy_of(plan.strip_light, plan.strips + 1) == strip_light, context);
  ROSA_CHECK(copy_of(plan.code, plan.heavy_nnz) == code, context);
  ROSA_CHECK(copy_of(plan.entry, plan.nnz) == entry, context);
  ROSA_CHECK(copy_of(plan.light_row, plan.light_nnz()) == light_row, context);
  ROSA_CHECK(copy_of(plan.light_col, plan.light_nnz()) == light_col, context);
}

PlanView view_of(const TilePlan& plan) {
  return plan_view(plan.header.data(), static_cast<int64_t>(plan.header.size()), plan.blob.data(),
                   static_cast<int64_t>(plan.blob.size()));
}

void test_case(const Pattern& pattern, int tile_rows, int tile_cols, double heavy_fill) {
  const std::string context = pattern.name + ", tiles " + std::to_string(tile_rows) + "x" +
                              std::to_string(tile_cols) + ", fill " + std::to_string(heavy_fill);
  const TilePlan plan = make_tile_plan(pattern.view(), tile_rows, tile_cols, heavy_fill);
  const TilePlan again = make_tile_plan(pattern.view(), tile_rows, tile_cols, heavy_fill);
  ROSA_CHECK(plan.header == again.header && plan.blob == again.blob, context);

  const PlanView view = view_of(plan);
  ROSA_CHECK(view.tile_rows == tile_rows && view.tile_cols == tile_cols, context);
  ROSA_CHECK(!view.empty(), context);
  Ints row_count(static_cast<size_t>(pattern.rows)), col_count(static_cast<size_t>(pattern.cols));
  pattern.for_each([&](int64_t, int64_t i, int64_t j) {
    ++row_count[i];
    ++col_count[j];
  });
  const ExpectedAxis rows(row_count, tile_rows), cols(col_count, tile_cols);
  check_axis(view.rows, rows, context + ", rows");
  check_axis(view.cols, cols, context + ", columns");
  std::vector<Entry> entries;
  pattern.for_each([&](int64_t t, int64_t i, int64_t j) {
    entries.push_back({static_cast<int32_t>(t), static_cast<int32_t>(i), static_cast<int32_t>(j),
                       rows.position[i], cols.position[j]});
  });
  check_tiles(view, entries, heavy_fill, context);
  for (int s = 0; s <= kSlabs; ++s)
    ROSA_CHECK(plan.header[kPlanFields + s] == pattern.crow[pattern.rows * s / kSlabs], context);
  // The arrays lie one after the other and end with the blob.
  ROSA_CHECK(view.rows.position == plan.blob.data(), context);
  ROSA_CHECK(view.light_col + view.light_nnz() == plan.blob.data() + plan.blob.size(), context);
}

// Rows of about the length at which rows are cut, beside empty rows.
Pattern long_rows() {
  const int64_t lengths[] = {511, 0, 512, 513, 1024, 1025, 0, 2600, 1, 512};
  return {"long rows", 10, 2600,
          [&](int64_t i, int64_t j) { return (j * 7 + i) % 2600 < lengths[i]; }};
}

// Some rows and columns are dense and the others are nearly empty. So the plan has heavy tiles and
// light entries.
Pattern skewed() {
  Random random(5);
  return {"skewed", 333, 417, [&](int64_t i, int64_t j) {
            const double share = (i % 3 == 0 ? 0.5 : 0.02) * (j % 5 == 1 ? 1.0 : 0.05);
            return random.unit() < share;
          }};
}

// There are more tiles than can be counted at once, so the builder works strip by strip.
void test_diagonal() {
  const int32_t n = kReduced ? 20'000 : 300'000;
  Ints crow(static_cast<size_t>(n) + 1), col(static_cast<size_t>(n));
  for (int32_t i = 0; i < n; ++i) {
    crow[i] = i;
    col[i] = n - 1 - i;
  }
  crow[n] = n;
  const TilePlan plan = make_tile_plan({crow.data(), col.data(), n, n, n}, 128, 128);
  const PlanView view = view_of(plan);
  ROSA_CHECK(view.tiles == 0 && view.light_nnz() == n, "diagonal");
  for (int32_t e = 0; e < n; ++e)
    ROSA_CHECK(view.light_row[e] == e && view.light_col[e] == n - 1 - e && view.entry[e] == e,
               "diagonal");
}

template <class Function>
void check_refused(Function function, const std::string& context) {
  try {
    function();
    ROSA_CHECK(false, context + ": accepted");
  } catch (const std::invalid_argument&) {
  }
}

void test_refusals() {
  const Pattern& pattern = patterns()[0];
  for (const auto& [rows, cols] : {std::pair{0, 128},
                                   {128, 0},
                                   {-16, 128},
                                   {128, -16},
                                   {24, 128},
                                   {128, 100},
                                   {512, 256},
                                   {16, 1 << 20},
                                   {1 << 20, 1 << 20}}) {
    check_refused([&] { make_tile_plan(pattern.view(), rows, cols); },
                  "tiles " + std::to_string(rows) + "x" + std::to_string(cols));
  }
  for (double fill : {-0.01, std::numeric_limits<double>::quiet_NaN()}) {
    check_refused([&] { make_tile_plan(pattern.view(), 128, 128, fill); },
                  "fill " + std::to_string(fill));
  }
  CsrView cut = pattern.view();
  --cut.nnz;
  check_refused([&] { make_tile_plan(cut, 128, 128); }, "nnz below the row pointers' end");

  const TilePlan plan = make_tile_plan(pattern.view(), 128, 128);
  const auto view = [&](std::vector<int64_t> header, int64_t size) {
    check_refused(
        [&] {
          plan_view(header.data(), static_cast<int64_t>(header.size()), plan.blob.data(), size);
        },
        "header of " + std::to_string(header.size()) + ", blob of " + std::to_string(size));
  };
  const int64_t size = static_cast<int64_t>(plan.blob.size());
  view(plan.header, size - 1);
  view(plan.header, size + 1);
  view(plan.header, 0);
  view(std::vector<int64_t>(kPlanHeader, 0), size);
  view(std::vector<int64_t>(plan.header.begin(), plan.header.end() - 1), size);
  for (PlanField field :
       {kPlanRows, kPlanCols, kPlanNnz, kPlanActiveRows, kPlanTiles, kPlanHeavyNnz}) {
    std::vector<int64_t> header = plan.header;
    header[field] += 1000;
    view(header, size);
  }
  ROSA_CHECK(PlanView().empty(), "no plan");
}

void test_all() {
  const std::vector<Pattern> more = {long_rows(), skewed(), random_pattern(128, 256, 0.1),
                                     random_pattern(129, 257, 0.012),
                                     random_pattern(700, 300, 0.05, 7)};
  const double infinity = std::numeric_limits<double>::infinity();
  for (const auto* set : {&patterns(), &large_patterns(), &more}) {
    for (const Pattern& pattern : *set) {
      for (const auto& [rows, cols] : {std::pair{128, 128}, {128, 256}, {256, 128}, {16, 32}}) {
        for (double fill : {kHeavyFill, 0.0, 0.3, 1.0}) test_case(pattern, rows, cols, fill);
      }
      test_case(pattern, 64, 64, infinity);  // nothing is heavy
    }
  }
  test_diagonal();
  test_refusals();
  run_concurrently([](int) { test_case(large_patterns()[0], 128, 128, kHeavyFill); });
}

}  // namespace
}  // namespace rosa::test

int main() {
  rosa::test::test_all();
  return rosa::test::exit_status();
}
