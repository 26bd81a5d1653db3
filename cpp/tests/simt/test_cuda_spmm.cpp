// Compares the CUDA SpMM and its launch code with the oracle, in the emulator.
#include <algorithm>
#include <limits>
#include <vector>

#include "../sweep.h"
#include "far_matrix.h"
#include "rosa/cuda.h"
#include "simt/emulator.h"

namespace rosa::test {
namespace {

using cuda::SpmmVariant;

// The emulated devices. Device 0 keeps b in shared memory if it fits. Device 1 has too little
// shared memory for that. Devices 3 and 4 have room for less of b.
constexpr int kStages = 0, kGathersLines = 1, kLikeA100 = 3, kLikeRtx = 4;

constexpr Types kCudaTypes[] = {
    {DType::kFloat32, DType::kFloat32},  {DType::kBFloat16, DType::kBFloat16},
    {DType::kBFloat16, DType::kFloat32}, {DType::kFloat16, DType::kFloat16},
    {DType::kFloat16, DType::kFloat32},
};

struct Plan {
  TilePlan plan;

  Plan(const Pattern& pattern, int tile_cols, double heavy_fill = kHeavyFill)
      : plan(make_tile_plan(pattern.view(), 128, tile_cols, heavy_fill)) {}
  PlanView view() const {
    return plan_view(plan.header.data(), static_cast<int64_t>(plan.header.size()), plan.blob.data(),
                     static_cast<int64_t>(plan.blob.size()));
  }
};

struct Problem {
  const Pattern& pattern;
  Types types;
  int64_t k;
  Layout b_layout, c_layout;
  int64_t turn;
  Matrix values, b, unwritten;
  std::vector<Expected> expected;  // (rows, k)

  Problem(const Pattern& pattern, Types types, int64_t k, Layout b_layout, Layout c_layout,
          int64_t turn)
      : pattern(pattern),
        types(types),
        k(k),
        b_layout(b_layout),
        c_layout(c_layout),
        turn(turn),
        values(types.values, pattern.nnz(), 1, layout(turn)),
        b(types.operand, pattern.cols, k, b_layout),
        unwritten(types.operand, pattern.rows, k, writable_layout(static_cast<int>(c_layout))),
        expected(static_cast<size_t>(pattern.rows * k)) {
    Random random(static_cast<uint64_t>(turn));
    values.fill(random);
    b.fill(random);
    expect();
  }
  void expect() {
    std::fill(expected.begin(), expected.end(), Expected());
    pattern.for_each([&](int64_t t, int64_t i, int64_t j) {
      for (int64_t l = 0; l < k; ++l)
        expected[static_cast<size_t>(i * k + l)].add(values.at(t), b.at(j, l));
    });
  }
  std::string describe(const std::string& how) const {
    return how + ", " + pattern.name + ", " + name(types.operand) + "/" + name(types.values) +
           ", k=" + std::to_string(k) + ", layouts " + std::to_string(static_cast<int>(b_layout)) +
           "/" + std::to_string(static_cast<int>(c_layout)) + ", turn " + std::to_string(turn);
  }

  Matrix run(SpmmVariant variant, const PlanView& plan, int device, uint64_t seed,
             const std::string& context) const {
    simt::set_seed(seed);
    const Matrix c = unwritten;
    const Buffer workspace(
        cuda::spmm_workspace_bytes(variant, pattern.view(), plan, b.view(), c.view(), device),
        turn % 3);
    cuda::spmm(variant, pattern.view(), plan, values.vector(), b.view(), c.view(), workspace.data(),
               device, nullptr);
    ROSA_CHECK(workspace.guards_intact(), context);
    return c;
  }

  // Checks that the result is accurate, that nothing else is written, and that another schedule
  // gives the same bits.
  void check(SpmmVariant variant, const PlanView& plan, int device, const std::string& how) const {
    const std::string context = describe(how);
    const Matrix values_before = values, b_before = b;
    const Matrix c = run(variant, plan, device, 0, context);
    for (int64_t i = 0; i < pattern.rows; ++i) {
      for (int64_t l = 0; l < k; ++l) {
        const Expected& exact = expected[static_cast<size_t>(i * k + l)];
        ROSA_CHECK(exact.accepts(c, c.at(i, l), types.operand),
                   context + ": element (" + std::to_string(i) + ", " + std::to_string(l) +
                       ") is " + std::to_string(c.at(i, l)) + ", exactly " +
                       std::to_string(exact.exact()));
      }
    }
    ROSA_CHECK(c.surroundings_intact(), context);
    ROSA_CHECK(values.same_bytes(values_before) && b.same_bytes(b_before), context);
    const uint64_t seed = static_cast<uint64_t>(turn) * 2 + 1;
    ROSA_CHECK(c.same_bytes(run(variant, plan, device, seed, context)), context + ", seed");
  }

  // Checks the gather kernels, which never multiply a row of b that no nonzero refers to.
  void check_gathers(const PlanView& plan, std::vector<int> devices = {kStages, kGathersLines}) {
    spoil_unreferenced(b, Referenced(pattern).cols, b_layout);
    for (int device : devices) {
      const std::string how = "device " + std::to_string(device);
      check(SpmmVariant::kGather, {}, device, how);
      if (!plan.empty()) check(SpmmVariant::kGather, plan, device, how + " with a plan");
    }
  }
};

const std::vector<int64_t>& token_counts() {
  static const std::vector<int64_t> all =
      kReduced ? std::vector<int64_t>{0, 1, 3, 9, 64, 129}
               : std::vector<int64_t>{0,  1,  2,  3,  4,  7,  8,  9,   15,  16,
                                      17, 31, 32, 33, 63, 64, 65, 127, 129, 200};
  return all;
}

void test_gather_token_counts() {
  int64_t turn = 0;
  const Plan plan(patterns()[0], 128);
  for (Types types : kCudaTypes) {
    for (int64_t k : token_counts()) {
      for (Layout b : {Layout::kColumn, Layout::kRow}) {
        ++turn;
        Problem(patterns()[0], types, k, b, turn % 3 ? b : layout(turn), turn)
            .check_gathers(turn % 4 ? PlanView{} : plan.view());
      }
    }
  }
}

void test_gather_layouts() {
  int64_t turn = 1000;
  const Pattern aligned = random_pattern(24, 32, 0.2);  // rows of b are aligned in either layout
  for (Types types : {kCudaTypes[0], kCudaTypes[1]}) {
    for (int64_t pair = 0; pair < kLayouts * kWritableLayouts; ++pair) {
      ++turn;
      if (kReduced && turn % 5 != 0) continue;
      const Pattern& pattern = turn % 3 ? aligned : patterns()[0];
      Problem(pattern, types, turn % 2 ? 72 : 6, layout(pair % kLayouts), layout(pair / kLayouts),
              turn)
          .check_gathers({});
    }
  }
}

void test_gather_patterns() {
  int64_t turn = 2000;
  for (const Pattern& pattern : patterns()) {
    const Plan plan(pattern, 128);
    for (Types types : kCudaTypes) {
      for (int64_t k : {0, 1, 4, 33}) {
        ++turn;
        if (turn % (kReduced ? 5 : pattern.cols > 1000 ? 4 : 1) != 0) continue;
        Problem(pattern, types, k, layout(turn), layout(turn / kLayouts), turn)
            .check_gathers(plan.view());
      }
    }
  }
}

// Rows that one warp computes, and rows that all warps of a block compute.
void test_gather_long_rows() {
  int64_t turn = 3000;
  const std::vector<Pattern> all = {
      {"rows of 700, 1300 and 40", 37, 2000,
       [](int64_t i, int64_t j) {
         return i == 3 ? j % 20 < 7 : i == 36 ? j % 20 < 13 : i % 5 == 0 && j % 50 == i;
       }},
      {"a full row", 9, 1999, [](int64_t i, int64_t j) { return i == 4 || j == 7; }},
      {"full rows, then none", 40, 300, [](int64_t i, int64_t) { return i < 6; }},
      {"33 to 129 entries", 97, 200, [](int64_t i, int64_t j) { return j % 100 * 3 < 97 + i * 2; }},
  };
  for (const Pattern& pattern : all) {
    const Plan plan(pattern, 128);
    for (Types types : kCudaTypes) {
      for (int64_t k : {1, 7, 40}) {
        ++turn;
        if (turn % (kReduced ? 8 : 2) != 0) continue;
        Problem(pattern, types, k, layout(turn % 2), layout(turn / 2 % 2), turn)
            .check_gathers(turn % 3 ? PlanView{} : plan.view());
      }
    }
  }
}

// A block takes several chunks of rows, several blocks share the chunks, and there are several
// chunks of tokens.
void test_gather_large() {
  int64_t turn = 4000;
  std::vector<Pattern> all = {
      random_pattern(257, 390, 0.28),
      {"tall", 2600, 9, [](int64_t i, int64_t j) { return (i * 7 + j * 3) % 11 == 0; }},
      {"heavy end", 2100, 60, [](int64_t i, int64_t j) { return i > 2000 ? j % 2 : i % 30 == j; }},
  };
  for (const Pattern& pattern : all) {
    const Plan plan(pattern, 256);
    for (Types types : kCudaTypes) {
      for (int64_t k : {3, 24, 90}) {
        ++turn;
        if (turn % (kReduced ? 7 : 3) != 0) continue;
        const Layout l = turn % 2 ? Layout::kColumn : Layout::kRow;
        Problem(pattern, types, k, l, l, turn).check_gathers(turn % 2 ? PlanView{} : plan.view());
      }
    }
  }
}

// Hidden sizes of models. Slots and static shared memory exceed 48 KiB only together. The devices
// have room for one, two or many such blocks.
void test_gather_hidden_sizes() {
  int64_t turn = 4500;
  for (int64_t cols : {2048, 3072, 11008}) {
    const Pattern pattern("hidden " + std::to_string(cols), 7, cols,
                          [&](int64_t i, int64_t j) { return j % 499 == i * 3 || j == cols - 1; });
    for (Types types : kCudaTypes) {
      for (int64_t k : {1, 2, 8}) {
        ++turn;
        if (kReduced && turn % 3 != 0) continue;
        Problem(pattern, types, k, turn % 2 ? Layout::kColumn : Layout::kRow, Layout::kColumn, turn)
            .check_gathers({}, {kStages, kLikeA100, kLikeRtx});
      }
    }
  }
}

// So many columns that only narrower slots fit, or none.
void test_gather_wide() {
  int64_t turn = 5000;
  for (int64_t cols : {15000, 30000, 60000}) {
    const Pattern pattern("wide " + std::to_string(cols), 5, cols,
                          [&](int64_t i, int64_t j) { return j % 997 == i * 3 || j == cols - 1; });
    const Plan plan(pattern, 128);
    for (Types types : {kCudaTypes[0], kCudaTypes[1], kCudaTypes[4]}) {
      for (int64_t k : {1, 3, 9, 70}) {
        ++turn;
        if (turn % (kReduced ? 7 : 3) != 0) continue;
        Problem(pattern, types, k, turn % 3 ? Layout::kColumn : Layout::kRow, Layout::kColumn, turn)
            .check_gathers(turn % 2 ? PlanView{} : plan.view(), {kStages});
      }
    }
  }
}

// A few rows and columns hold most nonzeros, as in real masks.
Pattern skewed_pattern(int64_t rows, int64_t cols, uint64_t seed) {
  Random random(seed);
  return {"skewed " + std::to_string(rows) + "x" + std::to_string(cols), rows, cols,
          [&](int64_t i, int64_t j) {
            if (i % 7 == 3 || j % 5 == 1) return false;  // empty rows and columns
            const double share =
                (i * 37 % rows < rows / 4 ? 0.5 : 0.04) * (j * 41 % cols < cols / 3 ? 0.4 : 0.02);
            return random.unit() < share;
          }};
}

Types tile_types(int64_t turn) { return kCudaTypes[turn % 2 ? 1 : 3]; }

void test_tiles() {
  int64_t turn = 6000;
  const std::vector<Pattern> all = {
      skewed_pattern(150, 300, 1),
      skewed_pattern(300, 140, 2),
      random_pattern(128, 256, 0.05, 3),  // exactly whole tiles
      random_pattern(129, 257, 0.03, 4),  // one row and column more
      {"last row and column", 200, 300, [](int64_t i, int64_t j) { return i == 199 || j == 299; }},
  };
  for (const Pattern& pattern : all) {
    for (int tile_cols : {128, 256}) {
      for (double fill : {kHeavyFill, 0.0, 1.0}) {  // mixed, all heavy, all light
        const Plan plan(pattern, tile_cols, fill);
        for (int64_t k : {1, 65, 129, 200}) {
          ++turn;
          if (turn % (kReduced ? 17 : 2) != 0) continue;
          const Layout b = turn % 4 < 2 ? Layout::kColumn : layout(turn);
          const Layout c = turn % 3 ? layout(turn / 2 % 2) : layout(turn);
          Problem(pattern, tile_types(turn / 2), k, b, c, turn)
              .check(SpmmVariant::kTile, plan.view(), kStages,
                     "tile 128x" + std::to_string(tile_cols) + " fill " + std::to_string(fill));
        }
      }
    }
  }
}

void test_tiles_of_nasty_patterns() {
  int64_t turn = 7000;
  for (const Pattern& pattern : patterns()) {
    for (double fill : {0.0, 1.0}) {
      ++turn;
      if (kReduced && turn % 4 != 0) continue;
      const Plan plan(pattern, 128, fill);
      for (int64_t k : {0, 3, 64}) {
        const Layout b = pattern.cols > 1000 ? Layout::kColumn : layout(turn);
        Problem(pattern, tile_types(turn + k), k, b, layout(turn + k), turn)
            .check(SpmmVariant::kTile, plan.view(), kStages, "tile");
      }
    }
  }
}

// More panels than the device has room for.
void test_tiles_in_chunks() {
  const Pattern pattern = skewed_pattern(400, 700, 3);
  const Plan plan(pattern, 128);
  for (Layout l : {Layout::kColumn, Layout::kRow})
    Problem(pattern, kCudaTypes[1], 330, l, l, 8000)
        .check(SpmmVariant::kTile, plan.view(), kStages, "tile, chunks");
}

// Inf and NaN must reach the result if a nonzero refers to them.
void test_nonfinite_operands_show() {
  const Pattern pattern = random_pattern(130, 140, 0.05, 9);
  const Plan plan(pattern, 128);
  for (int kernel = 0; kernel < 3; ++kernel) {
    const SpmmVariant variant = kernel == 2 ? SpmmVariant::kTile : SpmmVariant::kGather;
    Problem problem(pattern, kCudaTypes[1], 20, Layout::kColumn, Layout::kColumn, 1);
    problem.b.set(17, 19, std::numeric_limits<double>::quiet_NaN());
    problem.b.set(5, 3, std::numeric_limits<double>::infinity());
    problem.expect();
    const Matrix c =
        problem.run(variant, plan.view(), kernel == 1 ? kGathersLines : kStages, 3, "nonfinite");
    for (int64_t i = 0; i < pattern.rows; ++i) {
      for (int64_t l = 0; l < problem.k; ++l) {
        const Expected& exact = problem.expected[static_cast<size_t>(i * problem.k + l)];
        // A tile also multiplies zeros, so its tokens 3 and 19 may be NaN in any row.
        if (variant == SpmmVariant::kTile && (l == 3 || l == 19) && std::isnan(c.at(i, l)))
          continue;
        ROSA_CHECK(exact.accepts(c, c.at(i, l), DType::kBFloat16),
                   "nonfinite, kernel " + std::to_string(kernel));
      }
    }
  }
}

// Results that are subnormal in float16, and results beyond its range.
void test_extreme_values() {
  for (double scale : {1e-3, 200.0}) {
    Problem problem(patterns()[0], kCudaTypes[3], 20, Layout::kColumn, Layout::kColumn, 9000);
    Random random(5);
    problem.values.fill(random, scale);
    problem.b.fill(random, scale);
    problem.expect();
    problem.check_gathers({});
    problem.b.fill(random, scale);
    problem.expect();
    problem.check(SpmmVariant::kTile, Plan(patterns()[0], 128).view(), kStages, "tile");
  }
}

void test_far_operands() {
  const Pattern pattern("far", 5, 6, [](int64_t i, int64_t j) { return (i + j) % 3 != 0; });
  const Plan plan(pattern, 128, 0.0);
  for (bool far_rows : {true, false}) {
    const int64_t k = far_rows ? 72 : 6;
    FarMatrix b(DType::kBFloat16, 6, k, far_rows), c(DType::kBFloat16, 5, k, far_rows);
    Problem problem(pattern, kCudaTypes[1], k, Layout::kRow, Layout::kRow, 1);
    for (int64_t j = 0; j < 6; ++j)
      for (int64_t l = 0; l < k; ++l) b.set(j, l, problem.b.at(j, l));
    for (int kernel = 0; kernel < 3; ++kernel) {
      const SpmmVariant variant = kernel == 2 ? SpmmVariant::kTile : SpmmVariant::kGather;
      const int device = kernel == 1 ? kGathersLines : kStages;
      const Matrix near = problem.run(variant, plan.view(), device, 0, "far");
      const Buffer workspace(cuda::spmm_workspace_bytes(variant, pattern.view(), plan.view(),
                                                        b.view(), c.view(), device));
      cuda::spmm(variant, pattern.view(), plan.view(), problem.values.vector(), b.view(), c.view(),
                 workspace.data(), device, nullptr);
      for (int64_t i = 0; i < 5; ++i) {
        for (int64_t l = 0; l < k; ++l) {
          ROSA_CHECK(c.at(i, l) == near.at(i, l), "far, kernel " + std::to_string(kernel));
          c.set(i, l, 1e30);
        }
      }
    }
  }
}

void test_workspace() {
  const Pattern pattern = random_pattern(20, 30, 0.2);
  const Plan plan(pattern, 128);
  const Matrix b(DType::kBFloat16, 30, 64, Layout::kColumn),
      c(DType::kBFloat16, 20, 64, Layout::kColumn);
  const auto bytes = [&](SpmmVariant variant, int device) {
    return cuda::spmm_workspace_bytes(variant, pattern.view(), plan.view(), b.view(), c.view(),
                                      device);
  };
  ROSA_CHECK(bytes(SpmmVariant::kGather, kStages) == 0, "slots need no scratch");
  ROSA_CHECK(bytes(SpmmVariant::kGather, kGathersLines) >= 128 * 128, "a panel of b");
  ROSA_CHECK(bytes(SpmmVariant::kTile, kStages) >= 2 * 128 * 128, "panels of b and c");
}

void test_bad_arguments() {
  const Pattern pattern = random_pattern(20, 30, 0.2);
  const Plan plan(pattern, 128), other(random_pattern(20, 31, 0.2), 128);
  const TilePlan narrow = make_tile_plan(pattern.view(), 64, 128);
  const PlanView narrow_view =
      plan_view(narrow.header.data(), static_cast<int64_t>(narrow.header.size()),
                narrow.blob.data(), static_cast<int64_t>(narrow.blob.size()));
  const auto refused = [&](SpmmVariant variant, const PlanView& view, DType values, DType b,
                           DType c, int64_t nnz, int64_t b_rows, int64_t c_cols,
                           int device = kStages) {
    const Matrix v(values, nnz, 1, Layout::kRow), x(b, b_rows, 8, Layout::kRow),
        y(c, 20, c_cols, Layout::kRow);
    const Buffer workspace(1 << 20);
    try {
      cuda::spmm(variant, pattern.view(), view, v.vector(), x.view(), y.view(), workspace.data(),
                 device, nullptr);
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  const DType full = DType::kFloat32, bf16 = DType::kBFloat16, half = DType::kFloat16,
              wide = DType::kFloat64;
  const SpmmVariant gather = SpmmVariant::kGather, tile = SpmmVariant::kTile;
  const int64_t nnz = pattern.nnz();
  ROSA_CHECK(!refused(gather, {}, full, bf16, bf16, nnz, 30, 8), "good arguments");
  ROSA_CHECK(refused(gather, {}, full, bf16, half, nnz, 30, 8), "two dtypes");
  ROSA_CHECK(refused(gather, {}, half, bf16, bf16, nnz, 30, 8), "values' dtype");
  ROSA_CHECK(refused(gather, {}, wide, wide, wide, nnz, 30, 8), "float64");
  ROSA_CHECK(refused(gather, {}, full, full, full, nnz - 1, 30, 8), "number of values");
  ROSA_CHECK(refused(gather, {}, full, full, full, nnz, 29, 8), "rows of b");
  ROSA_CHECK(refused(gather, {}, full, full, full, nnz, 30, 7), "columns of c");
  ROSA_CHECK(refused(gather, other.view(), full, full, full, nnz, 30, 8), "another plan");
  ROSA_CHECK(!refused(tile, plan.view(), bf16, bf16, bf16, nnz, 30, 8), "good tiles");
  ROSA_CHECK(refused(tile, {}, bf16, bf16, bf16, nnz, 30, 8), "no plan");
  ROSA_CHECK(refused(tile, plan.view(), full, full, full, nnz, 30, 8), "float32 tiles");
  ROSA_CHECK(refused(tile, plan.view(), full, bf16, bf16, nnz, 30, 8), "float32 values of tiles");
  ROSA_CHECK(refused(tile, narrow_view, bf16, bf16, bf16, nnz, 30, 8), "tile shape");
  ROSA_CHECK(refused(tile, plan.view(), bf16, bf16, bf16, nnz, 30, 8, kGathersLines),
             "too little shared memory");
}

void test_two_callers() {
  run_concurrently([&](int caller) {
    const Pattern pattern = skewed_pattern(140, 150, 5);
    const Plan plan(pattern, 128);
    for (int64_t round = 0; round < 3; ++round) {
      Problem problem(pattern, kCudaTypes[1], 70, Layout::kColumn, Layout::kColumn,
                      100 * caller + round);
      problem.check(round == 0 ? SpmmVariant::kTile : SpmmVariant::kGather, plan.view(),
                    round == 2 ? kGathersLines : kStages, "two callers");
    }
  });
}

}  // namespace
}  // namespace rosa::test

int main() {
  using namespace rosa::test;
  test_gather_token_counts();
  test_gather_layouts();
  test_gather_patterns();
  test_gather_long_rows();
  test_gather_large();
  test_gather_hidden_sizes();
  test_gather_wide();
  test_tiles();
  test_tiles_of_nasty_patterns();
  test_tiles_in_chunks();
  test_nonfinite_operands_show();
  test_extreme_values();
  test_far_operands();
  test_workspace();
  test_bad_arguments();
  test_two_callers();
  return exit_status();
}
