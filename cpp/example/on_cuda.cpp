// SpMM on a CUDA device. Without one, this program prints why and succeeds.
#include <cuda_runtime_api.h>
#include <rosa/cuda.h>

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

using rosa::DType;

namespace {

void check_cuda(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

// Copies to device memory, which is freed when the process ends.
template <typename T>
T* on_device(const std::vector<T>& host) {
  void* device = nullptr;
  check_cuda(cudaMalloc(&device, host.size() * sizeof(T)));
  check_cuda(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return static_cast<T*>(device);
}

}  // namespace

int main() {
  const int device = 0;
  std::string reason = rosa::cuda::unavailable();
  if (reason.empty()) reason = rosa::cuda::unsupported(device);
  if (!reason.empty()) {
    std::printf("on_cuda: not run: rosa::cuda %s\n", reason.c_str());
    return 0;
  }

  // S (n, n) has ones on its diagonal and in the column to the right of it. x and y are (tokens,
  // n).
  const int64_t n = 64, tokens = 40, nnz = 2 * n - 1;
  std::vector<int32_t> crow = {0}, col;
  for (int32_t i = 0; i < n; ++i) {
    col.push_back(i);
    if (i + 1 < n) col.push_back(i + 1);
    crow.push_back(static_cast<int32_t>(col.size()));
  }
  const std::vector<float> values(nnz, 1.0f);
  std::vector<float> x(tokens * n), y(tokens * n);
  for (int64_t e = 0; e < tokens * n; ++e) x[e] = static_cast<float>(e % 9 - 4);

  // The same views as on the CPU, but of device memory.
  const rosa::CsrView pattern = {on_device(crow), on_device(col), n, n, nnz};
  const rosa::VectorView values_view = {on_device(values), DType::kFloat32, nnz, 1};
  const rosa::MatrixView x_t = {on_device(x), DType::kFloat32, n, tokens, 1, n};
  const rosa::MatrixView y_t = {on_device(y), DType::kFloat32, n, tokens, 1, n};
  // kGather needs no tile plan. For kTile, rosa::make_tile_plan makes one from a pattern on the
  // host.
  const auto variant = rosa::cuda::SpmmVariant::kGather;
  const rosa::PlanView no_plan;
  const std::vector<char> scratch(
      rosa::cuda::spmm_workspace_bytes(variant, pattern, no_plan, x_t, y_t, device));
  cudaStream_t stream = nullptr;  // the default one
  rosa::cuda::spmm(variant, pattern, no_plan, values_view, x_t, y_t, on_device(scratch), device,
                   stream);
  // cudaMemcpy waits for the kernels. rosa::cuda itself never waits.
  check_cuda(cudaMemcpy(y.data(), y_t.data, y.size() * sizeof(float), cudaMemcpyDeviceToHost));

  bool right = true;
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t j = 0; j < n; ++j) {
      const float* row = x.data() + token * n;
      right = right && y[token * n + j] == row[j] + (j + 1 < n ? row[j + 1] : 0.0f);
    }
  }
  std::printf("on_cuda: SpMM with %lld nonzeros: %s\n", static_cast<long long>(nnz),
              right ? "right" : "WRONG");
  return right ? 0 : 1;
}
