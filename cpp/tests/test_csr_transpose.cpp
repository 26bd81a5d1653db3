// csr_transpose against sorting the entries by (column, row).
#include <algorithm>
#include <numeric>

#include "support.h"

namespace rosa::test {
namespace {

// A guarded int32 array.
struct Indices {
  explicit Indices(int64_t size) : buffer(size * 4) {}
  int32_t* data() const { return reinterpret_cast<int32_t*>(buffer.data()); }
  bool holds(const std::vector<int32_t>& expected) const {
    return std::equal(expected.begin(), expected.end(), data()) && buffer.guards_intact();
  }
  Buffer buffer;
};

void test_case(const Pattern& pattern) {
  std::vector<int32_t> row(pattern.col.size());
  pattern.for_each([&](int64_t t, int64_t i, int64_t) { row[t] = static_cast<int32_t>(i); });
  std::vector<int32_t> permutation(pattern.col.size());
  std::iota(permutation.begin(), permutation.end(), 0);
  std::stable_sort(permutation.begin(), permutation.end(),
                   [&](int32_t s, int32_t t) { return pattern.col[s] < pattern.col[t]; });
  std::vector<int32_t> crow_t(static_cast<size_t>(pattern.cols + 1), 0), col_t;
  for (int32_t t : permutation) {
    ++crow_t[pattern.col[t] + 1];
    col_t.push_back(row[t]);
  }
  std::partial_sum(crow_t.begin(), crow_t.end(), crow_t.begin());

  const Indices got_crow(pattern.cols + 1), got_col(pattern.nnz()), got_permutation(pattern.nnz());
  cpu::csr_transpose(pattern.view(), got_crow.data(), got_col.data(), got_permutation.data());
  ROSA_CHECK(got_crow.holds(crow_t), pattern.name);
  ROSA_CHECK(got_col.holds(col_t), pattern.name);
  ROSA_CHECK(got_permutation.holds(permutation), pattern.name);
}

void test_all() {
  for (const auto* set : {&patterns(), &large_patterns()}) {
    for (const Pattern& pattern : *set) test_case(pattern);
  }
  run_concurrently([](int) { test_case(large_patterns()[0]); });
}

}  // namespace
}  // namespace rosa::test

int main() {
  rosa::test::test_all();
  return rosa::test::exit_status();
}
