// SpMM against the oracle: c[i, :] = sum over row i of values[t] * b[j_t, :].
#include "sweep.h"

namespace rosa::test {
namespace {

Matrix run(const Pattern& pattern, const Matrix& values, const Matrix& b, const Matrix& unwritten,
           Isa isa, int threads, int64_t workspace_offset, const std::string& context) {
  const Matrix c = unwritten;
  const Buffer workspace(
      cpu::spmm_workspace_bytes(pattern.view(), b.cols(), b.dtype(), threads, isa),
      workspace_offset);
  cpu::spmm(pattern.view(), values.vector(), b.view(), c.view(), workspace.data(), threads, isa);
  ROSA_CHECK(workspace.guards_intact(), context);
  return c;
}

void test_case(const Case& test) {
  const Pattern& pattern = *test.pattern;
  Random random(test.turn);
  const Matrix values =
      Matrix(test.types.values, pattern.nnz(), 1, layout(test.turn)).fill(random, test.scale);
  Matrix b(test.types.operand, pattern.cols, test.k, test.first);
  spoil_unreferenced(b.fill(random, test.scale), Referenced(pattern).cols, test.first);
  const Matrix values_before = values, b_before = b;
  const Matrix unwritten(test.types.operand, pattern.rows, test.k,
                         writable_layout(static_cast<int>(test.second)));

  std::vector<Expected> expected(static_cast<size_t>(pattern.rows * test.k));
  pattern.for_each([&](int64_t t, int64_t i, int64_t j) {
    for (int64_t l = 0; l < test.k; ++l) {
      expected[i * test.k + l].add(values.at(t), b.at(j, l));
    }
  });

  test.for_each_execution([&](Isa isa, int threads) {
    const std::string context = test.describe(isa, threads);
    const Matrix c = run(pattern, values, b, unwritten, isa, threads, test.turn % 3, context);
    for (int64_t i = 0; i < pattern.rows; ++i) {
      for (int64_t l = 0; l < test.k; ++l) {
        const Expected& exact = expected[i * test.k + l];
        ROSA_CHECK(exact.accepts(c, c.at(i, l), test.types.operand),
                   context + ": element (" + std::to_string(i) + ", " + std::to_string(l) +
                       ") is " + std::to_string(c.at(i, l)) + ", exactly " +
                       std::to_string(exact.exact()));
      }
    }
    ROSA_CHECK(c.surroundings_intact(), context);
    ROSA_CHECK(values.same_bytes(values_before) && b.same_bytes(b_before), context);
    ROSA_CHECK(c.same_bytes(run(pattern, values, b, unwritten, isa, threads, 0, context)), context);
  });
}

}  // namespace
}  // namespace rosa::test

int main() {
  rosa::test::sweep(rosa::test::test_case);
  return rosa::test::exit_status();
}
