// The cases that SDDMM and SpMM are tested on. Both ops reduce over an inner size k, have two dense
// matrices and a vector of values, and dispatch on the instruction set.
#pragma once

#include <limits>
#include <string>
#include <vector>

#include "support.h"

namespace rosa::test {

struct Case {
  const Pattern* pattern;
  Types types;
  int64_t k;
  int64_t turn;  // selects the parameters that are not swept, and seeds the data
  Layout first, second;
  std::vector<int> threads;
  double scale = 1;

  std::string describe(Isa isa, int threads) const {
    return pattern->name + ", " + name(types.operand) + "/" + name(types.values) +
           ", k=" + std::to_string(k) + ", layouts " + std::to_string(static_cast<int>(first)) +
           "/" + std::to_string(static_cast<int>(second)) + ", turn " + std::to_string(turn) +
           ", isa " + std::to_string(static_cast<int>(isa)) + ", threads " +
           std::to_string(threads);
  }
  template <typename Function>
  void for_each_execution(Function function) const {  // function(isa, threads)
    for (Isa isa : available_isas()) {
      for (int count : threads) function(isa, count);
    }
  }
};

// Fills row i with Inf or NaN if `referenced[i]` is false. A row that no nonzero refers to must not
// reach the result. Matrices whose rows share memory are not changed.
inline void spoil_unreferenced(Matrix& matrix, const std::vector<bool>& referenced, Layout layout) {
  if (static_cast<int>(layout) >= kWritableLayouts) return;
  for (int64_t i = 0; i < matrix.rows(); ++i) {
    if (referenced[static_cast<size_t>(i)]) continue;
    for (int64_t j = 0; j < matrix.cols(); ++j) {
      matrix.set(i, j,
                 i % 2 ? std::numeric_limits<double>::infinity()
                       : std::numeric_limits<double>::quiet_NaN());
    }
  }
}

struct Referenced {
  std::vector<bool> rows, cols;
  explicit Referenced(const Pattern& pattern)
      : rows(static_cast<size_t>(pattern.rows)), cols(static_cast<size_t>(pattern.cols)) {
    pattern.for_each([&](int64_t, int64_t i, int64_t j) {
      rows[static_cast<size_t>(i)] = cols[static_cast<size_t>(j)] = true;
    });
  }
};

// Calls test(case) for every case that both ops have.
template <typename Test>
void sweep(Test test) {
  int64_t turn = 0;
  // Every size with every pair of layouts. The pattern reaches all paths.
  for (Types types : kTypes) {
    for (int64_t k : inner_sizes()) {
      for (int64_t pair = 0; pair < kLayouts * kLayouts; ++pair) {
        ++turn;
        if (kReduced && turn % 7 != 0) continue;
        test({&patterns()[0],
              types,
              k,
              turn,
              layout(pair / kLayouts),
              layout(pair),
              {1 + static_cast<int>(turn % 3)}});
      }
    }
  }
  // Every pattern with every number of threads.
  for (const Pattern& pattern : patterns()) {
    for (Types types : kTypes) {
      for (int64_t k : {0, 1, 4, 33}) {
        ++turn;
        test({&pattern, types, k, turn, layout(turn), layout(turn / kLayouts), {1, 2, 3}});
      }
    }
  }
  // Every way to divide the work: few and many tokens, and up to far more threads than cores.
  for (const Pattern& pattern : large_patterns()) {
    for (Types types : kTypes) {
      for (int64_t k : kReduced ? std::vector<int64_t>{16, 40} : std::vector<int64_t>{5, 40, 200}) {
        ++turn;
        if (kReduced && turn % 3 != 0) continue;
        const Layout first = turn % 2 ? Layout::kRow : Layout::kColumn;
        const Layout second = turn / 2 % 2 ? Layout::kRow : Layout::kColumn;
        test({&pattern, types, k, turn, first, second, {1, 3, 4, 16}});
      }
    }
  }
  // With this many nonzeros, the passes over only the values are divided too.
  static const Pattern dense = random_pattern(640, 760, 0.9);
  for (int64_t i = 0; i < (kReduced ? 2 : 6); ++i) {
    ++turn;
    test({&dense, types(i), 3, turn, layout(turn), layout(turn / kLayouts), {3}});
  }
  // Results that are subnormal in float16, and results beyond its range.
  for (Types types : kTypes) {
    for (double scale : {1e-3, 200.0}) {
      ++turn;
      test({&patterns()[0], types, 16, turn, layout(turn), layout(turn / kLayouts), {1}, scale});
    }
  }
  // Two callers at once.
  run_concurrently([&](int caller) {
    for (int64_t round = 0; round < 40; ++round) {
      test({&patterns()[0],
            types(round),
            33,
            1000 * caller + round,
            layout(round),
            layout(round / 3),
            {2}});
    }
  });
}

}  // namespace rosa::test
