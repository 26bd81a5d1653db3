// The CUDA csr_scatter_ in the emulator: w[i_t, j_t] is values[t] afterwards, and nothing else
// changes.
#include "csr_problem.h"

namespace rosa::test {
namespace {

void test_case(const Pattern& pattern, Types types, Layout w_layout, Layout values_layout,
               int64_t turn) {
  const std::string context = describe(pattern, types, w_layout, values_layout);
  Random random(static_cast<uint64_t>(turn));
  const Matrix before = Matrix(types.operand, pattern.rows, pattern.cols, w_layout).fill(random);
  const Matrix values = Matrix(types.values, pattern.nnz(), 1, values_layout).fill(random);
  const Matrix values_before = values;

  const Matrix w = before;
  simt::set_seed(static_cast<uint64_t>(turn % 3));
  cuda::csr_scatter_(w.view(), pattern.view(), values.vector(), 0, nullptr);

  Matrix expected = before;
  pattern.for_each([&](int64_t t, int64_t i, int64_t j) {
    expected.set(i, j, round_to(types.operand, values.at(t)));
  });
  ROSA_CHECK(w.same_bytes(expected), context);
  ROSA_CHECK(values.same_bytes(values_before), context);
}

// After csr_add_, csr_scatter_ restores what csr_gather read: every bit, including those of NaNs.
void test_restore(const Pattern& pattern, DType dtype, Layout w_layout, int64_t turn) {
  Random random(static_cast<uint64_t>(turn));
  const Matrix before(dtype, pattern.rows, pattern.cols, w_layout);
  const MatrixView view = before.view();
  pattern.for_each([&](int64_t, int64_t i, int64_t j) {
    const uint64_t bits = random.bits();
    std::memcpy(static_cast<char*>(view.data) +
                    (i * view.row_stride + j * view.col_stride) * item_size(dtype),
                &bits, static_cast<size_t>(item_size(dtype)));
  });
  const Matrix w = before;
  const Matrix originals(dtype, pattern.nnz(), 1, Layout::kRow);
  const Matrix change = Matrix(dtype, pattern.nnz(), 1, Layout::kRow).fill(random);
  cuda::csr_gather(w.view(), pattern.view(), originals.vector(), 0, nullptr);
  cuda::csr_add_(w.view(), pattern.view(), change.vector(), 1.0, 0, nullptr);
  cuda::csr_scatter_(w.view(), pattern.view(), originals.vector(), 0, nullptr);
  ROSA_CHECK(w.same_bytes(before), describe(pattern, {dtype, dtype}, w_layout, Layout::kRow));
}

void test_far_elements() {
  const Pattern pattern = random_pattern(5, 6, 0.5);
  for (bool far_rows : {true, false}) {
    FarMatrix w(DType::kBFloat16, 5, 6, far_rows);
    Matrix values(DType::kBFloat16, pattern.nnz(), 1, Layout::kRow);
    const Matrix back = values;
    for (int64_t t = 0; t < pattern.nnz(); ++t) values.set(t, 0, static_cast<double>(t + 1));
    cuda::csr_scatter_(w.view(), pattern.view(), values.vector(), 0, nullptr);
    cuda::csr_add_(w.view(), pattern.view(), values.vector(), 2.0, 0, nullptr);
    cuda::csr_gather(w.view(), pattern.view(), back.vector(), 0, nullptr);
    pattern.for_each([&](int64_t t, int64_t i, int64_t j) {
      ROSA_CHECK(w.at(i, j) == 3 * (t + 1.0) && back.at(t) == w.at(i, j), "far");
    });
  }
}

void test_slabs() {
  const Pattern pattern = random_pattern(50, 40, 0.3);
  for (Types types : {kTypes[0], kTypes[2]}) {
    Random random(7);
    const Matrix before = Matrix(types.operand, 50, 40, Layout::kColumn).fill(random);
    const Matrix values = Matrix(types.values, pattern.nnz(), 1, Layout::kRow).fill(random);
    const Matrix whole = before, by_slab = before;
    cuda::csr_scatter_(whole.view(), pattern.view(), values.vector(), 0, nullptr);
    for (const Slab& slab : slabs_of(pattern)) {
      VectorView part = values.vector();
      part.data = static_cast<char*>(part.data) + slab.first() * item_size(part.dtype);
      part.size = slab.nnz();
      cuda::csr_scatter_(slab.rows_of(by_slab.view()), slab.view(), part, 0, nullptr);
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
      cuda::csr_scatter_(target.view(), pattern.view(), by.vector(), 0, nullptr);
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  ROSA_CHECK(refused(small, values), "shape");
  ROSA_CHECK(refused(w, few), "number of values");
  ROSA_CHECK(refused(w, narrow), "values' dtype");
  ROSA_CHECK(refused(wide, wide_values), "float64");
}

}  // namespace
}  // namespace rosa::test

int main() {
  using namespace rosa::test;
  sweep_entries(kWritableLayouts, kLayouts,
                [](const Pattern& pattern, Types types, Layout w, Layout values, int64_t turn) {
                  test_case(pattern, types, w, values, turn);
                });
  for (int64_t turn = 0; turn < kWritableLayouts * 3; ++turn)
    test_restore(patterns()[0], kDTypes[turn % 3], writable_layout(turn), turn);
  test_restore(entry_patterns()[patterns().size()], rosa::DType::kBFloat16, Layout::kRow, 77);
  test_far_elements();
  test_slabs();
  test_bad_arguments();
  run_concurrently([](int caller) {
    for (int64_t round = 0; round < 20; ++round)
      test_case(patterns()[0], types(round % 5), writable_layout(round), layout(round),
                1000 * caller + round);
  });
  return exit_status();
}
