// The state of a running block, which the emulator's parts share. Kernels include only emulator.h.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "simt/emulator.h"
#include "simt/fiber.h"

namespace rosa::simt {

class Block;

// splitmix64. It gives the same schedules on every platform.
class Random {
 public:
  explicit Random(uint64_t seed = 0) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  uint32_t below(uint32_t bound) { return static_cast<uint32_t>((bits() >> 32) * bound >> 32); }

 private:
  uint64_t state_;
};

enum class State : uint8_t {
  kRunnable,  // running, or ready to run
  kAtWarpCollective,
  kAtBarrier,       // __syncthreads
  kAtNamedBarrier,  // bar.sync
  kAtMbarrier,
  kExited,
};

// Completes a warp collective once all its lanes have come. Each lane's `exchange` points to its
// arguments and results.
using Complete = void (*)(void* const (&exchange)[32], uint32_t mask);

struct CopyAsync {
  void* shared;
  const void* global;
  int bytes;
};

struct Thread : ThreadIndex {
  Block* owner = nullptr;
  int lane = 0, warp = 0;
  State state = State::kRunnable;
  Fiber* fiber = nullptr;  // from its first instruction to its last

  // What the thread waits for.
  Where where{};
  const char* operation = "";
  uint32_t mask = 0;
  void* exchange = nullptr;
  int named_barrier = 0;
  const uint64_t* mbarrier = nullptr;

  // cp.async: the issued copies that have not landed, and the number of copies in each group.
  std::vector<CopyAsync> copies;
  std::vector<int> copy_groups;  // committed ones, oldest first
  int uncommitted_copies = 0;
  bool waited_for_kernel_ahead = false;
};

// One warp's share of a wgmma: 16 rows.
struct Wgmma {
  int accumulator;  // index into Warp::accumulators
  int rank;         // of the warp in its warpgroup
  int columns;
  uint64_t a, b;  // descriptors
  bool accumulate, bf16;
  int64_t group;
  bool executed;
};
// Registers that wgmmas under way write to. The kernel's own copy is NaN until the wait.
struct Accumulator {
  float* registers[32];       // per lane
  int count;                  // per lane
  int64_t last_group;         // of the last wgmma on it
  std::vector<float> values;  // [lane][count]
  Where where;
};

// How often lanes came to a collective with this mask.
struct MaskArrivals {
  uint32_t mask, count;
};

struct Warp {
  uint32_t exists = 0, runnable = 0, exited = 0;
  uint32_t waiting = 0;                // at a warp collective
  std::vector<MaskArrivals> arrivals;  // for ThreadSanitizer

  std::vector<Wgmma> wgmmas;  // issued, not waited for, oldest first
  std::vector<Accumulator> accumulators;
  int pending_wgmmas = 0;   // not executed
  int64_t wgmma_group = 0;  // being filled
  int64_t wgmma_count = 0;  // issued in all
  bool wgmma_fenced = false;
  // How soon wgmmas are executed: 4 is at once, 2 is at once in half of the cases, 0 only by the
  // wait. They are executed in order, so without the value 0 few of them would ever be late.
  uint32_t wgmma_eagerness = 0;
};

struct NamedBarrier {
  int expected = 0, arrived = 0;
  int phase = 0;
};

struct UnfencedBarrier {
  const uint64_t* address;
  int thread;
};

struct CopyBulk {
  void* shared;
  const void* global;
  int bytes;
  uint64_t* barrier;
  Where where;
  int thread;
  unsigned number;
};

// Shared memory of a block: the dynamic part, and every static declaration that the block has met.
// Each has an allocation of exactly its size, so that AddressSanitizer reports accesses beyond it.
class SharedMemory {
 public:
  SharedMemory() = default;
  ~SharedMemory() { release(); }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // `limit` bounds static and dynamic shared memory together.
  void begin_block(int64_t dynamic_bytes, int64_t limit);
  int64_t limit() const { return limit_; }
  // Whether all guards are intact.
  bool intact() const;
  void release();

  unsigned char* dynamic() const { return dynamic_.data; }
  // The memory of a declaration, or null if it does not fit.
  void* declared(const void* declaration, int64_t bytes);
  // Whether [pointer, pointer + bytes) is shared memory. `address` gets its place in the window.
  bool find(const void* pointer, int64_t bytes, uint32_t* address) const;
  // The inverse of find.
  unsigned char* at(uint32_t address, int64_t bytes) const;

 private:
  struct Region {
    const void* declaration = nullptr;
    unsigned char* data = nullptr;
    int64_t bytes = -1;
    uint32_t address = 0;  // in the window
    bool used = false;     // in this block
    void allocate(int64_t alignment);
    void poison();
  };
  Region dynamic_;
  std::vector<Region> static_;
  // Under ThreadSanitizer, all static shared memory. It is allocated before any thread runs,
  // because ThreadSanitizer takes an allocation for a write by the allocating thread.
  Region arena_;
  int64_t static_bytes_ = 0, limit_ = 0;
};

// Addresses for ThreadSanitizer's happens-before relation, new for every block. Each barrier has
// two, which are used in turns: a thread that leaves a barrier must not be ordered after threads
// that have arrived at the next one.
struct SyncPoints {
  uint64_t block_begin, block_end;
  uint64_t barrier[2];
  uint64_t named[16][2];
  uint64_t warp[32][16][2];  // by mask
  uint64_t mbarrier[1024][2];
  uint64_t bulk_copy[64];
};

// The same addresses for a launch.
struct LaunchSync {
  uint64_t end, fence;
};

// The fibers of one operating-system thread.
class FiberPool {
 public:
  // For ThreadSanitizer, fibers are threads with stacks of their own, and making one takes 0.7 ms.
  // So only two blocks have fibers of their own, and the third block uses those of the first one
  // again. ThreadSanitizer then sees all races between blocks, with one exception: races of threads
  // of the same index, an even number of blocks apart.
  void set_up(Fiber::Main main, int threads);
  void begin_block();
  Fiber* take(Fiber::Main main, int thread);
  void give(Fiber* fiber);

 private:
  std::vector<std::unique_ptr<Fiber>> all_;
  std::vector<Fiber*> idle_;
  int threads_ = 0, turn_ = 0;
};

// The block that an operating-system thread runs. The object is used again for the next block.
class Block : public BlockIndex {
 public:
  Block() = default;
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // Set by the launch.
  KernelCall call{};
  uint64_t seed = 0;
  LaunchSync* launch_sync = nullptr;

  // Runs all threads of block `index`. Throws the first error.
  void run(uint64_t linear_index, int64_t shared_bytes, int64_t shared_limit);

  // ---- called by the running thread
  // Gives way to other threads until woken.
  void wait(State state, const char* operation, Where where);
  void wake(Thread& thread);
  void yield(bool always);
  [[noreturn]] void fail(Where where, const std::string& what);

  Error error_at(const Thread& thread, Where where, const std::string& what) const;
  // Makes the block fail, for code that may not throw.
  void record(const Error& failure);
  // Ends the running thread if the block has failed.
  void check_recorded() const;

  int total = 0, exited = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Thread* current = nullptr;
  SharedMemory shared;
  SyncPoints* sync = nullptr;  // only under ThreadSanitizer
  Random random;
  bool in_order = true;

  int at_barrier = 0, barrier_count = 0, barrier_result = 0, barrier_first = 0;
  int barrier_phase = 0;
  int at_mbarrier = 0;
  unsigned bulk_copies_issued = 0;
  void* copier = nullptr;  // for ThreadSanitizer
  NamedBarrier named[16];
  std::vector<CopyBulk> bulk_copies;  // under way
  // Barriers whose initialising thread has not fenced since. Bulk copies do not see them.
  std::vector<UnfencedBarrier> unfenced_barriers;
  int wgmmas = 0;  // issued by any warp, not executed

 private:
  // kStay: a warp runs as long as it can, as it does in order.
  enum class Policy { kStay, kUniform, kPriority };

  static void run_threads(Fiber& fiber);
  void set_up();
  void reset(uint64_t linear_index);
  void check_exit(Thread& thread);
  void exit_thread(Thread& thread);
  void go_to(Thread& next, Context& from);
  Thread* pick();
  Thread* pick_runnable();
  Thread* pick_any();
  Thread* pick_to_unwind();
  void redraw_policy();
  void advance_asynchronous(bool forced);
  Error deadlock() const;

  dim3 set_up_for_{0, 0, 0};
  uint32_t runnable_warps_ = 0;
  Context main_;
  // For ThreadSanitizer: the thread that runs the block, and the one that frees its memory.
  void* main_identity_ = nullptr;
  void* janitor_ = nullptr;
  FiberPool fibers_;
  std::exception_ptr error_;  // once it is set, every thread unwinds

  Policy policy_ = Policy::kStay;
  uint32_t picks_left_ = 0;  // left under this policy
  uint8_t priority_[32] = {};
  uint32_t asynchronous_odds_ = 8;  // one in so many picks advances a copy or wgmma
  int64_t idle_yields_ = 0;
};

inline Thread& self() { return *static_cast<Thread*>(running); }
inline Block& here() { return *self().owner; }

// A collective of all lanes of `mask`. The last lane to come runs `complete` for all of them.
void warp_collective(const char* operation, uint32_t mask, void* exchange, Complete complete,
                     Where where);
// The same, with memory ordered: what the lanes did before happens before what they do afterwards.
// Shuffles and votes do not promise that.
void ordering_collective(const char* operation, uint32_t mask, void* exchange, Complete complete,
                         Where where);
constexpr uint32_t kAllLanes = 0xffffffffu;

std::string describe(const uint3& index);
std::string describe(Where where);

// ---- asynchronous work, in copies.cpp and tensor_core.cpp -----------------------------------

void land_bulk_copy(Block& block, size_t index);
void land_copies(Thread& thread);  // the copies that the thread did not wait for
// Executes the oldest wgmma of some warp. Unless `forced`, it does nothing if that warp's eagerness
// is 0.
void advance_wgmma(Block& block, bool forced);
// Why `warp` may not end here, or "".
std::string unfinished_wgmma(const Warp& warp);
// Why the block may not end, or "": the warps of a warpgroup must issue the same number of wgmmas.
std::string uneven_wgmma(const Block& block);

}  // namespace rosa::simt
