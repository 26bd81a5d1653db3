// Shared by the tests of the emulated csr_add_, csr_gather and csr_scatter_.
#pragma once

#include <string>
#include <vector>

#include "../support.h"
#include "far_matrix.h"
#include "rosa/cuda.h"
#include "simt/emulator.h"

namespace rosa::test {

// patterns() and more. Some rows have more entries than one block takes, and many rows have hardly
// any. Some patterns have so many rows that the search for a row needs several steps.
inline const std::vector<Pattern>& entry_patterns() {
  static const std::vector<Pattern> all = [] {
    std::vector<Pattern> all = patterns();
    all.push_back(random_pattern(97, 390, 0.12));
    all.push_back(
        {"one long row", 40, 2600, [](int64_t i, int64_t j) { return i == 20 || j == 7; }});
    all.push_back({"mostly empty rows", 20000, 5,
                   [](int64_t i, int64_t j) { return i % 61 == 5 && j % 2 == 0; }});
    all.push_back(
        {"first and last row", 9000, 3, [](int64_t i, int64_t) { return i == 0 || i == 8999; }});
    return all;
  }();
  return all;
}

inline std::string describe(const Pattern& pattern, Types types, Layout w, Layout values) {
  return pattern.name + ", " + name(types.operand) + "/" + name(types.values) + ", layouts " +
         std::to_string(static_cast<int>(w)) + "/" + std::to_string(static_cast<int>(values));
}

// Calls test(pattern, types, layout of w, layout of the values, turn) for all types that CUDA has.
// It covers the first `w_layouts` layouts of w and the first `value_layouts` layouts of the values.
template <class Test>
void sweep_entries(int w_layouts, int value_layouts, Test test) {
  int64_t turn = 0;
  for (Types types : kTypes) {
    if (types.operand == DType::kFloat64) continue;
    for (int64_t w = 0; w < w_layouts; ++w) {
      for (int64_t values = 0; values < value_layouts; ++values) {
        ++turn;
        if (kReduced && turn % 3 != 0) continue;
        test(patterns()[0], types, layout(w), layout(values), turn);
      }
    }
    for (const Pattern& pattern : entry_patterns()) {
      ++turn;
      if (kReduced && turn % 2 != 0) continue;
      test(pattern, types, layout(turn % w_layouts), layout(turn % value_layouts), turn);
    }
  }
}

// Rows [begin, end) of a pattern, as a pattern of their own. Its crow_indices[0] is not 0.
struct Slab {
  const Pattern& pattern;
  int64_t begin, end;

  int64_t first() const { return pattern.crow[static_cast<size_t>(begin)]; }
  int64_t nnz() const { return pattern.crow[static_cast<size_t>(end)] - first(); }
  CsrView view() const {
    return {pattern.crow.data() + begin, pattern.col.data(), end - begin, pattern.cols, nnz()};
  }
  MatrixView rows_of(const MatrixView& w) const {
    MatrixView part = w;
    part.data = static_cast<char*>(w.data) + begin * w.row_stride * item_size(w.dtype);
    part.rows = end - begin;
    return part;
  }
};

inline std::vector<Slab> slabs_of(const Pattern& pattern) {
  const int64_t m = pattern.rows;
  return {
      {pattern, 0, m / 3}, {pattern, m / 3, m / 3}, {pattern, m / 3, m - 1}, {pattern, m - 1, m}};
}

}  // namespace rosa::test
