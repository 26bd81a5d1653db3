// How cuda/platform.h launches kernels under nvcc, against a CUDA runtime that only keeps the
// books.
#include <fake_cuda/cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "cuda/platform.h"

namespace rosa::test {
namespace {

using cuda::Grid;
using cuda::launch;
using fake_cuda::runtime;

template <int kNumber>
void kernel(int) {}

constexpr int kStatic = 12 * 1024, kDefault = 48 * 1024;

Grid grid_of(int64_t shared_bytes) {
  Grid grid;
  grid.shared_bytes = shared_bytes;
  return grid;
}

template <int kNumber>
std::string error_of(int64_t shared_bytes) {
  try {
    launch<kernel<kNumber>>(grid_of(shared_bytes), 1);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

template <int kNumber>
void declare_static() {
  runtime.static_bytes[reinterpret_cast<fake_cuda::Kernel>(&kernel<kNumber>)] = kStatic;
}

// Below 48 KiB of dynamic shared memory, but not of both; then all that a block may have.
void test_every_size_is_served() {
  declare_static<1>();
  for (int64_t bytes : {0, 16, kDefault - kStatic, kDefault - kStatic + 16, kDefault, kDefault + 16,
                        runtime.optin_bytes - kStatic}) {
    const std::string error = error_of<1>(bytes);
    ROSA_CHECK(error.empty(), std::to_string(bytes) + ": " + error);
  }
}

void test_a_kernel_is_asked_about_once_a_device() {
  declare_static<2>();
  const int set = runtime.limits_set, read = runtime.attributes_read;
  launch<kernel<2>>(grid_of(0), 1);
  ROSA_CHECK(runtime.attributes_read == read, "no dynamic shared memory, no question");
  for (int device : {0, 1, 0, 1}) {
    const cuda::DeviceGuard guard(device);
    for (int64_t bytes : {100000, 16, 200000}) launch<kernel<2>>(grid_of(bytes), 1);
  }
  ROSA_CHECK(fake_cuda::device == 0, "the device before");
  ROSA_CHECK(runtime.limits_set == set + 2 && runtime.attributes_read == read + 2, "two devices");
  const auto key = reinterpret_cast<fake_cuda::Kernel>(&kernel<2>);
  for (int device : {0, 1})
    ROSA_CHECK((runtime.limit[{key, device}] == runtime.optin_bytes - kStatic), "the most");
  const cuda::DeviceGuard far(70);  // past the devices that are remembered
  for (int i = 0; i < 2; ++i) launch<kernel<2>>(grid_of(200000), 1);
  ROSA_CHECK((runtime.limit[{key, 70}] == runtime.optin_bytes - kStatic), "device 70");
}

// A limit that followed each launch's need would let the small ones refuse the large ones.
void test_threads_of_different_needs() {
  declare_static<3>();
  std::vector<std::string> errors(8);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < errors.size(); ++i) {
    threads.emplace_back([&errors, i] {
      for (int round = 0; round < 300 && errors[i].empty(); ++round)
        errors[i] = error_of<3>(i % 2 ? 64 * 1024 : 200 * 1024);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& error : errors) ROSA_CHECK(error.empty(), error);
}

void test_a_refusal_says_why_and_leaves_nothing_behind() {
  declare_static<4>();
  const std::string error = error_of<4>(runtime.optin_bytes - kStatic + 16);
  ROSA_CHECK(error == "kernel launch: invalid argument (cudaErrorInvalidValue)", error);
  ROSA_CHECK(cudaGetLastError() == cudaSuccess, "the next caller's error");
  ROSA_CHECK(error_of<4>(runtime.optin_bytes - kStatic).empty(), "the next launch");
}

void test_early_launches_say_so() {
  Grid grid;
  launch<kernel<5>>(grid, 1);
  ROSA_CHECK(runtime.last_attributes == 0, "not early");
  grid.early = true;
  launch<kernel<5>>(grid, 1);
  ROSA_CHECK(runtime.last_attributes == 1, "early");
}

}  // namespace
}  // namespace rosa::test

int main() {
  rosa::test::test_every_size_is_served();
  rosa::test::test_a_kernel_is_asked_about_once_a_device();
  rosa::test::test_threads_of_different_needs();
  rosa::test::test_a_refusal_says_why_and_leaves_nothing_behind();
  rosa::test::test_early_launches_say_so();
  return rosa::test::exit_status();
}
