// csr_add_ against the oracle: w[i_t, j_t] += alpha * values[t], and nothing else changes.
#include "support.h"

namespace rosa::test {
namespace {

void test_case(const Pattern& pattern, Types types, double alpha, Layout w_layout,
               Layout values_layout, int threads, uint64_t seed) {
  const std::string context = pattern.name + ", " + name(types.operand) + "/" + name(types.values) +
                              ", alpha=" + std::to_string(alpha) + ", layouts " +
                              std::to_string(static_cast<int>(w_layout)) + "/" +
                              std::to_string(static_cast<int>(values_layout)) + ", threads " +
                              std::to_string(threads);
  Random random(seed);
  const Matrix before = Matrix(types.operand, pattern.rows, pattern.cols, w_layout).fill(random);
  const Matrix values = Matrix(types.values, pattern.nnz(), 1, values_layout).fill(random);
  const Matrix values_before = values;

  const Matrix w = before, again = before;
  cpu::csr_add_(w.view(), pattern.view(), values.vector(), alpha, threads);
  cpu::csr_add_(again.view(), pattern.view(), values.vector(), alpha, threads);

  // After the changed elements are restored, every byte must be as before.
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
  ROSA_CHECK(values.same_bytes(values_before), context);
}

void test_all() {
  uint64_t seed = 0;
  for (Types types : kTypes) {
    for (double alpha : {1.0, -0.5, 0.0, 1.0 / 3.0}) {
      for (int64_t i = 0; i < kWritableLayouts; ++i) {
        for (int64_t j = 0; j < kLayouts; ++j, ++seed) {
          test_case(patterns()[0], types, alpha, layout(i), layout(j), 1 + seed % 3, seed);
        }
      }
    }
    for (int threads : {1, 2, 3}) {
      for (const auto* set : {&patterns(), &large_patterns()}) {
        for (const Pattern& pattern : *set) {
          test_case(pattern, types, 0.7, writable_layout(seed), layout(seed), threads, seed);
          ++seed;
        }
      }
    }
  }
  run_concurrently([](int caller) {
    for (int64_t round = 0; round < 40; ++round) {
      test_case(patterns()[0], types(round), 0.7, writable_layout(round), layout(round), 2,
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
