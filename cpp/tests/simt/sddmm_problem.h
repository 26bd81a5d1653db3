// Shared by the tests of the emulated SDDMM: a problem, its plan, and the check of a result.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../sweep.h"
#include "rosa/cuda.h"
#include "simt/emulator.h"

namespace rosa::test {

constexpr Types kCudaTypes[] = {
    {DType::kFloat32, DType::kFloat32},  {DType::kBFloat16, DType::kBFloat16},
    {DType::kBFloat16, DType::kFloat32}, {DType::kFloat16, DType::kFloat16},
    {DType::kFloat16, DType::kFloat32},
};

// A few rows and columns hold most nonzeros, as in real masks.
inline Pattern skewed_pattern(int64_t rows, int64_t cols, uint64_t seed) {
  Random random(seed);
  return {"skewed " + std::to_string(rows) + "x" + std::to_string(cols), rows, cols,
          [&](int64_t i, int64_t j) {
            if (i % 7 == 3 || j % 5 == 1) return false;  // empty rows and columns
            const double share =
                (i * 37 % rows < rows / 4 ? 0.5 : 0.04) * (j * 41 % cols < cols / 3 ? 0.4 : 0.02);
            return random.unit() < share;
          }};
}

using cuda::SddmmVariant;

// Emulated devices with less shared memory than the first one.
constexpr int kLikeA100 = 3, kLikeRtx = 4;

struct Plan {
  TilePlan plan;
  std::vector<int32_t> blob;

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
  Layout first, second;
  int64_t turn;
  Matrix a, b;
  std::vector<Expected> expected;

  Problem(const Pattern& pattern, Types types, int64_t k, Layout first, Layout second, int64_t turn)
      : pattern(pattern),
        types(types),
        k(k),
        first(first),
        second(second),
        turn(turn),
        a(types.operand, pattern.rows, k, first),
        b(types.operand, pattern.cols, k, second),
        expected(static_cast<size_t>(pattern.nnz())) {
    const Referenced referenced(pattern);
    Random random(static_cast<uint64_t>(turn));
    spoil_unreferenced(a.fill(random), referenced.rows, first);
    spoil_unreferenced(b.fill(random), referenced.cols, second);
    pattern.for_each([&](int64_t t, int64_t i, int64_t j) {
      for (int64_t l = 0; l < k; ++l) expected[static_cast<size_t>(t)].add(a.at(i, l), b.at(j, l));
    });
  }
  std::string describe(const std::string& how) const {
    return how + ", " + pattern.name + ", " + name(types.operand) + "/" + name(types.values) +
           ", k=" + std::to_string(k) + ", layouts " + std::to_string(static_cast<int>(first)) +
           "/" + std::to_string(static_cast<int>(second)) + ", turn " + std::to_string(turn);
  }

  Matrix run(SddmmVariant variant, const PlanView& plan, uint64_t seed, const std::string& context,
             int device = 0) const {
    simt::set_seed(seed);
    const Matrix out(types.values, pattern.nnz(), 1, writable_layout(turn));
    const Buffer workspace(
        cuda::sddmm_workspace_bytes(variant, pattern.view(), plan, a.view(), b.view(), device),
        turn % 3);
    cuda::sddmm(variant, pattern.view(), plan, a.view(), b.view(), out.vector(), workspace.data(),
                device, nullptr);
    ROSA_CHECK(workspace.guards_intact(), context);
    return out;
  }

  // Checks that the result is accurate, that nothing else is written, and that another schedule
  // gives the same bits.
  void check(SddmmVariant variant, const PlanView& plan, const std::string& how,
             int device = 0) const {
    const std::string context = describe(how);
    const Matrix a_before = a, b_before = b;
    const Matrix out = run(variant, plan, 0, context, device);
    for (int64_t t = 0; t < pattern.nnz(); ++t) {
      ROSA_CHECK(expected[static_cast<size_t>(t)].accepts(out, out.at(t), types.operand),
                 context + ": entry " + std::to_string(t) + " is " + std::to_string(out.at(t)) +
                     ", exactly " + std::to_string(expected[static_cast<size_t>(t)].exact()));
    }
    ROSA_CHECK(out.surroundings_intact(), context);
    ROSA_CHECK(a.same_bytes(a_before) && b.same_bytes(b_before), context);
    const uint64_t seed = static_cast<uint64_t>(turn) * 2 + 1;
    ROSA_CHECK(out.same_bytes(run(variant, plan, seed, context, device)), context + ", seed");
  }
};

}  // namespace rosa::test
