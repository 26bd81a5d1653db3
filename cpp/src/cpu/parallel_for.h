// parallel_for, the only function that starts threads in this library.
#pragma once

#include <exception>
#include <thread>
#include <vector>

namespace rosa::cpu {

// Calls body(worker) once for each worker in [0, workers), on up to `workers` threads. It returns
// when all are done. A worker's work depends only on its number, so results do not depend on
// scheduling. `body` must not throw.
//
// It uses OpenMP if there is one, so that torch and this library share one pool of threads.
// Otherwise it uses std::thread. So does ThreadSanitizer's build, because ThreadSanitizer reports
// false races inside libgomp.
template <class Body>
void parallel_for(int workers, const Body& body) {
  if (workers <= 1) {
    body(0);
    return;
  }
#if ROSA_OPENMP
#pragma omp parallel for num_threads(workers) schedule(static, 1)
  for (int worker = 0; worker < workers; ++worker) body(worker);
#else
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(workers));
  int started = 1;  // the caller is worker 0
  try {
    for (; started < workers; ++started) threads.emplace_back([&body, started] { body(started); });
  } catch (const std::exception&) {
    // No more threads could be started. The caller does the rest of the work.
  }
  body(0);
  for (int worker = started; worker < workers; ++worker) body(worker);
  for (std::thread& thread : threads) thread.join();
#endif
}

}  // namespace rosa::cpu
