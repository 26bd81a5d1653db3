// Tests how cuda/platform.h launches kernels under nvcc. The CUDA runtime is a stand-in that only
// records calls.
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

// Some sizes are below 48 KiB by themselves, but above 48 KiB together with the static part. The
// last size is the most that a block may have.
void test_every_shared_size_launches() {
  declare_static<1>();
  for (int64_t bytes : {0, 16, kDefault - kStatic, kDefault - kStatic + 16, kDefault, kDefault + 16,
                        runtime.optin_bytes - kStatic}) {
    const std::string error = error_of<1>(bytes);
    ROSA_CHECK(error.empty(), std::to_string(bytes) + ": " + error);
  }
}

void test_attributes_are_read_once_per_device() {
  declare_static<2>();
  const int set = runtime.limits_set, read = runtime.attributes_read;
  launch<kernel<2>>(grid_of(0), 1);
  ROSA_CHECK(runtime.attributes_read == read, "attributes are read without need");
  for (int device : {0, 1, 0, 1}) {
    const cuda::DeviceGuard guard(device);
    for (int64_t bytes : {100000, 16, 200000}) launch<kernel<2>>(grid_of(bytes), 1);
  }
  ROSA_CHECK(fake_cuda::device == 0, "the device is not restored");
  ROSA_CHECK(runtime.limits_set == set + 2 && runtime.attributes_read == read + 2,
             "not once per device");
  const auto key = reinterpret_cast<fake_cuda::Kernel>(&kernel<2>);
  for (int device : {0, 1})
    ROSA_CHECK((runtime.limit[{key, device}] == runtime.optin_bytes - kStatic),
               "not the most that a block may have");
  const cuda::DeviceGuard far(70);  // not one of the devices that are remembered
  for (int i = 0; i < 2; ++i) launch<kernel<2>>(grid_of(200000), 1);
  ROSA_CHECK((runtime.limit[{key, 70}] == runtime.optin_bytes - kStatic), "device 70");
}

// If each launch set the limit to its own need, a small launch could make a large one fail.
void test_threads_with_different_shared_sizes() {
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

void test_a_refused_launch_reports_and_clears_its_error() {
  declare_static<4>();
  const std::string error = error_of<4>(runtime.optin_bytes - kStatic + 16);
  ROSA_CHECK(error == "kernel launch: invalid argument (cudaErrorInvalidValue)", error);
  ROSA_CHECK(cudaGetLastError() == cudaSuccess, "the error is left to the next caller");
  ROSA_CHECK(error_of<4>(runtime.optin_bytes - kStatic).empty(), "the next launch fails");
}

void test_an_early_launch_sets_its_attribute() {
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
  rosa::test::test_every_shared_size_launches();
  rosa::test::test_attributes_are_read_once_per_device();
  rosa::test::test_threads_with_different_shared_sizes();
  rosa::test::test_a_refused_launch_reports_and_clears_its_error();
  rosa::test::test_an_early_launch_sets_its_attribute();
  return rosa::test::exit_status();
}
