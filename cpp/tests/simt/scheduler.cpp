// The schedule: which thread runs next, and what happens when a thread waits or exits.
#include <utility>

#include "simt/state.h"

namespace rosa::simt {
namespace {

// Thrown through threads of a block that has failed, so that their stacks unwind.
struct Unwind {};

// The first set bit at or after a random one, cyclically.
int random_bit(uint32_t bits, Random& random) {
  const uint32_t start = random.below(32);
  const uint32_t turned = start == 0 ? bits : bits >> start | bits << (32 - start);
  return static_cast<int>((static_cast<uint32_t>(__builtin_ctz(turned)) + start) % 32);
}

// The first set bit after bit `last`, cyclically.
int next_bit(uint32_t bits, int last) {
  const uint32_t after = last >= 31 ? 0 : bits & (kAllLanes << (last + 1));
  return __builtin_ctz(after != 0 ? after : bits);
}

}  // namespace

void FiberPool::set_up(Fiber::Main main, int threads) {
  threads_ = threads;
  if (!tsan::active()) return;
  while (static_cast<int>(all_.size()) < 2 * threads) {
    all_.push_back(std::make_unique<Fiber>(main, static_cast<int>(all_.size())));
  }
}

void FiberPool::begin_block() { turn_ ^= 1; }

Fiber* FiberPool::take(Fiber::Main main, int thread) {
  if (tsan::active()) return all_[static_cast<size_t>(turn_ * threads_ + thread)].get();
  if (idle_.empty()) {
    all_.push_back(std::make_unique<Fiber>(main, static_cast<int>(all_.size())));
    return all_.back().get();
  }
  Fiber* fiber = idle_.back();
  idle_.pop_back();
  return fiber;
}

void FiberPool::give(Fiber* fiber) {
  if (!tsan::active()) idle_.push_back(fiber);
}

std::string describe(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}
std::string describe(Where where) {
  return std::string(where.file) + ":" + std::to_string(where.line);
}

Error Block::error_at(const Thread& thread, Where where, const std::string& what) const {
  return Error(describe(where) + ": block " + describe(index) + ", thread " +
               describe(thread.index) + ": " + what);
}

void Block::fail(Where where, const std::string& what) { throw error_at(*current, where, what); }

void Block::record(const Error& failure) {
  if (!error_) error_ = std::make_exception_ptr(failure);
  tsan::release(&launch_sync->end);  // the thread that ran last may have exited already
}

void Block::check_recorded() const {
  if (error_) throw Unwind{};
}

// ---- running a block ------------------------------------------------------------------------

Block::~Block() {
  if (janitor_ != nullptr) tsan::destroy(janitor_);
  if (copier != nullptr) tsan::destroy(copier);
}

// Sets up what is the same for every block of these dimensions.
void Block::set_up() {
  total = static_cast<int>(dim.x * dim.y * dim.z);
  threads.resize(static_cast<size_t>(total));
  warps.resize(static_cast<size_t>((total + 31) / 32));
  for (Warp& warp : warps) warp.exists = 0;
  for (int i = 0; i < total; ++i) {
    const unsigned linear = static_cast<unsigned>(i);
    Thread& thread = threads[linear];
    thread.index = {linear % dim.x, linear / dim.x % dim.y, linear / (dim.x * dim.y)};
    thread.linear = i;
    thread.block = this;
    thread.owner = this;
    thread.lane = i % 32;
    thread.warp = i / 32;
    warps[linear / 32].exists |= 1u << (linear % 32);
  }
  fibers_.set_up(&Block::run_threads, total);
  set_up_for_ = dim;
}

// Removes what the previous block left behind.
void Block::reset(uint64_t linear_index) {
  const tsan::Quiet quiet;
  if (set_up_for_.x != dim.x || set_up_for_.y != dim.y || set_up_for_.z != dim.z) set_up();
  in_order = seed == 0;
  random = Random(seed * 0x9E3779B97F4A7C15u + linear_index);
  for (Thread& thread : threads) {
    thread.state = State::kRunnable;
    thread.copies.clear();
    thread.copy_groups.clear();
    thread.uncommitted_copies = 0;
    thread.waited_for_kernel_ahead = false;
  }
  for (Warp& warp : warps) {
    warp.runnable = warp.exists;
    warp.exited = warp.waiting = 0;
    warp.arrivals.clear();
    warp.wgmmas.clear();
    warp.accumulators.clear();
    warp.wgmma_group = warp.wgmma_count = 0;
    warp.pending_wgmmas = 0;
    warp.wgmma_fenced = false;
    warp.wgmma_eagerness = 2 * random.below(3);
  }
  runnable_warps_ = warps.size() == 32 ? kAllLanes : (1u << warps.size()) - 1;
  exited = at_barrier = barrier_count = barrier_phase = at_mbarrier = wgmmas = 0;
  for (NamedBarrier& barrier : named) barrier = {};
  bulk_copies.clear();
  unfenced_barriers.clear();
  bulk_copies_issued = 0;
  fibers_.begin_block();
  picks_left_ = 0;
  idle_yields_ = 0;
  current = &threads[0];
}

void Block::run(uint64_t linear_index, int64_t shared_bytes, int64_t shared_limit) {
  reset(linear_index);
  shared.begin_block(shared_bytes, shared_limit);

  // For ThreadSanitizer, what this thread did before the launch happens before every emulated
  // thread. What it does after the launch happens after all of them. Different blocks are not
  // ordered.
  if (tsan::active()) {
    main_identity_ = tsan::current();
    if (janitor_ == nullptr) janitor_ = tsan::create();
    if (copier == nullptr) copier = tsan::create();
    sync = new SyncPoints{};
    tsan::release(&sync->block_begin);
  }

  go_to(in_order ? threads[0] : *pick(), main_);
  running = nullptr;
  if (!error_ && !shared.intact()) {
    record(Error("block " + describe(index) + ": wrote past the end of its shared memory"));
  }
  const std::string uneven = uneven_wgmma(*this);
  if (!uneven.empty()) record(Error("block " + describe(index) + ": " + uneven));

  if (tsan::active()) {
    tsan::switch_to(janitor_);
    tsan::acquire(&sync->block_end);
    shared.release();
    delete sync;
    tsan::switch_to(main_identity_);
  }
  if (error_) {
    const std::exception_ptr failure = std::exchange(error_, nullptr);
    std::rethrow_exception(failure);
  }
}

// Runs threads one after another, each to its end, as long as the schedule picks threads that have
// not begun. So a kernel without collectives needs no switches.
void Block::run_threads(Fiber& fiber) {
  for (;;) {
    Thread* thread = static_cast<Thread*>(fiber.thread);
    Block& block = *thread->owner;
    if (block.sync != nullptr) tsan::acquire(&block.sync->block_begin);
    try {
      block.call.run(block.call.kernel);
      block.check_exit(*thread);
    } catch (const Unwind&) {
    } catch (...) {
      if (!block.error_) block.error_ = std::current_exception();
    }
    block.exit_thread(*thread);
    Thread* next = block.pick();
    if (next != nullptr && next->fiber == nullptr && !tsan::active()) {
      fiber.thread = next;
      next->fiber = &fiber;
      block.current = next;
      running = next;
      continue;
    }
    block.fibers_.give(&fiber);
    if (next != nullptr) {
      block.go_to(*next, fiber);
    } else {
      tsan::switch_to(block.main_identity_);
      switch_context(fiber, block.main_);
    }
  }
}

void Block::go_to(Thread& next, Context& from) {
  current = &next;
  running = &next;
  if (next.fiber == nullptr) {
    next.fiber = fibers_.take(&Block::run_threads, next.linear);
    next.fiber->thread = &next;
  }
  tsan::switch_to(next.fiber->identity);
  switch_context(from, *next.fiber);
}

void Block::check_exit(Thread& thread) {
  const Warp& warp = warps[static_cast<size_t>(thread.warp)];
  for (uint32_t lanes = warp.waiting; lanes != 0; lanes &= lanes - 1) {
    const Thread& waiting = threads[static_cast<size_t>(thread.warp * 32 + __builtin_ctz(lanes))];
    if (waiting.mask >> thread.lane & 1) {
      throw error_at(waiting, waiting.where,
                     std::string(waiting.operation) + " waits for lane " +
                         std::to_string(thread.lane) + ", which has exited");
    }
  }
  if (at_barrier > 0) {
    const Thread& waiting = threads[static_cast<size_t>(barrier_first)];
    throw error_at(
        waiting, waiting.where,
        "__syncthreads waits for thread " + describe(thread.index) + ", which has exited");
  }
  if (call.early && !thread.waited_for_kernel_ahead) {
    throw error_at(thread, {"kernel", 0},
                   "exits without wait_for_kernel_ahead, in a kernel that may begin early");
  }
  const std::string unfinished = unfinished_wgmma(warp);
  if (!unfinished.empty()) throw error_at(thread, warp.accumulators[0].where, unfinished);
  land_copies(thread);
}

void Block::exit_thread(Thread& thread) {
  Warp& warp = warps[static_cast<size_t>(thread.warp)];
  const uint32_t lane = 1u << thread.lane;
  thread.state = State::kExited;
  thread.fiber = nullptr;
  warp.exited |= lane;
  warp.waiting &= ~lane;
  warp.runnable &= ~lane;
  if (warp.runnable == 0) runnable_warps_ &= ~(1u << thread.warp);
  ++exited;
  idle_yields_ = 0;
  if (sync != nullptr) tsan::release(&sync->block_end);
  tsan::release(&launch_sync->end);
}

// ---- waiting --------------------------------------------------------------------------------

void Block::wait(State state, const char* operation, Where where) {
  Thread& thread = *current;
  Warp& warp = warps[static_cast<size_t>(thread.warp)];
  thread.state = state;
  thread.operation = operation;
  thread.where = where;
  warp.runnable &= ~(1u << thread.lane);
  if (warp.runnable == 0) runnable_warps_ &= ~(1u << thread.warp);
  Thread* next = pick();
  if (next != &thread) go_to(*next, *thread.fiber);
  if (error_) throw Unwind{};
}

void Block::wake(Thread& thread) {
  thread.state = State::kRunnable;
  warps[static_cast<size_t>(thread.warp)].runnable |= 1u << thread.lane;
  runnable_warps_ |= 1u << thread.warp;
  idle_yields_ = 0;
}

void Block::yield(bool always) {
  // A thread may sleep for long until others act, but not for ever.
  constexpr int64_t kMostIdleYields = 10'000'000;
  if (!always && (in_order || random.below(4) != 0)) return;
  Thread& thread = *current;
  if (always && ++idle_yields_ > kMostIdleYields) {
    fail({"__nanosleep", 0}, "sleeps, but no other thread makes progress");
  }
  Warp& warp = warps[static_cast<size_t>(thread.warp)];
  warp.runnable &= ~(1u << thread.lane);
  if (warp.runnable == 0) runnable_warps_ &= ~(1u << thread.warp);
  if (runnable_warps_ == 0 && (!bulk_copies.empty() || wgmmas > 0)) advance_asynchronous(true);
  Thread* next = &thread;
  if (runnable_warps_ != 0 && !error_) next = always ? pick_any() : pick_runnable();
  warp.runnable |= 1u << thread.lane;
  runnable_warps_ |= 1u << thread.warp;
  if (next != &thread) go_to(*next, *thread.fiber);
  if (error_) throw Unwind{};
}

// ---- the schedule ---------------------------------------------------------------------------

Thread* Block::pick() {
  if (!in_order && !error_ && (!bulk_copies.empty() || wgmmas > 0) &&
      random.below(asynchronous_odds_) == 0) {
    advance_asynchronous(false);
  }
  while (!error_ && runnable_warps_ == 0) {
    if (exited == total) {
      if (bulk_copies.empty()) return nullptr;
      const CopyBulk& copy = bulk_copies[0];
      record(error_at(threads[static_cast<size_t>(copy.thread)], copy.where,
                      "the block ended with this bulk copy under way"));
    } else if (!bulk_copies.empty() || wgmmas > 0) {
      advance_asynchronous(true);
    } else {
      record(deadlock());
    }
  }
  return error_ ? pick_to_unwind() : pick_runnable();
}

Thread* Block::pick_runnable() {
  if (!in_order && picks_left_-- == 0) redraw_policy();
  int warp = current->warp, lane = current->lane;
  if (in_order || policy_ == Policy::kStay) {
    if (warps[static_cast<size_t>(warp)].runnable == 0) warp = next_bit(runnable_warps_, warp);
  } else if (policy_ == Policy::kUniform) {
    warp = random_bit(runnable_warps_, random);
  } else {
    int rank = 0;
    while ((runnable_warps_ >> priority_[rank] & 1) == 0) ++rank;
    warp = priority_[rank];
  }
  const uint32_t lanes = warps[static_cast<size_t>(warp)].runnable;
  lane = in_order ? next_bit(lanes, warp == current->warp ? lane : 31) : random_bit(lanes, random);
  return &threads[static_cast<size_t>(warp * 32 + lane)];
}

// Picks any thread after one that sleeps. In order, a few sleeping threads could keep all others
// from running.
Thread* Block::pick_any() {
  const int warp = random_bit(runnable_warps_, random);
  const int lane = random_bit(warps[static_cast<size_t>(warp)].runnable, random);
  return &threads[static_cast<size_t>(warp * 32 + lane)];
}

// Warps that take turns never drift further apart than one collective, which hides most missing
// barriers. Fixed priorities let one warp run ahead as far as it can. They change at random
// moments.
void Block::redraw_policy() {
  policy_ = static_cast<Policy>(random.below(8) / 3);  // 3 : 3 : 2
  picks_left_ = 1 + random.below(1u << random.below(13));
  asynchronous_odds_ = 2u << (3 * random.below(4));
  const uint32_t count = static_cast<uint32_t>(warps.size());
  for (uint32_t i = 0; i < count; ++i) priority_[i] = static_cast<uint8_t>(i);
  for (uint32_t i = count; i > 1; --i) std::swap(priority_[i - 1], priority_[random.below(i)]);
}

Thread* Block::pick_to_unwind() {
  for (Thread& thread : threads) {
    if (thread.fiber != nullptr) return &thread;
  }
  return nullptr;
}

void Block::advance_asynchronous(bool forced) {
  const uint32_t copies = static_cast<uint32_t>(bulk_copies.size());
  const uint32_t which = random.below(copies + static_cast<uint32_t>(wgmmas));
  if (which < copies) {
    land_bulk_copy(*this, which);
  } else {
    advance_wgmma(*this, forced);
  }
}

Error Block::deadlock() const {
  constexpr int kMostNamed = 4;
  std::string what = "deadlock: " + std::to_string(exited) + " of " + std::to_string(total) +
                     " threads have exited, the others wait for one another:";
  const Thread* first = nullptr;
  int named_so_far = 0;
  for (const Thread& thread : threads) {
    if (thread.state == State::kExited) continue;
    if (first == nullptr) first = &thread;
    // Name one thread for every place.
    bool known = false;
    for (const Thread* other = first; other != &thread; ++other) {
      known = known || (other->state != State::kExited && other->operation == thread.operation &&
                        other->where.line == thread.where.line && other->mask == thread.mask);
    }
    if (known || named_so_far++ == kMostNamed) continue;
    what += " thread " + describe(thread.index) + " at " + thread.operation + " of " +
            describe(thread.where) + ";";
  }
  what.back() = '.';
  return error_at(*first, first->where, what);
}

}  // namespace rosa::simt
