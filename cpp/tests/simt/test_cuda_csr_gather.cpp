// The CUDA csr_gather in the emulator: out[t] is w[i_t, j_t], bit for bit.
#include "csr_problem.h"

namespace rosa::test {
namespace {

void test_case(const Pattern& pattern, DType dtype, Layout w_layout, Layout out_layout,
               int64_t turn) {
  const std::string context = describe(pattern, {dtype, dtype}, w_layout, out_layout);
  Random random(static_cast<uint64_t>(turn));
  const Matrix w = Matrix(dtype, pattern.rows, pattern.cols, w_layout).fill(random);
  const Matrix w_before = w;
  const Matrix unwritten(dtype, pattern.nnz(), 1, out_layout);

  const Matrix out = unwritten;
  simt::set_seed(static_cast<uint64_t>(turn % 3));
  cuda::csr_gather(w.view(), pattern.view(), out.vector(), 0, nullptr);

  Matrix expected = unwritten;
  pattern.for_each([&](int64_t t, int64_t i, int64_t j) { expected.set(t, 0, w.at(i, j)); });
  ROSA_CHECK(out.same_bytes(expected), context);
  ROSA_CHECK(w.same_bytes(w_before), context);
}

// Slabs of rows, each with an output buffer of its own, as in a product computed slab by slab.
void test_slabs() {
  for (const Pattern& pattern : {random_pattern(50, 40, 0.3), random_pattern(300, 7, 0.05)}) {
    for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      Random random(7);
      const Matrix w =
          Matrix(dtype, pattern.rows, pattern.cols, Layout::kColumnSliced).fill(random);
      const Matrix whole(dtype, pattern.nnz(), 1, Layout::kRow);
      cuda::csr_gather(w.view(), pattern.view(), whole.vector(), 0, nullptr);
      for (const Slab& slab : slabs_of(pattern)) {
        const Matrix out(dtype, slab.nnz(), 1, Layout::kRow);
        cuda::csr_gather(slab.rows_of(w.view()), slab.view(), out.vector(), 0, nullptr);
        for (int64_t t = 0; t < slab.nnz(); ++t)
          ROSA_CHECK(out.at(t) == whole.at(slab.first() + t), pattern.name);
        ROSA_CHECK(out.surroundings_intact(), pattern.name);
      }
    }
  }
}

void test_bad_arguments() {
  const Pattern pattern = random_pattern(20, 30, 0.2);
  const Matrix w(DType::kFloat32, 20, 30, Layout::kRow),
      small(DType::kFloat32, 19, 30, Layout::kRow), wide(DType::kFloat64, 20, 30, Layout::kRow);
  const Matrix out(DType::kFloat32, pattern.nnz(), 1, Layout::kRow),
      few(DType::kFloat32, pattern.nnz() - 1, 1, Layout::kRow),
      narrow(DType::kFloat16, pattern.nnz(), 1, Layout::kRow),
      wide_out(DType::kFloat64, pattern.nnz(), 1, Layout::kRow);
  const auto refused = [&](const Matrix& from, const Matrix& to) {
    try {
      cuda::csr_gather(from.view(), pattern.view(), to.vector(), 0, nullptr);
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  ROSA_CHECK(refused(small, out), "shape");
  ROSA_CHECK(refused(w, few), "size of out");
  ROSA_CHECK(refused(w, narrow), "dtype of out");
  ROSA_CHECK(refused(wide, wide_out), "float64");
  ROSA_CHECK(!refused(w, out), "good arguments");
}

}  // namespace
}  // namespace rosa::test

int main() {
  using namespace rosa::test;
  sweep_entries(kLayouts, kWritableLayouts,
                [](const Pattern& pattern, Types types, Layout w, Layout out, int64_t turn) {
                  if (types.operand == types.values)
                    test_case(pattern, types.operand, w, out, turn);
                });
  test_slabs();
  test_bad_arguments();
  run_concurrently([](int caller) {
    for (int64_t round = 0; round < 20; ++round)
      test_case(patterns()[0], kDTypes[round % 3], layout(round), writable_layout(round),
                1000 * caller + round);
  });
  return exit_status();
}
