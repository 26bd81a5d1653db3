// Tests the wgmma tiles of SDDMM in the emulator: through the op, and as single launches with any
// grid.
#include <algorithm>
#include <vector>

#include "cuda/sddmm_wgmma.h"
#include "sddmm_problem.h"

namespace rosa::test {
namespace {

// ---- through the op -------------------------------------------------------------------------

// Token counts around a line of 64 tokens, around the ring's four stages, and around counts that
// three blocks divide unevenly.
const std::vector<int64_t>& token_counts() {
  static const std::vector<int64_t> all = {1, 63, 64, 65, 130, 300};
  return all;
}

void test_tiles() {
  int64_t turn = 0;
  const std::vector<Pattern> all = {
      skewed_pattern(150, 300, 1),
      skewed_pattern(300, 140, 2),
      random_pattern(128, 256, 0.05, 3),  // exactly whole tiles
      random_pattern(129, 257, 0.03, 4),  // one row and column more
      {"full tile", 128, 256, [](int64_t, int64_t) { return true; }},
      {"last row and column", 200, 300, [](int64_t i, int64_t j) { return i == 199 || j == 299; }},
  };
  for (const Pattern& pattern : all) {
    for (double fill : {kHeavyFill, 0.0}) {  // with gathered nonzeros, and all heavy
      const Plan plan(pattern, 256, fill);
      for (int64_t k : token_counts()) {
        ++turn;
        if (turn % (kReduced ? 5 : 2) != 0) continue;
        const Types types = kCudaTypes[1 + turn / 2 % 4];
        const Layout first = turn % 4 < 2 ? Layout::kColumn : layout(turn);
        const Layout second = turn % 3 ? Layout::kColumn : layout(turn / 3);
        Problem(pattern, types, k, first, second, turn)
            .check(SddmmVariant::kWgmma, plan.view(), "wgmma, fill " + std::to_string(fill));
      }
    }
  }
}

void test_nasty_patterns() {
  int64_t turn = 1000;
  for (const Pattern& pattern : patterns()) {
    for (double fill : {0.0, 1.0}) {
      ++turn;
      if (kReduced && turn % 4 != 0) continue;
      const Plan plan(pattern, 256, fill);
      for (int64_t k : {0, 3, 64}) {
        Problem(pattern, kCudaTypes[1 + turn % 4], k, layout(turn), layout(turn / 3), turn)
            .check(SddmmVariant::kWgmma, plan.view(), "wgmma");
      }
    }
  }
}

// Inf and NaN must reach the result if a nonzero refers to them. Neighbours in the same tile must
// not show them.
void test_nonfinite_operands_show() {
  const Pattern pattern = random_pattern(130, 140, 0.05, 9);
  const Plan plan(pattern, 256);
  Problem problem(pattern, kCudaTypes[1], 70, Layout::kColumn, Layout::kColumn, 1);
  problem.b.set(17, 69, std::numeric_limits<double>::quiet_NaN());
  problem.a.set(5, 3, std::numeric_limits<double>::infinity());
  const Matrix out = problem.run(SddmmVariant::kWgmma, plan.view(), 3, "nonfinite");
  pattern.for_each([&](int64_t t, int64_t i, int64_t j) {
    const double got = out.at(t);
    ROSA_CHECK(j == 17  ? std::isnan(got)
               : i == 5 ? !std::isfinite(got)
                        : std::isfinite(got),
               "entry " + std::to_string(t));
  });
}

// ---- single launches ------------------------------------------------------------------------

// A panel of tokens [first, first + tokens) of the rows that `axis` orders, in the layout of
// lines.h. No kernel may rely on positions without a row, so these hold NaN.
Buffer make_panel(const Matrix& x, const PlanAxis& axis, int64_t first, int64_t tokens) {
  constexpr int64_t kLine = 128, kSegment = 16, kTokens = kLine / 2, kPerSegment = kSegment / 2;
  const int64_t lines = (tokens + kTokens - 1) / kTokens;
  Buffer panel(lines * axis.padded * kLine);
  for (int64_t token = 0; token < lines * kTokens; ++token) {
    for (int64_t p = 0; p < axis.active; ++p) {
      const int64_t segment = token % kTokens / kPerSegment ^ p % 8;
      char* to = panel.data() + (token / kTokens * axis.padded + p) * kLine + segment * kSegment +
                 token % kPerSegment * 2;
      store(x.dtype(), to, token < tokens ? x.at(axis.order[p], first + token) : 0.0);
    }
  }
  return panel;
}

struct Launches {
  const Problem& problem;
  PlanView plan;
  std::vector<int64_t> chunks;  // tokens
  int64_t most_blocks;          // of the grid
  int32_t slices = 1;

  Launches(const Problem& problem, const PlanView& plan, std::vector<int64_t> chunks,
           int64_t most_blocks)
      : problem(problem), plan(plan), chunks(std::move(chunks)), most_blocks(most_blocks) {
    for (int64_t tokens : this->chunks) {
      slices = std::max(slices, static_cast<int32_t>(work(tokens).most_owners(lines(tokens))));
    }
  }
  static int64_t lines(int64_t tokens) { return (tokens + 63) / 64; }
  cuda::StreamK work(int64_t tokens) const {
    const int64_t units = lines(tokens) * plan.tiles;
    return {units, std::min(most_blocks, units)};
  }
  std::string describe() const {
    std::string text = problem.describe("wgmma alone") + ", grid " + std::to_string(most_blocks) +
                       ", " + std::to_string(plan.tiles) + " tiles, chunks";
    for (int64_t tokens : chunks) text += " " + std::to_string(tokens);
    return text;
  }

  Buffer run(uint64_t seed) const {
    simt::set_seed(seed);
    const Buffer partial(slices * plan.heavy_nnz * 4);
    int64_t first = 0;
    for (int64_t tokens : chunks) {
      const Buffer a = make_panel(problem.a, plan.rows, first, tokens);
      const Buffer b = make_panel(problem.b, plan.cols, first, tokens);
      cuda::TileArgs args = {};
      args.a = reinterpret_cast<const unsigned char*>(a.data());
      args.b = reinterpret_cast<const unsigned char*>(b.data());
      args.padded_rows = plan.rows.padded;
      args.padded_cols = plan.cols.padded;
      args.blocks = static_cast<int32_t>(lines(tokens));
      args.tile = plan.tile;
      args.tile_begin = plan.tile_begin;
      args.code = plan.code;
      args.partial = reinterpret_cast<float*>(partial.data());
      args.heavy_nnz = plan.heavy_nnz;
      args.slices = slices;
      args.work = work(tokens);
      args.accumulate = first > 0;
      cuda::launch_wgmma(args, problem.a.dtype(), nullptr);
      first += tokens;
    }
    return partial;
  }

  // Checks that the sum of the slices is accurate, that nothing else is written, and that other
  // schedules give the same bits.
  void check(std::vector<uint64_t> seeds) const {
    const std::string context = describe();
    const Buffer partial = run(0);
    ROSA_CHECK(partial.guards_intact(), context);
    const float* sums = reinterpret_cast<const float*>(partial.data());
    Matrix out(DType::kFloat32, plan.heavy_nnz, 1, Layout::kRow);
    for (int64_t e = 0; e < plan.heavy_nnz; ++e) {
      float sum = sums[e];
      for (int32_t slice = 1; slice < slices; ++slice) sum += sums[slice * plan.heavy_nnz + e];
      out.set(e, 0, sum);
      const Expected& expected = problem.expected[static_cast<size_t>(plan.entry[e])];
      ROSA_CHECK(expected.accepts(out, out.at(e), problem.a.dtype()),
                 context + ": " + std::to_string(e) + " in plan order is " + std::to_string(sum) +
                     ", exactly " + std::to_string(expected.exact()));
    }
    for (uint64_t seed : seeds) {
      ROSA_CHECK(partial.same_bytes(run(seed)), context + ", seed " + std::to_string(seed));
    }
  }
};

// Grids from one block for all line blocks to one block for each. Tiles are cut anywhere.
void test_grids() {
  int64_t turn = 2000;
  const Pattern one = random_pattern(100, 200, 0.05, 5), many = skewed_pattern(300, 700, 6);
  for (const Pattern* pattern : {&one, &many}) {
    const Plan plan(*pattern, 256, 0.0);
    for (int64_t tokens : token_counts()) {
      for (int64_t grid : {1, 2, 3, 5, 1000}) {
        ++turn;
        if (turn % (kReduced ? 8 : 2) != 0) continue;
        const Types types = kCudaTypes[2 + turn / 2 % 2 * 2];
        const Problem problem(*pattern, types, tokens, Layout::kColumn, Layout::kColumn, turn);
        const uint64_t seed = static_cast<uint64_t>(turn) * 3;
        Launches(problem, plan.view(), {tokens}, grid).check({seed, seed + 1});
      }
    }
  }
}

// Later chunks add to the sums of earlier ones, whose tiles were cut elsewhere.
void test_chunks() {
  int64_t turn = 3000;
  const Pattern pattern = skewed_pattern(280, 520, 7);
  const Plan plan(pattern, 256, 0.0);
  for (const std::vector<int64_t>& chunks :
       std::vector<std::vector<int64_t>>{{64, 1}, {128, 64, 30}, {64, 320, 5}, {320, 100}}) {
    for (int64_t grid : {1, 3, 4, 13}) {
      ++turn;
      if (turn % (kReduced ? 4 : 2) != 0) continue;
      int64_t tokens = 0;
      for (int64_t chunk : chunks) tokens += chunk;
      const Problem problem(pattern, kCudaTypes[2], tokens, Layout::kRow, Layout::kColumn, turn);
      Launches(problem, plan.view(), chunks, grid).check({static_cast<uint64_t>(turn)});
    }
  }
}

// More line blocks than the tensor cores may sum in one piece, in one chunk of tokens and in two.
void test_long_sums() {
  const Pattern pattern = random_pattern(40, 50, 0.02, 8);
  const Plan plan(pattern, 256, 0.0);
  for (int64_t tokens : {64 * 64 + 1, 2 * 64 * 64 + 70}) {
    const Problem problem(pattern, kCudaTypes[2], tokens, Layout::kRow, Layout::kRow, tokens);
    Launches(problem, plan.view(), {tokens}, 1).check({5});
  }
  const Problem problem(pattern, kCudaTypes[2], 4500, Layout::kRow, Layout::kRow, 4500);
  Launches(problem, plan.view(), {4160, 340}, 1).check({6});
}

// Many schedules of a few tiles in a few line blocks: some errors show on only a few of them.
void test_schedules() {
  const Pattern pattern = skewed_pattern(150, 700, 10);
  const Plan plan(pattern, 256, 0.0);
  const Problem problem(pattern, kCudaTypes[2], 400, Layout::kRow, Layout::kRow, 4000);
  std::vector<uint64_t> seeds;
  for (uint64_t seed = 1; seed <= (kReduced ? 3 : 16); ++seed) seeds.push_back(seed);
  Launches(problem, plan.view(), {400}, 2).check(seeds);
}

}  // namespace
}  // namespace rosa::test

int main() {
  rosa::test::test_tiles();
  rosa::test::test_nasty_patterns();
  rosa::test::test_nonfinite_operands_show();
  rosa::test::test_grids();
  rosa::test::test_chunks();
  rosa::test::test_long_sums();
  rosa::test::test_schedules();
  return rosa::test::exit_status();
}
