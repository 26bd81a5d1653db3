// csr_scatter_: w[i_t, j_t] is values[t] afterwards, and nothing else changes.
#include <cstring>

#include "support.h"

namespace rosa::test {
namespace {

std::string describe(const Pattern& pattern, Types types, Layout w_layout, Layout values_layout,
                     int threads) {
  return pattern.name + ", " + name(types.operand) + "/" + name(types.values) + ", layouts " +
         std::to_string(static_cast<int>(w_layout)) + "/" +
         std::to_string(static_cast<int>(values_layout)) + ", threads " + std::to_string(threads);
}

void test_case(const Pattern& pattern, Types types, Layout w_layout, Layout values_layout,
               int threads, uint64_t seed) {
  const std::string context = describe(pattern, types, w_layout, values_layout, threads);
  Random random(seed);
  const Matrix before = Matrix(types.operand, pattern.rows, pattern.cols, w_layout).fill(random);
  const Matrix values = Matrix(types.values, pattern.nnz(), 1, values_layout).fill(random);
  const Matrix values_before = values;

  const Matrix w = before;
  cpu::csr_scatter_(w.view(), pattern.view(), values.vector(), threads);

  Matrix expected = before;
  pattern.for_each([&](int64_t t, int64_t i, int64_t j) {
    expected.set(i, j, round_to(types.operand, values.at(t)));
  });
  ROSA_CHECK(w.same_bytes(expected), context);
  ROSA_CHECK(values.same_bytes(values_before), context);
}

// After csr_add_, csr_scatter_ restores what csr_gather read: every bit, including those of NaNs.
void test_restore(const Pattern& pattern, DType dtype, Layout w_layout, int threads,
                  uint64_t seed) {
  const std::string context = describe(pattern, {dtype, dtype}, w_layout, Layout::kRow, threads);
  Random random(seed);
  const Matrix before(dtype, pattern.rows, pattern.cols, w_layout);
  pattern.for_each([&](int64_t, int64_t i, int64_t j) {
    const MatrixView view = before.view();
    const uint64_t bits = random.bits();
    std::memcpy(static_cast<char*>(view.data) +
                    (i * view.row_stride + j * view.col_stride) * item_size(dtype),
                &bits, static_cast<size_t>(item_size(dtype)));
  });
  const Matrix w = before;
  const Matrix originals(dtype, pattern.nnz(), 1, Layout::kRow);
  const Matrix change = Matrix(dtype, pattern.nnz(), 1, Layout::kRow).fill(random);

  cpu::csr_gather(w.view(), pattern.view(), originals.vector(), threads);
  cpu::csr_add_(w.view(), pattern.view(), change.vector(), 1.0, threads);
  cpu::csr_scatter_(w.view(), pattern.view(), originals.vector(), threads);
  ROSA_CHECK(w.same_bytes(before), context);
}

void test_all() {
  uint64_t seed = 0;
  for (Types types : kTypes) {
    for (int64_t i = 0; i < kWritableLayouts; ++i) {
      for (int64_t j = 0; j < kLayouts; ++j, ++seed) {
        test_case(patterns()[0], types, layout(i), layout(j), 1 + seed % 3, seed);
      }
    }
    for (int threads : {1, 2, 3}) {
      for (const auto* set : {&patterns(), &large_patterns()}) {
        for (const Pattern& pattern : *set) {
          test_case(pattern, types, writable_layout(seed), layout(seed), threads, seed);
          test_restore(pattern, types.operand, writable_layout(seed), threads, seed);
          ++seed;
        }
      }
    }
  }
  run_concurrently([](int caller) {
    for (int64_t round = 0; round < 40; ++round) {
      test_case(patterns()[0], types(round), writable_layout(round), layout(round), 2,
                1000 * caller + round);
    }
  });
}

}  // namespace
}  // namespace rosa::test

int main() {
  rosa::test::test_all();
  return rosa::test::exit_status();
}
