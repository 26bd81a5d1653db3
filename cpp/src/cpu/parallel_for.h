// The one way this library uses threads.
#pragma once

#include <exception>
#include <thread>
#include <vector>

namespace rosa::cpu {

// Calls body(worker) once for each worker in [0, workers), on up to `workers` threads, and returns
// when all are done. Which work a worker does depends on its number alone, so results do not depend
// on scheduling. `body` must not throw.
//
// OpenMP where there is one, so that torch and this library share one pool; std::thread for
// ThreadSanitizer, which reports false races inside libgomp, and for systems without OpenMP.
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
    // No more threads to be had: the caller does what is left.
  }
  body(0);
  for (int worker = started; worker < workers; ++worker) body(worker);
  for (std::thread& thread : threads) thread.join();
#endif
}

}  // namespace rosa::cpu
