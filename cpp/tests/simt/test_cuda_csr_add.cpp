// The CUDA csr_add_ in the emulator: w[i_t, j_t] += alpha * values[t], and nothing else changes.
#include "csr_problem.h"

namespace rosa::test {
namespace {

void test_case(const Pattern& pattern, Types types, double alpha, Layout w_layout,
               Layout values_layout, int64_t turn) {
  const std::string context =
      describe(pattern, types, w_layout, values_layout) + ", alpha=" + std::to_string(alpha);
  Random random(static_cast<uint64_t>(turn));
  const Matrix before = Matrix(types.operand, pattern.rows, pattern.cols, w_layout).fill(random);
  const Matrix values = Matrix(types.values, pattern.nnz(), 1, values_layout).fill(random);
  const Matrix values_before = values;

  const Matrix w = before, again = before, on_cpu = before;
  simt::set_seed(0);
  cuda::csr_add_(w.view(), pattern.view(), values.vector(), alpha, 0, nullptr);
  simt::set_seed(static_cast<uint64_t>(turn));
  cuda::csr_add_(again.view(), pattern.view(), values.vector(), alpha, 0, nullptr);
  cpu::csr_add_(on_cpu.view(), pattern.view(), values.vector(), alpha, 1);

  Matrix restored = w;
  pattern.for_each([&](int64_t t, int64_t i, int64_t j) {
    Expected expected;
    expected.add(before.at(i, j), 1);
    expected.add(alpha, values.at(t));
    ROSA_CHECK(expected.accepts(w, w.at(i, j), types.operand),
               context + ": entry " + std::to_string(t));
    restored.set(i, j, before.at(i, j));
  });
  ROSA_CHECK(restored.same_bytes(before), context);
  ROSA_CHECK(again.same_bytes(w), context);
  ROSA_CHECK(on_cpu.same_bytes(w), context);
  ROSA_CHECK(values.same_bytes(values_before), context);
}

void test_slabs() {
  const Pattern pattern = random_pattern(50, 40, 0.3);
  for (Types types : {kTypes[1], kTypes[2]}) {
    Random random(7);
    const Matrix before = Matrix(types.operand, 50, 40, Layout::kRowSliced).fill(random);
    const Matrix values = Matrix(types.values, pattern.nnz(), 1, Layout::kBothStrided).fill(random);
    const Matrix whole = before, by_slab = before;
    cuda::csr_add_(whole.view(), pattern.view(), values.vector(), 0.3, 0, nullptr);
    for (const Slab& slab : slabs_of(pattern)) {
      VectorView part = values.vector();
      part.data =
          static_cast<char*>(part.data) + slab.first() * part.stride * item_size(part.dtype);
      part.size = slab.nnz();
      cuda::csr_add_(slab.rows_of(by_slab.view()), slab.view(), part, 0.3, 0, nullptr);
    }
    ROSA_CHECK(whole.same_bytes(by_slab), "slabs");
  }
}

void test_bad_arguments() {
  const Pattern pattern = random_pattern(20, 30, 0.2);
  const Matrix w(DType::kFloat32, 20, 30, Layout::kRow),
      small(DType::kFloat32, 20, 29, Layout::kRow), wide(DType::kFloat64, 20, 30, Layout::kRow);
  const Matrix values(DType::kFloat32, pattern.nnz(), 1, Layout::kRow),
      few(DType::kFloat32, pattern.nnz() - 1, 1, Layout::kRow),
      narrow(DType::kFloat16, pattern.nnz(), 1, Layout::kRow),
      wide_values(DType::kFloat64, pattern.nnz(), 1, Layout::kRow);
  const auto refused = [&](const Matrix& target, const Matrix& by) {
    try {
      cuda::csr_add_(target.view(), pattern.view(), by.vector(), 1, 0, nullptr);
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  ROSA_CHECK(refused(small, values), "shape");
  ROSA_CHECK(refused(w, few), "number of values");
  ROSA_CHECK(refused(w, narrow), "values' dtype");
  ROSA_CHECK(refused(wide, wide_values), "float64");
  ROSA_CHECK(!refused(w, values), "good arguments");
}

}  // namespace
}  // namespace rosa::test

int main() {
  using namespace rosa::test;
  for (double alpha : {1.0, -0.5, 0.0, 1.0 / 3.0}) {
    const bool first = alpha == 1.0;
    sweep_entries(kWritableLayouts, first ? kLayouts : 2,
                  [&](const Pattern& pattern, Types types, Layout w, Layout values, int64_t turn) {
                    if (!first && &pattern != &patterns()[0]) return;
                    test_case(pattern, types, alpha, w, values, turn);
                  });
  }
  test_slabs();
  test_bad_arguments();
  run_concurrently([](int caller) {
    for (int64_t round = 0; round < 20; ++round)
      test_case(patterns()[0], types(round % 5), 0.7, writable_layout(round), layout(round),
                1000 * caller + round);
  });
  return exit_status();
}
