// Compares the benchmark's CUDA kernels and their launch code with the oracle, in the emulator. The
// time of a wrong peer would mean nothing.
#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "../sweep.h"
#include "rosa/baselines.h"
#include "simt/emulator.h"

namespace rosa::test {
namespace {

using namespace cuda::baselines;

constexpr Types kOneDType[] = {
    {DType::kFloat32, DType::kFloat32},
    {DType::kBFloat16, DType::kBFloat16},
    {DType::kFloat16, DType::kFloat16},
};

// The rows in order of descending nnz, and the extent of a grid that is trimmed to the pattern.
struct Swizzle {
  std::vector<int32_t> rows;
  int64_t nonempty = 0, longest = 0;

  explicit Swizzle(const Pattern& pattern) : rows(static_cast<size_t>(pattern.rows)) {
    const auto nnz = [&](int32_t i) { return pattern.crow[i + 1] - pattern.crow[i]; };
    std::iota(rows.begin(), rows.end(), 0);
    std::stable_sort(rows.begin(), rows.end(),
                     [&](int32_t i, int32_t j) { return nnz(i) > nnz(j); });
    for (int32_t i : rows) {
      nonempty += nnz(i) > 0;
      longest = std::max<int64_t>(longest, nnz(i));
    }
  }
};

std::string describe(const Pattern& pattern, DType dtype, int64_t k, const std::string& how) {
  return how + ", " + pattern.name + ", " + name(dtype) + ", k=" + std::to_string(k);
}

void check_values(const Matrix& out, int64_t i, int64_t j, const Expected& expected,
                  const std::string& context) {
  ROSA_CHECK(expected.accepts(out, out.at(i, j), out.dtype()),
             context + ": (" + std::to_string(i) + ", " + std::to_string(j) + ") is " +
                 std::to_string(out.at(i, j)) + ", exactly " + std::to_string(expected.exact()));
}

void test_sddmm(const Pattern& pattern, DType dtype, int64_t k, uint64_t turn) {
  const Swizzle swizzle(pattern);
  const Referenced referenced(pattern);
  Random random(turn);
  Matrix a(dtype, pattern.rows, k, Layout::kRow), b(dtype, pattern.cols, k, Layout::kRow);
  spoil_unreferenced(a.fill(random), referenced.rows, Layout::kRow);
  spoil_unreferenced(b.fill(random), referenced.cols, Layout::kRow);
  std::vector<Expected> expected(static_cast<size_t>(pattern.nnz()));
  pattern.for_each([&](int64_t t, int64_t i, int64_t j) {
    for (int64_t l = 0; l < k; ++l) expected[static_cast<size_t>(t)].add(a.at(i, l), b.at(j, l));
  });
  for (bool trimmed : {false, true}) {
    const std::string context = describe(pattern, dtype, k, trimmed ? "trimmed" : "full grid");
    simt::set_seed(turn * 2 + trimmed);
    const Matrix out(dtype, pattern.nnz(), 1, Layout::kRow);
    sputnik_style_sddmm(
        pattern.view(), swizzle.rows.data(), trimmed ? swizzle.nonempty : pattern.rows,
        trimmed ? swizzle.longest : pattern.cols, a.view(), b.view(), out.vector(), 0, nullptr);
    for (int64_t t = 0; t < pattern.nnz(); ++t)
      check_values(out, t, 0, expected[static_cast<size_t>(t)], context);
    ROSA_CHECK(out.surroundings_intact(), context);
  }
}

void test_spmm(const Pattern& pattern, DType dtype, int64_t k, uint64_t turn) {
  const std::string context = describe(pattern, dtype, k, "spmm");
  const Swizzle swizzle(pattern);
  Random random(turn);
  const Matrix values = Matrix(dtype, pattern.nnz(), 1, Layout::kRow).fill(random);
  Matrix b(dtype, pattern.cols, k, Layout::kRow);
  spoil_unreferenced(b.fill(random), Referenced(pattern).cols, Layout::kRow);
  // The column indices begin at a multiple of 16 bytes, and end where their memory ends.
  const Buffer columns(pattern.nnz() * 4);
  std::copy(pattern.col.begin(), pattern.col.end(), reinterpret_cast<int32_t*>(columns.data()));
  CsrView view = pattern.view();
  view.col_indices = reinterpret_cast<const int32_t*>(columns.data());
  std::vector<Expected> expected(static_cast<size_t>(pattern.rows * k));
  pattern.for_each([&](int64_t t, int64_t i, int64_t j) {
    for (int64_t l = 0; l < k; ++l)
      expected[static_cast<size_t>(i * k + l)].add(values.at(t), b.at(j, l));
  });
  simt::set_seed(turn);
  const Matrix c(dtype, pattern.rows, k, Layout::kRow);
  sputnik_style_spmm(view, swizzle.rows.data(), values.vector(), b.view(), c.view(), 0, nullptr);
  for (int64_t i = 0; i < pattern.rows; ++i) {
    for (int64_t l = 0; l < k; ++l)
      check_values(c, i, l, expected[static_cast<size_t>(i * k + l)], context);
  }
  ROSA_CHECK(c.surroundings_intact(), context);
}

// Rows begin at every offset from a multiple of four. They end before, at and after whole tiles of
// 32: the lengths are 0, 1, 31, 32, 33, ... in turn.
Pattern staggered() {
  static const std::vector<int64_t> lengths = {0, 1, 31, 32, 33, 2, 35, 64, 65, 3, 96, 30, 34, 29};
  return {"staggered", 42, 101, [](int64_t i, int64_t j) {
            return (j * 7 + i) % 101 < lengths[static_cast<size_t>(i) % lengths.size()];
          }};
}

void test_sizes() {
  const Pattern lengths = staggered();
  uint64_t turn = 0;
  for (Types types : kOneDType) {
    for (int64_t k : {0, 1, 2, 3, 4, 8, 12, 16, 20, 32, 33, 48, 62, 64, 65, 100, 128, 192, 200}) {
      ++turn;
      if (kReduced && turn % 3 != 0) continue;
      test_sddmm(lengths, types.operand, k, turn);
      test_spmm(lengths, types.operand, k, turn);
    }
  }
}

void test_patterns() {
  uint64_t turn = 1000;
  for (const Pattern& pattern : patterns()) {
    for (Types types : kOneDType) {
      ++turn;
      if (kReduced && turn % 3 != 0) continue;
      for (int64_t k : {5, 8, 40}) {
        test_sddmm(pattern, types.operand, k, turn);
        test_spmm(pattern, types.operand, k, turn);
      }
    }
  }
}

void test_read_and_empty() {
  for (int64_t bytes : {0, 16, 48, 16 * 1025, 16 * 9001}) {
    const Buffer data(bytes), sink(4);
    read_bandwidth(data.data(), bytes, 2, 3, sink.data(), 0, nullptr);
    ROSA_CHECK(data.all_poison() && sink.guards_intact(), std::to_string(bytes));
  }
  launch_empty(3, 0, nullptr);
}

template <typename Call>
bool refused(Call call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

void test_bad_arguments() {
  const Pattern pattern = random_pattern(20, 30, 0.2);
  const Swizzle swizzle(pattern);
  const Matrix a(DType::kFloat32, 20, 8, Layout::kRow), b(DType::kFloat32, 30, 8, Layout::kRow);
  const Matrix out(DType::kFloat32, pattern.nnz(), 1, Layout::kRow);
  const auto sddmm = [&](const Matrix& x, const Matrix& y, int64_t rows) {
    return refused([&] {
      sputnik_style_sddmm(pattern.view(), swizzle.rows.data(), rows, 30, x.view(), y.view(),
                          out.vector(), 0, nullptr);
    });
  };
  ROSA_CHECK(sddmm(a, Matrix(DType::kFloat16, 30, 8, Layout::kRow), 20), "two dtypes");
  ROSA_CHECK(sddmm(a, Matrix(DType::kFloat32, 30, 9, Layout::kRow), 20), "two k");
  ROSA_CHECK(sddmm(a, a, 20), "rows");
  ROSA_CHECK(sddmm(a, b, 21), "more rows than there are");
  ROSA_CHECK(sddmm(a, Matrix(DType::kFloat32, 30, 8, Layout::kColumn), 20), "column-major");
  ROSA_CHECK(sddmm(a, Matrix(DType::kFloat32, 30, 8, Layout::kRowMisaligned), 20), "misaligned");
  ROSA_CHECK(sddmm(Matrix(DType::kFloat64, 20, 8, Layout::kRow),
                   Matrix(DType::kFloat64, 30, 8, Layout::kRow), 20),
             "float64");
  const Matrix short_values(DType::kFloat32, pattern.nnz() - 1, 1, Layout::kRow);
  ROSA_CHECK(refused([&] {
               sputnik_style_spmm(pattern.view(), swizzle.rows.data(), short_values.vector(),
                                  b.view(), a.view(), 0, nullptr);
             }),
             "too few values");
  ROSA_CHECK(refused([] { read_bandwidth(nullptr, 8, 1, 1, nullptr, 0, nullptr); }), "half a load");
}

}  // namespace
}  // namespace rosa::test

int main() {
  rosa::test::test_sizes();
  rosa::test::test_patterns();
  rosa::test::test_read_and_empty();
  rosa::test::test_bad_arguments();
  return rosa::test::exit_status();
}
