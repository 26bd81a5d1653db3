// csr_gather: out[t] is w[i_t, j_t], bit for bit.
#include "support.h"

namespace rosa::test {
namespace {

void test_case(const Pattern& pattern, DType dtype, Layout w_layout, Layout out_layout, int threads,
               uint64_t seed) {
  const std::string context = pattern.name + ", " + name(dtype) + ", layouts " +
                              std::to_string(static_cast<int>(w_layout)) + "/" +
                              std::to_string(static_cast<int>(out_layout)) + ", threads " +
                              std::to_string(threads);
  Random random(seed);
  const Matrix w = Matrix(dtype, pattern.rows, pattern.cols, w_layout).fill(random);
  const Matrix w_before = w;
  const Matrix unwritten(dtype, pattern.nnz(), 1, out_layout);

  const Matrix out = unwritten;
  cpu::csr_gather(w.view(), pattern.view(), out.vector(), threads);

  Matrix expected = unwritten;
  pattern.for_each([&](int64_t t, int64_t i, int64_t j) { expected.set(t, 0, w.at(i, j)); });
  ROSA_CHECK(out.same_bytes(expected), context);
  ROSA_CHECK(w.same_bytes(w_before), context);
}

void test_all() {
  uint64_t seed = 0;
  for (DType dtype : kDTypes) {
    for (int64_t i = 0; i < kLayouts; ++i) {
      for (int64_t j = 0; j < kWritableLayouts; ++j, ++seed) {
        test_case(patterns()[0], dtype, layout(i), layout(j), 1 + seed % 3, seed);
      }
    }
    for (int threads : {1, 2, 3}) {
      for (const auto* set : {&patterns(), &large_patterns()}) {
        for (const Pattern& pattern : *set) {
          test_case(pattern, dtype, layout(seed), writable_layout(seed), threads, seed);
          ++seed;
        }
      }
    }
  }
  run_concurrently([](int caller) {
    for (int64_t round = 0; round < 40; ++round) {
      test_case(patterns()[0], kDTypes[round % 4], layout(round), writable_layout(round), 2,
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
