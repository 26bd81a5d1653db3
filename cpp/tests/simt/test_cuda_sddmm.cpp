// Compares the CUDA SDDMM and its launch code with the oracle, in the emulator.
#include <vector>

#include "sddmm_problem.h"

namespace rosa::test {
namespace {

void test_gather_patterns() {
  int64_t turn = 0;
  for (const Pattern& pattern : patterns()) {
    const Plan plan(pattern, 128);
    for (Types types : kCudaTypes) {
      for (int64_t k : {0, 1, 4, 33, 65}) {
        ++turn;
        if (kReduced && turn % 3 != 0) continue;
        const Problem problem(pattern, types, k, layout(turn), layout(turn / kLayouts), turn);
        problem.check(SddmmVariant::kGather, {}, "gather");
        problem.check(SddmmVariant::kGather, plan.view(), "gather with a plan");
      }
    }
  }
}

void test_gather_layouts() {
  int64_t turn = 1000;
  const Plan plan(patterns()[0], 128);
  for (Types types : {kCudaTypes[0], kCudaTypes[1]}) {
    for (int64_t pair = 0; pair < kLayouts * kLayouts; ++pair) {
      ++turn;
      if (kReduced && turn % 5 != 0) continue;
      // Multiples of a segment may be read in place, others may not.
      const int64_t k = turn % 2 ? 72 : 70;
      const Problem problem(patterns()[0], types, k, layout(pair / kLayouts), layout(pair), turn);
      problem.check(SddmmVariant::kGather, turn % 3 ? PlanView{} : plan.view(), "gather");
    }
  }
}

// Token counts with whole chunks of a row in registers, with splits of the tokens, and with several
// chunks of panels.
void test_gather_many_tokens() {
  int64_t turn = 2000;
  const Pattern small = random_pattern(23, 31, 0.2), wide = random_pattern(160, 900, 0.01);
  const Pattern row("one row", 1, 40, [](int64_t, int64_t j) { return j % 2 == 0; });
  const Plan plan(wide, 128);
  for (Types types : {kCudaTypes[0], kCudaTypes[2], kCudaTypes[4]}) {
    for (Layout l : {Layout::kRow, Layout::kColumn}) {
      for (int64_t k : {511, 512, 1024, 1032, 2056, 5000}) {
        ++turn;
        if (kReduced && turn % 4 != 0) continue;
        Problem(small, types, k, l, l, turn).check(SddmmVariant::kGather, {}, "gather");
        Problem(row, types, k, l, Layout::kRow, turn).check(SddmmVariant::kGather, {}, "gather");
      }
      ++turn;
      Problem(wide, types, 300, l, Layout::kColumn, turn)
          .check(SddmmVariant::kGather, turn % 2 ? PlanView{} : plan.view(), "gather, chunks");
    }
  }
}

void test_tiles() {
  int64_t turn = 3000;
  const std::vector<Pattern> all = {
      skewed_pattern(150, 300, 1),
      skewed_pattern(300, 140, 2),
      random_pattern(128, 256, 0.05, 3),  // exactly whole tiles
      random_pattern(129, 257, 0.03, 4),  // one row and column more
      {"last row and column", 200, 300, [](int64_t i, int64_t j) { return i == 199 || j == 299; }},
  };
  for (const Pattern& pattern : all) {
    for (int tile_cols : {128, 256}) {
      for (double fill : {kHeavyFill, 0.0, 0.2}) {  // mixed, all heavy, (almost) all light
        const Plan plan(pattern, tile_cols, fill);
        for (int64_t k : {1, 65, 200}) {
          ++turn;
          if (turn % (kReduced ? 9 : 2) != 0) continue;
          const Types types = kCudaTypes[1 + turn / 2 % 4];
          const Layout first = turn % 4 < 2 ? Layout::kColumn : layout(turn);
          const Layout second = turn % 3 ? Layout::kColumn : layout(turn / 3);
          Problem(pattern, types, k, first, second, turn)
              .check(SddmmVariant::kTile, plan.view(),
                     "tile 128x" + std::to_string(tile_cols) + " fill " + std::to_string(fill));
        }
      }
    }
  }
}

void test_tiles_of_nasty_patterns() {
  int64_t turn = 4000;
  for (const Pattern& pattern : patterns()) {
    for (double fill : {0.0, 1.0}) {
      ++turn;
      if (kReduced && turn % 4 != 0) continue;
      const Plan plan(pattern, 128, fill);
      for (int64_t k : {0, 3, 64}) {
        Problem(pattern, kCudaTypes[1 + turn % 4], k, layout(turn), layout(turn / 3), turn)
            .check(SddmmVariant::kTile, plan.view(), "tile");
      }
    }
  }
}

// More line blocks than stages, on several schedules: some errors show on only a few of them.
void test_schedules() {
  const Pattern pattern = skewed_pattern(150, 300, 5);
  for (int tile_cols : {128, 256}) {
    const Plan plan(pattern, tile_cols, 0.0);
    const Problem problem(pattern, kCudaTypes[2], 700, Layout::kColumn, Layout::kRow, 5000);
    const std::string context = problem.describe("schedules 128x" + std::to_string(tile_cols));
    constexpr int kLongChunks = 2;  // the device with room for long chunks
    const Matrix out = problem.run(SddmmVariant::kTile, plan.view(), 0, context, kLongChunks);
    for (int64_t t = 0; t < pattern.nnz(); ++t) {
      ROSA_CHECK(
          problem.expected[static_cast<size_t>(t)].accepts(out, out.at(t), problem.types.operand),
          context + ": entry " + std::to_string(t));
    }
    for (uint64_t seed = 1; seed <= (kReduced ? 3 : 8); ++seed) {
      const Matrix again =
          problem.run(SddmmVariant::kTile, plan.view(), seed, context, kLongChunks);
      ROSA_CHECK(out.same_bytes(again), context + ", seed " + std::to_string(seed));
    }
  }
}

// The ring has two stages if that puts more blocks on a multiprocessor, and three otherwise. Tiles
// that a device has no room for are refused before the launch.
void test_tiles_on_other_devices() {
  const int64_t two = cuda::sddmm_shared_bytes(SddmmVariant::kTile, 128, kLikeA100);
  const int64_t three = cuda::sddmm_shared_bytes(SddmmVariant::kTile, 128, 0);
  ROSA_CHECK(2 * (two + 1024) <= 164 * 1024 && three == 96 * 1024, "stages");
  ROSA_CHECK(cuda::sddmm_shared_bytes(SddmmVariant::kTile, 128, kLikeRtx) == three, "stages");
  ROSA_CHECK(cuda::sddmm_shared_bytes(SddmmVariant::kGather, 256, kLikeRtx) == 0, "gather");
  const Pattern pattern = skewed_pattern(150, 300, 6);
  int64_t turn = 6000;
  for (int device : {kLikeA100, kLikeRtx}) {
    for (double fill : {kHeavyFill, 0.0}) {
      const Plan plan(pattern, 128, fill);
      for (int64_t k : {1, 64, 129, 700}) {
        ++turn;
        if (kReduced && turn % 3 != 0) continue;
        Problem(pattern, kCudaTypes[1 + turn % 4], k, Layout::kColumn, layout(turn), turn)
            .check(SddmmVariant::kTile, plan.view(), "device " + std::to_string(device), device);
      }
    }
  }
  const Plan wide(pattern, 256, 0.0);
  const Problem problem(pattern, kCudaTypes[1], 65, Layout::kColumn, Layout::kColumn, turn);
  problem.check(SddmmVariant::kTile, wide.view(), "wide on an A100", kLikeA100);
  std::string refusal;
  try {
    problem.run(SddmmVariant::kTile, wide.view(), 0, "wide", kLikeRtx);
  } catch (const std::invalid_argument& error) {
    refusal = error.what();
  }
  ROSA_CHECK(refusal ==
                 "expected a device that gives a block 147456 bytes of shared memory, got one "
                 "with 101376",
             refusal);
}

// Inf and NaN must reach the result if a nonzero refers to them, and only then.
void test_nonfinite_operands_show() {
  const Pattern pattern = random_pattern(130, 140, 0.05, 9);
  const Plan plan(pattern, 128);
  for (SddmmVariant variant : {SddmmVariant::kGather, SddmmVariant::kTile}) {
    Problem problem(pattern, kCudaTypes[1], 70, Layout::kColumn, Layout::kColumn, 1);
    problem.b.set(17, 69, std::numeric_limits<double>::quiet_NaN());
    problem.a.set(5, 3, std::numeric_limits<double>::infinity());
    const Matrix out = problem.run(variant, plan.view(), 3, "nonfinite");
    pattern.for_each([&](int64_t t, int64_t i, int64_t j) {
      const double got = out.at(t);
      ROSA_CHECK(j == 17  ? std::isnan(got)
                 : i == 5 ? !std::isfinite(got)
                          : std::isfinite(got),
                 "entry " + std::to_string(t));
    });
  }
}

void test_bad_arguments() {
  const Pattern pattern = random_pattern(20, 30, 0.2);
  const Plan plan(pattern, 128), other(random_pattern(20, 31, 0.2), 128);
  const Matrix a(DType::kFloat32, 20, 8, Layout::kRow), b(DType::kFloat32, 30, 8, Layout::kRow);
  const Matrix half(DType::kFloat16, 30, 8, Layout::kRow),
      wide(DType::kFloat64, 20, 8, Layout::kRow);
  const Matrix wide_b(DType::kFloat64, 30, 8, Layout::kRow);
  const Matrix out(DType::kFloat32, pattern.nnz(), 1, Layout::kRow);
  const auto refused = [&](SddmmVariant variant, const PlanView& view, const Matrix& x,
                           const Matrix& y) {
    try {
      cuda::sddmm(variant, pattern.view(), view, x.view(), y.view(), out.vector(), nullptr, 0,
                  nullptr);
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  ROSA_CHECK(refused(SddmmVariant::kGather, {}, a, half), "two dtypes");
  ROSA_CHECK(refused(SddmmVariant::kGather, {}, wide, wide_b), "float64");
  ROSA_CHECK(refused(SddmmVariant::kGather, {}, b, b), "rows");
  ROSA_CHECK(refused(SddmmVariant::kGather, other.view(), a, b), "another pattern's plan");
  ROSA_CHECK(refused(SddmmVariant::kTile, {}, a, b), "no plan");
  ROSA_CHECK(refused(SddmmVariant::kTile, plan.view(), a, b), "float32 tiles");
  ROSA_CHECK(refused(SddmmVariant::kWgmma, plan.view(), a, b), "narrow tiles for wgmma");
}

void test_two_callers() {
  run_concurrently([&](int caller) {
    const Pattern pattern = skewed_pattern(140, 150, 5);
    const Plan plan(pattern, 128);
    for (int64_t round = 0; round < 3; ++round) {
      Problem(pattern, kCudaTypes[1], 70, Layout::kColumn, Layout::kColumn, 100 * caller + round)
          .check(round % 2 ? SddmmVariant::kTile : SddmmVariant::kGather, plan.view(),
                 "two callers");
    }
  });
}

}  // namespace
}  // namespace rosa::test

int main() {
  rosa::test::test_gather_patterns();
  rosa::test::test_gather_layouts();
  rosa::test::test_gather_many_tokens();
  rosa::test::test_tiles();
  rosa::test::test_tiles_of_nasty_patterns();
  rosa::test::test_schedules();
  rosa::test::test_tiles_on_other_devices();
  rosa::test::test_nonfinite_operands_show();
  rosa::test::test_bad_arguments();
  rosa::test::test_two_callers();
  return rosa::test::exit_status();
}
