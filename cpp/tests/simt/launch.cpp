// Launches: the limits a GPU has, and the operating-system threads that blocks run on.
#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>

#include "simt/state.h"

namespace rosa::simt {
namespace {

thread_local uint64_t launch_seed = 0;
thread_local int blocks_at_once = 0;
thread_local int64_t device_shared_bytes = kMaxSharedBytes;
thread_local bool shared_memory_allowed = false;

// A grid, and which of its blocks are still to be run.
struct Launch {
  dim3 blocks, threads;
  int64_t shared_bytes, shared_limit;
  KernelCall call;
  uint64_t seed;
  uint64_t total;

  std::mutex mutex;
  uint64_t next = 0;             // position of the next block to run
  uint64_t failed = UINT64_MAX;  // the lowest position of a block that failed
  std::exception_ptr error;
  LaunchSync sync = {};

  // Blocks may run in any order. A random schedule starts at a random block, and takes a stride
  // that meets every block.
  uint64_t block_at(uint64_t position) const {
    if (seed == 0) return position;
    Random random(seed);
    const uint64_t start = random.bits() % total;
    uint64_t stride = 1 + random.bits() % total;
    while (std::__gcd(stride, total) != 1) ++stride;
    return (start + position * (stride % total)) % total;
  }

  void run_blocks() {
    static thread_local Block block;
    block.call = call;
    block.seed = seed;
    block.launch_sync = &sync;
    block.dim = threads;
    block.grid = blocks;
    for (;;) {
      uint64_t position;
      {
        const std::lock_guard<std::mutex> lock(mutex);
        // Blocks before the failed one are still run. So the error that is reported does not depend
        // on which block was faster.
        if (next == total || next > failed) break;
        position = next++;
      }
      const uint64_t linear = block_at(position);
      block.index = {static_cast<unsigned>(linear % blocks.x),
                     static_cast<unsigned>(linear / blocks.x % blocks.y),
                     static_cast<unsigned>(linear / blocks.x / blocks.y)};
      try {
        block.run(linear, shared_bytes, shared_limit);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (position < failed) {
          failed = position;
          error = std::current_exception();
        }
      }
    }
    tsan::acquire(&sync.end);
  }
};

// The operating-system threads that help one launching thread. They sleep between launches.
class Helpers {
 public:
  ~Helpers() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void run(Launch& launch, int helpers) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(threads_.size()) < helpers) {
        threads_.emplace_back([this] { serve(); });
      }
      launch_ = &launch;
      wanted_ = helpers;
    }
    wake_.notify_all();
    launch.run_blocks();
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;  // helpers that have not begun are not needed any more
    done_.wait(lock, [this] { return busy_ == 0; });
    launch_ = nullptr;
  }

 private:
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return stop_ || wanted_ > 0; });
      if (stop_) return;
      --wanted_;
      ++busy_;
      Launch& launch = *launch_;
      lock.unlock();
      launch.run_blocks();
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  Launch* launch_ = nullptr;
  int wanted_ = 0, busy_ = 0;
  bool stop_ = false;
};

void check(bool ok, const std::string& what) {
  if (!ok) throw Error("launch: " + what);
}

void check_limits(dim3 blocks, dim3 threads, int64_t shared_bytes, int64_t shared_limit) {
  const auto triple = [](dim3 d) { return describe(uint3{d.x, d.y, d.z}); };
  check(running == nullptr, "a kernel cannot launch another");
  check(blocks.x > 0 && blocks.y > 0 && blocks.z > 0,
        "expected blocks in every dimension, got a grid of " + triple(blocks));
  check(blocks.x <= INT32_MAX && blocks.y <= kMaxGridYZ && blocks.z <= kMaxGridYZ,
        "expected at most (2147483647, 65535, 65535) blocks, got " + triple(blocks));
  check(threads.x > 0 && threads.y > 0 && threads.z > 0 && threads.x <= kMaxThreads &&
            threads.y <= kMaxThreads && threads.z <= 64 &&
            threads.x * threads.y * threads.z <= kMaxThreads,
        "expected 1 to 1024 threads, at most (1024, 1024, 64), got " + triple(threads));
  check(shared_bytes >= 0 && shared_bytes <= shared_limit,
        "expected at most " + std::to_string(shared_limit) +
            " bytes of dynamic shared memory, got " + std::to_string(shared_bytes));
}

}  // namespace

void set_seed(uint64_t seed) { launch_seed = seed; }
uint64_t seed() { return launch_seed; }
void set_blocks_at_once(int blocks) { blocks_at_once = blocks; }
int64_t set_shared_bytes(int64_t bytes) {
  return std::exchange(device_shared_bytes, std::max(bytes, kDefaultSharedBytes));
}
void allow_shared_memory() { shared_memory_allowed = true; }

void launch(dim3 blocks, dim3 threads, int64_t shared_bytes, KernelCall call) {
  const int64_t shared_limit =
      std::exchange(shared_memory_allowed, false) ? device_shared_bytes : kDefaultSharedBytes;
  check_limits(blocks, threads, shared_bytes, shared_limit);
  Launch launch{};
  launch.blocks = blocks;
  launch.threads = threads;
  launch.shared_bytes = shared_bytes;
  launch.shared_limit = shared_limit;
  launch.call = call;
  launch.seed = launch_seed;
  launch.total = static_cast<uint64_t>(blocks.x) * blocks.y * blocks.z;

  // Waking a helper takes as long as running a thousand threads.
  constexpr uint64_t kThreadsPerHelper = 4096;
  const uint64_t work = launch.total * threads.x * threads.y * threads.z;
  // ThreadSanitizer finds races from the order of events, not from their timing, so one thread is
  // enough. It slows down with every further thread.
  const int all = tsan::active() ? 1 : static_cast<int>(std::thread::hardware_concurrency());
  const uint64_t most =
      static_cast<uint64_t>(std::max(1, blocks_at_once > 0 ? blocks_at_once : all));
  const uint64_t at_once = std::min({most, launch.total, 1 + work / kThreadsPerHelper});
  if (at_once > 1) {
    static thread_local Helpers helpers;
    helpers.run(launch, static_cast<int>(at_once - 1));
  } else {
    launch.run_blocks();
  }
  if (launch.error) std::rethrow_exception(launch.error);
}

}  // namespace rosa::simt
