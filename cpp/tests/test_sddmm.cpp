// SDDMM against the oracle: out[t] = <a[i_t, :], b[j_t, :]>.
#include "sweep.h"

namespace rosa::test {
namespace {

Matrix run(const Pattern& pattern, const Matrix& a, const Matrix& b, const Matrix& unwritten,
           Isa isa, int threads, int64_t workspace_offset, const std::string& context) {
  const Matrix out = unwritten;
  const Buffer workspace(
      cpu::sddmm_workspace_bytes(pattern.view(), a.cols(), a.dtype(), threads, isa),
      workspace_offset);
  cpu::sddmm(pattern.view(), a.view(), b.view(), out.vector(), workspace.data(), threads, isa);
  ROSA_CHECK(workspace.guards_intact(), context);
  return out;
}

void test_case(const Case& test) {
  const Pattern& pattern = *test.pattern;
  const Referenced referenced(pattern);
  Random random(test.turn);
  Matrix a(test.types.operand, pattern.rows, test.k, test.first);
  Matrix b(test.types.operand, pattern.cols, test.k, test.second);
  spoil_unreferenced(a.fill(random, test.scale), referenced.rows, test.first);
  spoil_unreferenced(b.fill(random, test.scale), referenced.cols, test.second);
  const Matrix a_before = a, b_before = b;
  const Matrix unwritten(test.types.values, pattern.nnz(), 1, writable_layout(test.turn));

  std::vector<Expected> expected(static_cast<size_t>(pattern.nnz()));
  pattern.for_each([&](int64_t t, int64_t i, int64_t j) {
    for (int64_t l = 0; l < test.k; ++l) expected[t].add(a.at(i, l), b.at(j, l));
  });

  test.for_each_execution([&](Isa isa, int threads) {
    const std::string context = test.describe(isa, threads);
    const Matrix out = run(pattern, a, b, unwritten, isa, threads, test.turn % 3, context);
    for (int64_t t = 0; t < pattern.nnz(); ++t) {
      ROSA_CHECK(expected[t].accepts(out, out.at(t), test.types.operand),
                 context + ": entry " + std::to_string(t) + " is " + std::to_string(out.at(t)) +
                     ", exactly " + std::to_string(expected[t].exact()));
    }
    ROSA_CHECK(out.surroundings_intact(), context);
    ROSA_CHECK(a.same_bytes(a_before) && b.same_bytes(b_before), context);
    ROSA_CHECK(out.same_bytes(run(pattern, a, b, unwritten, isa, threads, 0, context)), context);
  });
}

// The reduction must not lose a NaN or an Inf that an entry refers to.
void test_nonfinite_operands_show() {
  const Pattern pattern("full", 3, 4, [](int64_t, int64_t) { return true; });
  for (DType dtype : kDTypes) {
    for (int64_t k : {1, 5, 33}) {
      Random random(k);
      const Matrix a = Matrix(dtype, 3, k, Layout::kRow).fill(random);
      for (double special :
           {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
        Matrix b = Matrix(dtype, 4, k, Layout::kRow).fill(random);
        b.set(2, k - 1, special);
        const Matrix unwritten(dtype, pattern.nnz(), 1, Layout::kRow);
        for (Isa isa : available_isas()) {
          const Matrix out = run(pattern, a, b, unwritten, isa, 1, 0, name(dtype));
          pattern.for_each([&](int64_t t, int64_t i, int64_t j) {
            const double expected = special * a.at(i, k - 1);
            const double got = out.at(t);
            ROSA_CHECK(j == 2 ? got == expected || (std::isnan(got) && std::isnan(expected))
                              : std::isfinite(got),
                       name(dtype));
          });
        }
      }
    }
  }
}

}  // namespace
}  // namespace rosa::test

int main() {
  rosa::test::sweep(rosa::test::test_case);
  rosa::test::test_nonfinite_operands_show();
  return rosa::test::exit_status();
}
