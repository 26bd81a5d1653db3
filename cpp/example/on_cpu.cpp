// A sparse layer on the CPU: its forward product (SpMM) and the gradient of its nonzeros (SDDMM).
#include <rosa/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <thread>
#include <vector>

using rosa::DType;

int main() {
  constexpr int64_t m = 96, n = 64, tokens = 40;

  // Every seventh element of S (m, n) is a nonzero. Columns ascend within a row.
  std::vector<int32_t> crow = {0}, col;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = i % 7; j < n; j += 7) col.push_back(static_cast<int32_t>(j));
    crow.push_back(static_cast<int32_t>(col.size()));
  }
  const int64_t nnz = crow.back();
  const rosa::CsrView pattern = {crow.data(), col.data(), m, n, nnz};

  // Small integers: their sums are exact in float32, so the results below can be compared exactly.
  std::vector<float> values(nnz), x(tokens * n), y(tokens * m), dy(tokens * m), dvalues(nnz);
  for (int64_t t = 0; t < nnz; ++t) values[t] = static_cast<float>(t % 5 - 2);
  for (int64_t e = 0; e < tokens * n; ++e) x[e] = static_cast<float>(e % 9 - 4);
  for (int64_t e = 0; e < tokens * m; ++e) dy[e] = static_cast<float>(e % 11 - 5);

  // Activations lie token by token: x is (tokens, n), row-major. The ops take x^T (n, tokens).
  // That is the same memory with a row stride of 1 and a column stride of n. Nothing is copied.
  const auto transposed = [](std::vector<float>& data, int64_t features) -> rosa::MatrixView {
    return {data.data(), DType::kFloat32, features, tokens, 1, features};
  };
  const auto view = [](std::vector<float>& data) -> rosa::VectorView {
    return {data.data(), DType::kFloat32, static_cast<int64_t>(data.size()), 1};
  };

  // The widest instruction set that this build has and this machine can run.
  rosa::cpu::Isa isa = rosa::cpu::Isa::kPortable;
  for (auto wider : {rosa::cpu::Isa::kAvx2, rosa::cpu::Isa::kAvx512}) {
    if (rosa::cpu::isa_available(wider)) isa = wider;
  }
  const int threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  // The ops allocate nothing; the caller provides scratch. Wrong shapes or dtypes throw
  // std::invalid_argument.
  std::vector<char> workspace(
      std::max(rosa::cpu::spmm_workspace_bytes(pattern, tokens, DType::kFloat32, threads, isa),
               rosa::cpu::sddmm_workspace_bytes(pattern, tokens, DType::kFloat32, threads, isa)));

  // y^T = S x^T
  rosa::cpu::spmm(pattern, view(values), transposed(x, n), transposed(y, m), workspace.data(),
                  threads, isa);
  // dvalues[t] = sum over tokens of dy[token, i_t] x[token, j_t]
  rosa::cpu::sddmm(pattern, transposed(dy, m), transposed(x, n), view(dvalues), workspace.data(),
                   threads, isa);

  // The same results by plain loops.
  std::vector<double> y_want(tokens * m), dvalues_want(nnz);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t t = crow[i]; t < crow[i + 1]; ++t) {
      for (int64_t token = 0; token < tokens; ++token) {
        const double x_element = x[token * n + col[t]];
        y_want[token * m + i] += values[t] * x_element;
        dvalues_want[t] += dy[token * m + i] * x_element;
      }
    }
  }
  const bool right = std::equal(y.begin(), y.end(), y_want.begin()) &&
                     std::equal(dvalues.begin(), dvalues.end(), dvalues_want.begin());
  std::printf("on_cpu: SpMM and SDDMM with %lld nonzeros: %s\n", static_cast<long long>(nnz),
              right ? "right" : "WRONG");
  return right ? 0 : 1;
}
