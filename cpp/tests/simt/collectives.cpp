// Barriers, and collective operations of a warp.
#include <cstring>

#include "simt/ptx.h"
#include "simt/state.h"

namespace rosa::simt {
namespace {

// The argument and the result of one lane in a collective.
struct Lane {
  uint64_t value;
  int source;  // of a shuffle: the lane in the warp, or -1 for its own value
  uint64_t result;
};

Lane& lane_of(void* const (&exchange)[32], int lane) { return *static_cast<Lane*>(exchange[lane]); }

template <class Function>
void for_each_lane(uint32_t mask, Function function) {
  for (; mask != 0; mask &= mask - 1) function(__builtin_ctz(mask));
}

void nothing(void* const (&)[32], uint32_t) {}

bool same(Where a, Where b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

bool has_all(const Block& block, const Thread& thread) {
  const Warp& warp = block.warps[static_cast<size_t>(thread.warp)];
  if ((warp.waiting & thread.mask) != thread.mask) return false;
  bool all = true;
  for_each_lane(thread.mask, [&](int lane) {
    const Thread& other = block.threads[static_cast<size_t>(thread.warp * 32 + lane)];
    all = all && other.mask == thread.mask && other.operation == thread.operation &&
          same(other.where, thread.where);
  });
  return all;
}

}  // namespace

void warp_collective(const char* operation, uint32_t mask, void* exchange, Complete complete,
                     Where where) {
  Thread& thread = self();
  Block& block = *thread.owner;
  Warp& warp = block.warps[static_cast<size_t>(thread.warp)];
  const uint32_t own = 1u << thread.lane;
  const auto refuse = [&](uint32_t lanes, const char* why) {
    block.fail(where, std::string(operation) + " names lane " +
                          std::to_string(__builtin_ctz(lanes)) + " in its mask, " + why);
  };
  if ((mask & own) == 0) {
    block.fail(where, std::string(operation) + " by lane " + std::to_string(thread.lane) +
                          ", which its mask does not name");
  }
  if ((mask & ~warp.exists) != 0) refuse(mask & ~warp.exists, "which the block does not have");
  if ((mask & warp.exited) != 0) refuse(mask & warp.exited, "which has exited");
  thread.operation = operation;
  thread.where = where;
  thread.mask = mask;
  thread.exchange = exchange;
  warp.waiting |= own;
  if (!has_all(block, thread)) {
    block.wait(State::kAtWarpCollective, operation, where);
    return;
  }
  void* exchanges[32];
  Thread* const first = &block.threads[static_cast<size_t>(thread.warp * 32)];
  for_each_lane(mask, [&](int lane) { exchanges[lane] = first[lane].exchange; });
  complete(exchanges, mask);
  warp.waiting &= ~mask;
  for_each_lane(mask & ~own, [&](int lane) { block.wake(first[lane]); });
  block.yield(false);
}

namespace {

// The address by which ThreadSanitizer orders the next arrival. It is the same for all lanes of
// `mask`, and differs from the address of the previous collective. No lane can reach the next
// collective before all lanes have reached this one, so counting arrivals tells the two apart.
void* sync_point(Block& block, int warp_index, uint32_t mask) {
  if (block.sync == nullptr) return nullptr;
  const tsan::Quiet quiet;
  std::vector<MaskArrivals>& known = block.warps[static_cast<size_t>(warp_index)].arrivals;
  size_t i = 0;
  while (i < known.size() && known[i].mask != mask) ++i;
  if (i == known.size()) known.push_back({mask, 0});
  const uint32_t turn = known[i].count++ / static_cast<uint32_t>(__builtin_popcount(mask));
  return &block.sync->warp[warp_index][i % 16][turn % 2];
}

}  // namespace

void ordering_collective(const char* operation, uint32_t mask, void* exchange, Complete complete,
                         Where where) {
  Thread& thread = self();
  void* const point = mask != 0 ? sync_point(*thread.owner, thread.warp, mask) : nullptr;
  if (point != nullptr) tsan::release(point);
  warp_collective(operation, mask, exchange, complete, where);
  if (point != nullptr) tsan::acquire(point);
}

void sync_warp(uint32_t mask, Where where) {
  ordering_collective("__syncwarp", mask, nullptr, nothing, where);
}

// ---- shuffles and votes ---------------------------------------------------------------------

uint64_t shuffle(ShuffleKind kind, uint32_t mask, uint64_t value, int operand, int width,
                 Where where) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    here().fail(where, "shuffle with width " + std::to_string(width) + ", which is no power of 2");
  }
  const int lane = self().lane, segment = lane & ~(width - 1), place = lane & (width - 1);
  Lane mine{value, -1, value};
  const char* operation = "";
  switch (kind) {
    case ShuffleKind::kIndex:
      operation = "__shfl_sync";
      mine.source = segment + (operand & (width - 1));
      break;
    case ShuffleKind::kUp:
      operation = "__shfl_up_sync";
      if (place >= operand) mine.source = lane - operand;
      break;
    case ShuffleKind::kDown:
      operation = "__shfl_down_sync";
      if (place + operand < width) mine.source = lane + operand;
      break;
    case ShuffleKind::kXor:
      operation = "__shfl_xor_sync";
      // A lane may read segments before its own, but not later ones.
      if ((lane ^ operand) < segment + width) mine.source = lane ^ operand;
      break;
  }
  if (mine.source >= 0 && (mask >> mine.source & 1) == 0) {
    here().fail(where, std::string(operation) + " reads lane " + std::to_string(mine.source) +
                           ", which its mask does not name");
  }
  const Complete complete = [](void* const(&exchange)[32], uint32_t lanes) {
    for_each_lane(lanes, [&](int to) {
      Lane& lane = lane_of(exchange, to);
      if (lane.source >= 0) lane.result = lane_of(exchange, lane.source).value;
    });
  };
  warp_collective(operation, mask, &mine, complete, where);
  return mine.result;
}

uint32_t ballot(uint32_t mask, bool predicate, Where where) {
  Lane mine{predicate, 0, 0};
  const Complete complete = [](void* const(&exchange)[32], uint32_t lanes) {
    uint64_t votes = 0;
    for_each_lane(lanes, [&](int lane) { votes |= lane_of(exchange, lane).value << lane; });
    for_each_lane(lanes, [&](int lane) { lane_of(exchange, lane).result = votes; });
  };
  warp_collective("vote", mask, &mine, complete, where);
  return static_cast<uint32_t>(mine.result);
}

uint32_t match_any(uint32_t mask, uint64_t value, Where where) {
  Lane mine{value, 0, 0};
  const Complete complete = [](void* const(&exchange)[32], uint32_t lanes) {
    for_each_lane(lanes, [&](int lane) {
      uint64_t equal = 0;
      for_each_lane(lanes, [&](int other) {
        if (lane_of(exchange, other).value == lane_of(exchange, lane).value) equal |= 1u << other;
      });
      lane_of(exchange, lane).result = equal;
    });
  };
  warp_collective("match", mask, &mine, complete, where);
  return static_cast<uint32_t>(mine.result);
}

namespace {

template <ReduceKind kKind, class T>
void reduce_lanes(void* const (&exchange)[32], uint32_t lanes) {
  T total = static_cast<T>(lane_of(exchange, __builtin_ctz(lanes)).value);
  for_each_lane(lanes & (lanes - 1), [&](int lane) {
    const T value = static_cast<T>(lane_of(exchange, lane).value);
    if constexpr (kKind == ReduceKind::kAdd) {
      total = static_cast<T>(static_cast<uint32_t>(total) + static_cast<uint32_t>(value));
    } else if constexpr (kKind == ReduceKind::kMin) {
      total = value < total ? value : total;
    } else if constexpr (kKind == ReduceKind::kMax) {
      total = total < value ? value : total;
    } else if constexpr (kKind == ReduceKind::kAnd) {
      total &= value;
    } else if constexpr (kKind == ReduceKind::kOr) {
      total |= value;
    } else {
      total ^= value;
    }
  });
  for_each_lane(lanes,
                [&](int lane) { lane_of(exchange, lane).result = static_cast<uint32_t>(total); });
}

template <class T>
Complete reducer(ReduceKind kind) {
  switch (kind) {
    case ReduceKind::kAdd:
      return reduce_lanes<ReduceKind::kAdd, T>;
    case ReduceKind::kMin:
      return reduce_lanes<ReduceKind::kMin, T>;
    case ReduceKind::kMax:
      return reduce_lanes<ReduceKind::kMax, T>;
    case ReduceKind::kAnd:
      return reduce_lanes<ReduceKind::kAnd, T>;
    case ReduceKind::kOr:
      return reduce_lanes<ReduceKind::kOr, T>;
    case ReduceKind::kXor:
      return reduce_lanes<ReduceKind::kXor, T>;
  }
  return nullptr;
}

}  // namespace

uint64_t reduce(ReduceKind kind, bool is_signed, uint32_t mask, uint32_t value, Where where) {
  Lane mine{value, 0, 0};
  warp_collective("__reduce_sync", mask, &mine,
                  is_signed ? reducer<int32_t>(kind) : reducer<uint32_t>(kind), where);
  return mine.result;
}

// ---- barriers of the block ------------------------------------------------------------------

int sync_threads_count(int predicate, Where where) {
  Thread& thread = self();
  Block& block = *thread.owner;
  if (block.exited > 0) {
    block.fail(where, "__syncthreads after " + std::to_string(block.exited) + " of " +
                          std::to_string(block.total) + " threads have exited");
  }
  const Thread& first = block.threads[static_cast<size_t>(block.barrier_first)];
  if (block.at_barrier > 0 && !same(first.where, where)) {
    block.fail(where, "__syncthreads, while thread " + describe(first.index) +
                          " waits at another one, " + describe(first.where));
  }
  const int phase = block.barrier_phase;
  if (block.sync != nullptr) tsan::release(&block.sync->barrier[phase]);
  if (block.at_barrier++ == 0) block.barrier_first = thread.linear;
  block.barrier_count += predicate != 0;
  if (block.at_barrier < block.total) {
    block.wait(State::kAtBarrier, "__syncthreads", where);
  } else {
    block.barrier_result = block.barrier_count;
    block.at_barrier = block.barrier_count = 0;
    block.barrier_phase ^= 1;
    for (Thread& other : block.threads) {
      if (other.state == State::kAtBarrier) block.wake(other);
    }
    block.yield(false);
  }
  if (block.sync != nullptr) tsan::acquire(&block.sync->barrier[phase]);
  return block.barrier_result;
}

void sync_threads(Where where) { sync_threads_count(0, where); }

void named_barrier(int barrier, int threads, bool wait, Where where) {
  Thread& thread = self();
  Block& block = *thread.owner;
  if (barrier < 1 || barrier > 15 || threads < 32 || threads % 32 != 0 || threads > block.total) {
    block.fail(where, "named barrier " + std::to_string(barrier) + " of " +
                          std::to_string(threads) + " threads");
  }
  NamedBarrier& named = block.named[barrier];
  if (named.arrived > 0 && named.expected != threads) {
    block.fail(where, "named barrier " + std::to_string(barrier) + " of " +
                          std::to_string(threads) + " threads, for others of " +
                          std::to_string(named.expected));
  }
  named.expected = threads;
  const int phase = named.phase;
  if (block.sync != nullptr) tsan::release(&block.sync->named[barrier][phase]);
  if (++named.arrived == threads) {
    named.arrived = 0;
    named.phase ^= 1;
    for (Thread& other : block.threads) {
      if (other.state == State::kAtNamedBarrier && other.named_barrier == barrier) {
        block.wake(other);
      }
    }
    block.yield(false);
  } else if (wait) {
    thread.named_barrier = barrier;
    block.wait(State::kAtNamedBarrier, "bar.sync", where);
  }
  if (wait && block.sync != nullptr) tsan::acquire(&block.sync->named[barrier][phase]);
}

void yield(bool always) { here().yield(always); }

// After a fence, a thread sees everything that other threads wrote before their earlier fences.
// That is more than fences promise. It keeps ThreadSanitizer from reporting accesses that atomics
// order.
void fence() {
  uint64_t* const point = &here().launch_sync->fence;
  tsan::acquire(point);
  tsan::release(point);
}

void wait_for_kernel_ahead() { self().waited_for_kernel_ahead = true; }

void trap(Where where) { here().fail(where, "__trap"); }

}  // namespace rosa::simt
