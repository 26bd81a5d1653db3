// Shared by all native tests: patterns, the accuracy policy, and the sizes that sweeps use.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "floats.h"
#include "operands.h"
#include "rosa/ops.h"
#include "rosa/views.h"

#ifndef ROSA_TEST_REDUCED
#define ROSA_TEST_REDUCED 0
#endif

namespace rosa::test {

using cpu::Isa;

constexpr bool kReduced = ROSA_TEST_REDUCED;

struct Pattern {
  std::string name;
  int64_t rows, cols;
  std::vector<int32_t> crow, col;

  // keep(i, j) says whether (i, j) is a nonzero.
  template <typename Keep>
  Pattern(std::string name, int64_t rows, int64_t cols, Keep keep)
      : name(std::move(name)), rows(rows), cols(cols) {
    crow.reserve(static_cast<size_t>(rows + 1));
    crow.push_back(0);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) {
        if (keep(i, j)) col.push_back(static_cast<int32_t>(j));
      }
      crow.push_back(static_cast<int32_t>(col.size()));
    }
    col.shrink_to_fit();  // so that AddressSanitizer sees a read past the last index
  }
  int64_t nnz() const { return static_cast<int64_t>(col.size()); }
  CsrView view() const { return {crow.data(), col.data(), rows, cols, nnz()}; }
  template <typename Function>
  void for_each(Function function) const {  // function(t, i, j)
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t t = crow[i]; t < crow[i + 1]; ++t) function(t, i, int64_t{col[t]});
    }
  }
};

inline Pattern random_pattern(int64_t rows, int64_t cols, double density, uint64_t seed = 1) {
  Random random(seed);
  return {"random " + std::to_string(rows) + "x" + std::to_string(cols), rows, cols,
          [&](int64_t, int64_t) { return random.unit() < density; }};
}

// Each of these patterns has broken some sparse kernel before.
inline const std::vector<Pattern>& patterns() {
  static const std::vector<Pattern> all = {
      random_pattern(23, 31, 0.2),
      {"no nonzeros", 5, 7, [](int64_t, int64_t) { return false; }},
      {"no rows", 0, 7, [](int64_t, int64_t) { return true; }},
      {"no columns", 5, 0, [](int64_t, int64_t) { return true; }},
      {"1x1 full", 1, 1, [](int64_t, int64_t) { return true; }},
      {"1x1 empty", 1, 1, [](int64_t, int64_t) { return false; }},
      {"one row", 1, 50, [](int64_t, int64_t j) { return j % 3 == 1; }},
      {"one column", 50, 1, [](int64_t i, int64_t) { return i % 3 == 1; }},
      {"one full row", 9, 70, [](int64_t i, int64_t) { return i == 4; }},
      {"last row only", 9, 33, [](int64_t i, int64_t) { return i == 8; }},
      {"last column only", 33, 9, [](int64_t, int64_t j) { return j == 8; }},
      {"empty rows and columns", 20, 22, [](int64_t i, int64_t j) { return i % 3 && j % 4 == 2; }},
      {"full", 11, 13, [](int64_t, int64_t) { return true; }},
      {"tall", 301, 3, [](int64_t i, int64_t j) { return (i + j) % 2 == 0; }},
      // Column indices beyond the range of int16.
      {"wide", 3, 40000, [](int64_t i, int64_t j) { return j % 997 == i || j == 39999; }},
  };
  return all;
}

// These patterns give every thread some work. They have more rows and columns than one block or
// panel holds.
inline const std::vector<Pattern>& large_patterns() {
  static const std::vector<Pattern> all = {
      random_pattern(257, 390, 0.28),
      {"one row has it all", 40, 26000, [](int64_t i, int64_t j) { return i == 20 || j == 7; }},
  };
  return all;
}

// The dtype of the dense operands, and that of the values. The values are SDDMM's output, and an
// input of SpMM and csr_add.
struct Types {
  DType operand, values;
};
constexpr Types kTypes[] = {
    {DType::kFloat32, DType::kFloat32},  {DType::kBFloat16, DType::kBFloat16},
    {DType::kBFloat16, DType::kFloat32}, {DType::kFloat16, DType::kFloat16},
    {DType::kFloat16, DType::kFloat32},  {DType::kFloat64, DType::kFloat64},
};
constexpr Types types(int64_t index) { return kTypes[index % 6]; }

// Inner sizes around every vector width and unroll factor.
inline const std::vector<int64_t>& inner_sizes() {
  static const std::vector<int64_t> all =
      kReduced
          ? std::vector<int64_t>{0, 1, 7, 33, 129}
          : std::vector<int64_t>{0, 1, 3, 4, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 200};
  return all;
}

inline std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    if (cpu::isa_available(isa)) isas.push_back(isa);
  }
  return isas;
}

// The accuracy policy. A reduction of k products a*b may differ from the exact result by at most
// e = 4 sqrt(k) u (||a o b||_2 + |exact|). The results exact - e and exact + e are rounded to the
// output's dtype.
class Expected {
 public:
  void add(Wide a, Wide b) {
    exact_ += a * b;
    squares_ += a * b * a * b;
    ++terms_;
  }
  bool accepts(const Matrix& out, double got, DType computed_in) const {
    if (!std::isfinite(exact_)) return std::isnan(exact_) ? std::isnan(got) : got == exact_;
    const Wide u = computed_in == DType::kFloat64 ? 0x1p-53 : 0x1p-24;
    const Wide e = 4 * std::sqrt(Wide(terms_)) * u * (std::sqrt(squares_) + std::fabs(exact_));
    return round_to(out.dtype(), exact_ - e) <= got && got <= round_to(out.dtype(), exact_ + e);
  }

  Wide exact() const { return exact_; }

 private:
  Wide exact_ = 0, squares_ = 0;
  int64_t terms_ = 0;
};

// Calls function(1) and function(2) at the same time, from two threads.
template <typename Function>
void run_concurrently(Function function) {
  std::thread other([&] { function(1); });
  function(2);
  other.join();
}

}  // namespace rosa::test
