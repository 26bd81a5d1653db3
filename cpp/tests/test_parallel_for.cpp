// parallel_for runs every worker exactly once, from any calling thread.
#include "cpu/parallel_for.h"

#include "support.h"

namespace rosa::test {
namespace {

void test_each_worker_runs_once(int workers) {
  // These are plain ints on purpose. If a worker runs twice, or parallel_for returns before the
  // last write, ThreadSanitizer reports a race.
  std::vector<int> runs(static_cast<size_t>(workers), 0);
  cpu::parallel_for(workers, [&](int worker) { ++runs[static_cast<size_t>(worker)]; });
  for (int count : runs) ROSA_CHECK(count == 1, std::to_string(workers) + " workers");
}

}  // namespace
}  // namespace rosa::test

int main() {
  using rosa::test::test_each_worker_runs_once;
  for (int workers : {1, 2, 3, 4, 7, 16}) {
    for (int round = 0; round < 50; ++round) test_each_worker_runs_once(workers);
  }
  rosa::test::run_concurrently([](int) {
    for (int round = 0; round < 50; ++round) test_each_worker_runs_once(3);
  });
  return rosa::test::exit_status();
}
