// Asynchronous copies, and the barriers in shared memory that await them.
//
// A copy lands at a random moment between its issue and the wait that covers it. If it lands early,
// a stage that is refilled too soon spoils what others still read. If it lands late, a missing wait
// reads the old contents.
#include <algorithm>
#include <cstring>

#include "simt/state.h"

namespace rosa::simt {
namespace {

bool aligned(const void* pointer, uintptr_t to) {
  return reinterpret_cast<uintptr_t>(pointer) % to == 0;
}

void expect_shared(const void* pointer, int64_t bytes, const char* what, Where where) {
  uint32_t address = 0;
  if (!here().shared.find(pointer, bytes, &address)) {
    here().fail(where, std::string(what) + " outside shared memory");
  }
}

void land(const CopyAsync& copy) {
  tsan::read(copy.global, static_cast<size_t>(copy.bytes));
  tsan::write(copy.shared, 16);
  const tsan::Quiet quiet;
  if (copy.bytes > 0) {
    std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.bytes));
  }
  std::memset(static_cast<char*>(copy.shared) + copy.bytes, 0,
              static_cast<size_t>(16 - copy.bytes));
}

}  // namespace

// ---- cp.async -------------------------------------------------------------------------------

void copy_async(void* shared, const void* global, int bytes, Where where) {
  Thread& thread = self();
  Block& block = *thread.owner;
  if (bytes < 0 || bytes > 16) {
    block.fail(where, "cp.async of " + std::to_string(bytes) + " bytes");
  }
  if (!aligned(shared, 16) || (bytes > 0 && !aligned(global, 16))) {
    block.fail(where, "cp.async between addresses that are not 16-byte aligned");
  }
  expect_shared(shared, 16, "cp.async", where);
  const CopyAsync copy{shared, global, bytes};
  if (block.random.bits() & 1) {
    land(copy);
  } else {
    tsan::write(shared, 16);
    const tsan::Quiet quiet;
    thread.copies.push_back(copy);
    ++thread.uncommitted_copies;
  }
}

void copy_async_commit() {
  const tsan::Quiet quiet;
  Thread& thread = self();
  thread.copy_groups.push_back(thread.uncommitted_copies);
  thread.uncommitted_copies = 0;
}

void copy_async_wait(int groups) {
  Thread& thread = self();
  const int done = static_cast<int>(thread.copy_groups.size()) - groups;
  if (done <= 0) return;
  int landing = 0;
  for (int i = 0; i < done; ++i) landing += thread.copy_groups[static_cast<size_t>(i)];
  for (int i = 0; i < landing; ++i) land(thread.copies[static_cast<size_t>(i)]);
  const tsan::Quiet quiet;
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + landing);
  thread.copy_groups.erase(thread.copy_groups.begin(), thread.copy_groups.begin() + done);
}

void land_copies(Thread& thread) {
  for (const CopyAsync& copy : thread.copies) land(copy);
  thread.copies.clear();
}

// ---- mbarrier -------------------------------------------------------------------------------

namespace {

constexpr uint64_t kTag = 0xB4A;
constexpr int kMostArrivals = (1 << 14) - 1, kMostBytes = (1 << 20) - 1;

// What the emulator keeps in a barrier's eight bytes.
struct Barrier {
  uint64_t tag : 12;
  uint64_t phase : 1;
  uint64_t arrivals : 14;  // expected in each phase
  uint64_t missing : 14;   // not yet made in this phase
  int64_t bytes : 23;      // announced minus landed
};
static_assert(sizeof(Barrier) == 8, "a barrier has eight bytes");

Barrier load(const uint64_t* address) {
  Barrier barrier;
  std::memcpy(&barrier, address, sizeof(barrier));
  return barrier;
}

bool initialised(const Barrier& barrier) { return barrier.tag == kTag; }

Barrier load_checked(const uint64_t* address, Where where) {
  expect_shared(address, 8, "mbarrier", where);
  const Barrier barrier = load(address);
  if (!initialised(barrier)) {
    here().fail(where, "the mbarrier was never initialised, or was overwritten");
  }
  return barrier;
}

void* sync_point(const Block& block, const uint64_t* address, unsigned phase) {
  return &block.sync->mbarrier[reinterpret_cast<uintptr_t>(address) / 8 % 1024][phase & 1];
}

// Stores the barrier, and ends its phase if nothing is missing.
void store(Block& block, uint64_t* address, Barrier barrier) {
  const bool ends = barrier.missing == 0 && barrier.bytes == 0;
  if (ends) {
    barrier.phase ^= 1;
    barrier.missing = barrier.arrivals;
  }
  std::memcpy(address, &barrier, sizeof(barrier));
  if (!ends || block.at_mbarrier == 0) return;
  for (Thread& thread : block.threads) {
    if (thread.state == State::kAtMbarrier && thread.mbarrier == address) block.wake(thread);
  }
}

}  // namespace

void mbarrier_init(uint64_t* address, int arrivals, Where where) {
  expect_shared(address, 8, "mbarrier_init", where);
  if (!aligned(address, 8)) here().fail(where, "the mbarrier is not 8-byte aligned");
  if (arrivals < 1 || arrivals > kMostArrivals) {
    here().fail(where, "mbarrier_init for " + std::to_string(arrivals) + " arrivals");
  }
  Barrier barrier{};
  barrier.tag = kTag;
  barrier.arrivals = barrier.missing = static_cast<uint64_t>(arrivals) & kMostArrivals;
  tsan::write(address, 8);
  std::memcpy(address, &barrier, sizeof(barrier));
  const tsan::Quiet quiet;
  here().unfenced_barriers.push_back({address, self().linear});
}

void fence_proxy_async() {
  const tsan::Quiet quiet;
  std::vector<UnfencedBarrier>& all = here().unfenced_barriers;
  const int thread = self().linear;
  all.erase(std::remove_if(all.begin(), all.end(),
                           [=](const UnfencedBarrier& one) { return one.thread == thread; }),
            all.end());
}

void mbarrier_arrive(uint64_t* address, int bytes, Where where) {
  Block& block = here();
  Barrier barrier = load_checked(address, where);
  if (bytes < 0 || barrier.bytes + bytes > kMostBytes) {
    block.fail(where,
               "mbarrier with " + std::to_string(barrier.bytes + bytes) + " announced bytes");
  }
  if (barrier.missing == 0) {
    block.fail(where, "more arrivals in a phase than the mbarrier was initialised for");
  }
  if (block.sync != nullptr) tsan::release(sync_point(block, address, barrier.phase));
  barrier.bytes += bytes;
  --barrier.missing;
  store(block, address, barrier);
  block.yield(false);
}

void mbarrier_wait(uint64_t* address, uint32_t parity, Where where) {
  Thread& thread = self();
  Block& block = *thread.owner;
  if (parity > 1) block.fail(where, "mbarrier_wait with parity " + std::to_string(parity));
  block.yield(false);
  // A woken thread checks again. The next phase may have ended too, as on a GPU.
  while (load_checked(address, where).phase == parity) {
    thread.mbarrier = address;
    ++block.at_mbarrier;
    block.wait(State::kAtMbarrier, "mbarrier_wait", where);
    --block.at_mbarrier;
  }
  if (block.sync != nullptr) tsan::acquire(sync_point(block, address, parity));
}

// ---- bulk copies ----------------------------------------------------------------------------

void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier, Where where) {
  Thread& thread = self();
  Block& block = *thread.owner;
  if (bytes < 0 || bytes % 16 != 0) {
    block.fail(where, "bulk copy of " + std::to_string(bytes) + " bytes, not a multiple of 16");
  }
  if (!aligned(shared, 16) || !aligned(global, 16)) {
    block.fail(where, "bulk copy between addresses that are not 16-byte aligned");
  }
  expect_shared(shared, bytes, "bulk copy", where);
  load_checked(barrier, where);
  for (const UnfencedBarrier& one : block.unfenced_barriers) {
    if (one.address == barrier) {
      block.fail(where,
                 "the bulk copy may not see its mbarrier: no fence_proxy_async by the thread "
                 "that initialised it");
    }
  }
  const unsigned number = block.bulk_copies_issued++;
  if (block.sync != nullptr) tsan::release(&block.sync->bulk_copy[number % 64]);
  {
    const tsan::Quiet quiet;
    block.bulk_copies.push_back({shared, global, bytes, barrier, where, thread.linear, number});
  }
  if (block.random.bits() & 1) {
    land_bulk_copy(block, block.bulk_copies.size() - 1);
    block.check_recorded();
  }
}

void land_bulk_copy(Block& block, size_t index) {
  const CopyBulk copy = block.bulk_copies[index];
  {
    const tsan::Quiet quiet;
    block.bulk_copies.erase(block.bulk_copies.begin() + static_cast<std::ptrdiff_t>(index));
  }
  Barrier barrier = load(copy.barrier);
  if (block.sync != nullptr) {
    void* const running_identity = tsan::current();
    tsan::switch_to(block.copier);
    tsan::acquire(&block.sync->bulk_copy[copy.number % 64]);
    tsan::read(copy.global, static_cast<size_t>(copy.bytes));
    tsan::write(copy.shared, static_cast<size_t>(copy.bytes));
    tsan::release(sync_point(block, copy.barrier, barrier.phase));
    tsan::release(&block.sync->block_end);
    tsan::release(&block.launch_sync->end);
    tsan::switch_to(running_identity);
  }
  {
    const tsan::Quiet quiet;
    std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.bytes));
  }
  const Thread& thread = block.threads[static_cast<size_t>(copy.thread)];
  if (!initialised(barrier)) {
    block.record(block.error_at(thread, copy.where, "the bulk copy's mbarrier was overwritten"));
    return;
  }
  if (barrier.bytes - copy.bytes < -kMostBytes) {
    block.record(
        block.error_at(thread, copy.where, "bulk copies landed more bytes than were announced"));
    return;
  }
  barrier.bytes -= copy.bytes;
  store(block, copy.barrier, barrier);
}

}  // namespace rosa::simt
