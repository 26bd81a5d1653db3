// The emulator's own tests: launches, schedules, barriers, collectives and shared memory. What is
// undefined on a GPU must be an error that names its place.
#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "../check.h"
#include "cuda/platform.h"
#include "simt/child.h"
#include "simt/emulator.h"

namespace rosa::test {
namespace {

using simt::Where;

constexpr uint32_t kAll = 0xffffffffu;

// Sanitizers are slow, so their builds test fewer cases.
#if defined(ROSA_TEST_REDUCED)
constexpr bool kReduced = true;
#else
constexpr bool kReduced = false;
#endif

template <class Kernel>
void run(unsigned blocks, unsigned threads, const Kernel& kernel, int64_t shared_bytes = 0) {
  simt::allow_shared_memory();
  simt::launch(dim3(blocks), dim3(threads), shared_bytes, kernel);
}

// Calls test(seed) with threads in order, then at random.
template <class Test>
void for_seeds(int count, Test test) {
  for (int seed = 0; seed < count; ++seed) {
    simt::set_seed(static_cast<uint64_t>(seed));
    test("seed " + std::to_string(seed));
  }
  simt::set_seed(0);
}

// ---- launches -------------------------------------------------------------------------------

void test_indices() {
  for (const int at_once : {1, kReduced ? 2 : 5, 0}) {
    simt::set_blocks_at_once(at_once);
    for_seeds(3, [&](const std::string& context) {
      const dim3 grid(5, 7, 3), block(4, 6, 16);
      std::vector<int> visits(5 * 7 * 3 * 4 * 6 * 16, 0);
      simt::launch(grid, block, 0, [&] {
        const bool right = gridDim.x == 5 && gridDim.y == 7 && gridDim.z == 3 && blockDim.x == 4 &&
                           blockDim.y == 6 && blockDim.z == 16;
        const unsigned linear =
            ((blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x) * 384 +
            (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
        visits[linear] += right ? 1 : 100;
      });
      ROSA_CHECK(std::all_of(visits.begin(), visits.end(), [](int n) { return n == 1; }),
                 context + ", blocks at once " + std::to_string(at_once));
    });
  }
  simt::set_blocks_at_once(0);
}

// The order in which the threads of a block take numbers. Each takes `turns` numbers, with a
// barrier in between.
std::vector<int> order(int threads, int turns) {
  std::vector<int> taken(static_cast<size_t>(threads * turns));
  int next = 0;
  run(1, static_cast<unsigned>(threads), [&] {
    for (int turn = 0; turn < turns; ++turn) {
      taken[static_cast<size_t>(atomicAdd(&next, 1))] = static_cast<int>(threadIdx.x);
      __syncwarp();
    }
  });
  return taken;
}

void test_schedules() {
  std::vector<int> in_order(96);
  std::iota(in_order.begin(), in_order.end(), 0);
  simt::set_seed(0);
  ROSA_CHECK(order(96, 1) == in_order, "");
  std::set<std::vector<int>> different;
  for_seeds(6, [&](const std::string& context) {
    const std::vector<int> first = order(96, 3);
    ROSA_CHECK(order(96, 3) == first, context + ": the same seed, another schedule");
    different.insert(first);
  });
  ROSA_CHECK(different.size() == 6, std::to_string(different.size()) + " of 6 schedules differ");

  // Between block barriers, warps must drift far apart under some seeds.
  int furthest = 0;
  for_seeds(20, [&](const std::string&) {
    std::vector<int> progress(8, 0);
    run(1, 256, [&] {
      for (int i = 0; i < 100; ++i) {
        __syncwarp();
        if (threadIdx.x % 32 != 0) continue;
        const int own = atomicAdd(&progress[threadIdx.x / 32], 1);
        for (int& other : progress) atomicMax(&furthest, own - atomicAdd(&other, 0));
      }
    });
  });
  ROSA_CHECK(furthest > 90, "warps drift " + std::to_string(furthest) + " apart");

  // Blocks must run out of order, and each block once.
  std::vector<unsigned> blocks(100);
  int next = 0;
  simt::set_blocks_at_once(1);
  simt::set_seed(3);
  run(100, 1, [&] { blocks[static_cast<size_t>(atomicAdd(&next, 1))] = blockIdx.x; });
  ROSA_CHECK(!std::is_sorted(blocks.begin(), blocks.end()), "");
  std::sort(blocks.begin(), blocks.end());
  for (unsigned i = 0; i < 100; ++i) ROSA_CHECK(blocks[i] == i, std::to_string(i));
  simt::set_seed(0);
  simt::set_blocks_at_once(0);
}

void test_callers_at_once() {
  const auto caller = [](int number) {
    for (int round = 0; round < (kReduced ? 10 : 200); ++round) {
      simt::set_seed(static_cast<uint64_t>(round));
      std::vector<int> sums(40, 0);
      run(40, 128, [&] {
        ROSA_SHARED(partial, int[128]);
        partial[threadIdx.x] = number;
        __syncthreads();
        for (unsigned half = 64; half > 0; half /= 2) {
          if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
          __syncthreads();
        }
        if (threadIdx.x == 0) sums[blockIdx.x] = partial[0];
      });
      for (int sum : sums) ROSA_CHECK(sum == 128 * number, std::to_string(sum));
    }
  };
  std::thread other(caller, 3);
  caller(5);
  other.join();
}

// ---- barriers and shared memory -------------------------------------------------------------

// Shared memory must hold NaN when a block begins, and not what the previous block left.
void test_shared_memory() {
  for_seeds(3, [](const std::string& context) {
    for (const int64_t bytes : {0, 1, 24, 4096, 227 * 1024 - 256}) {
      run(
          3, 64,
          [&] {
            ROSA_DYNAMIC_SHARED(dynamic);
            ROSA_SHARED(words, uint32_t[4][8]);
            ROSA_SHARED(pair, uint2);
            ROSA_CHECK(reinterpret_cast<uintptr_t>(dynamic) % 1024 == 0, context);
            ROSA_CHECK(reinterpret_cast<uintptr_t>(words) % 16 == 0, context);
            bool poisoned = true;
            for (int64_t i = threadIdx.x; i < bytes; i += 64) {
              poisoned = poisoned && dynamic[i] == 0xFF;
            }
            if (threadIdx.x < 32)
              poisoned = poisoned && words[threadIdx.x / 8][threadIdx.x % 8] == kAll;
            poisoned = poisoned && pair.x == kAll;
            __syncthreads();
            for (int64_t i = threadIdx.x; i < bytes; i += 64) dynamic[i] = 1;
            if (threadIdx.x < 32) words[threadIdx.x / 8][threadIdx.x % 8] = 2;
            if (threadIdx.x == 0) pair = make_uint2(3, 3);
            __syncthreads();
            ROSA_CHECK(poisoned && words[3][7] == 2 && pair.y == 3, context);
          },
          bytes);
    }
  });
}

template <int kSize>
int* declared() {
  ROSA_SHARED(array, int[kSize]);
  return array;
}

void test_static_declarations() {
  run(2, 2, [] {
    ROSA_SHARED(here, int);
    ROSA_SHARED(there, int);
    int* first = declared<2>();
    for (int i = 0; i < 3; ++i) ROSA_CHECK(declared<2>() == first, "one declaration, one array");
    ROSA_CHECK(declared<3>() != first && &here != &there, "instances have their own");
  });
}

void test_barriers() {
  for_seeds(8, [](const std::string& context) {
    for (const unsigned threads : {1u, 31u, 32u, 33u, 100u, 256u, kReduced ? 128u : 1024u}) {
      run(2, threads, [&] {
        ROSA_SHARED(values, unsigned[1024]);
        for (unsigned turn = 0; turn < 5; ++turn) {
          values[threadIdx.x] = threadIdx.x + turn;
          __syncthreads();
          const unsigned other = (threadIdx.x * 7 + 13) % threads;
          ROSA_CHECK(values[other] == other + turn, context);
          __syncthreads();
        }
        const int count = __syncthreads_count(threadIdx.x % 3 == 0);
        ROSA_CHECK(count == static_cast<int>((threads + 2) / 3), context);
        ROSA_CHECK(__syncthreads_or(threadIdx.x == threads - 1) == 1, context);
        ROSA_CHECK(__syncthreads_or(0) == 0, context);
        ROSA_CHECK(__syncthreads_and(1) == 1, context);
        ROSA_CHECK(__syncthreads_and(threadIdx.x != 0) == 0, context);
      });
    }
    // Threads may wait for a flag that another thread raises.
    run(1, 64, [&] {
      ROSA_SHARED(flag, int);
      if (threadIdx.x == 0) flag = 0;
      __syncthreads();
      if (threadIdx.x == 63) atomicExch(&flag, 1);
      while (atomicAdd(&flag, 0) == 0) __nanosleep(20);
      ROSA_CHECK(atomicAdd(&flag, 0) == 1, context);
    });
  });
}

// ---- collectives ----------------------------------------------------------------------------

void test_shuffles() {
  for_seeds(4, [](const std::string& context) {
    run(1, 64, [&] {
      const int lane = static_cast<int>(threadIdx.x % 32),
                base = static_cast<int>(threadIdx.x) - lane;
      const auto value = [&](int of) { return 1000 + 3 * (base + of); };
      const int mine = value(lane);
      for (const int width : {1, 2, 4, 8, 16, 32}) {
        const int segment = lane / width * width;
        for (const int n : {0, 1, 2, 5, 16, 31}) {
          ROSA_CHECK(__shfl_sync(kAll, mine, n, width) == value(segment + n % width), context);
          const int up = lane - n >= segment ? lane - n : lane;
          ROSA_CHECK(__shfl_up_sync(kAll, mine, static_cast<unsigned>(n), width) == value(up),
                     context);
          const int down = lane + n < segment + width ? lane + n : lane;
          ROSA_CHECK(__shfl_down_sync(kAll, mine, static_cast<unsigned>(n), width) == value(down),
                     context);
          const int other = (lane ^ n) < segment + width ? lane ^ n : lane;
          ROSA_CHECK(__shfl_xor_sync(kAll, mine, n, width) == value(other), context);
        }
      }
      ROSA_CHECK(__shfl_sync(kAll, 0.5f * static_cast<float>(lane), 7) == 3.5f, context);
      ROSA_CHECK(__shfl_sync(kAll, 0.5 * lane, 7) == 3.5, context);
      ROSA_CHECK(__shfl_sync(kAll, int64_t{lane} << 40, 9) == int64_t{9} << 40, context);
      ROSA_CHECK(__shfl_sync(kAll, static_cast<uint16_t>(lane), 9) == 9, context);
      // The two halves of a warp shuffle in different places.
      if (lane < 16) {
        ROSA_CHECK(__shfl_xor_sync(0xffffu, lane, 3) == (lane ^ 3), context);
      } else {
        ROSA_CHECK(__shfl_xor_sync(0xffff0000u, lane, 5) == (lane ^ 5), context);
      }
    });
  });
}

// Groups of lanes synchronise among themselves, each group a different number of times. In between
// they synchronise with another group.
void test_subwarps() {
  for_seeds(8, [](const std::string& context) {
    run(1, 64, [&] {
      ROSA_SHARED(values, unsigned[64]);
      const unsigned lane = threadIdx.x % 32, group = lane / 8;
      unsigned* own = values + threadIdx.x - lane % 8;
      const uint32_t eight = 0xffu << (8 * group), half = group < 2 ? 0xffffu : 0xffff0000u;
      for (unsigned turn = 0; turn < 3 + group; ++turn) {
        own[lane % 8] = turn * 64 + lane;
        __syncwarp(eight);
        const unsigned next = (lane + 1) % 8;
        ROSA_CHECK(own[next] == turn * 64 + group * 8 + next, context);
        __syncwarp(eight);
        if (turn != 1) continue;
        __syncwarp(half);  // lanes of another group
        const unsigned other = threadIdx.x ^ 8;
        ROSA_CHECK(values[other] == turn * 64 + other % 32, context);
        __syncwarp(half);
      }
    });
  });
}

void test_votes() {
  for_seeds(4, [](const std::string& context) {
    run(1, 96, [&] {
      const unsigned lane = threadIdx.x % 32;
      ROSA_CHECK(__ballot_sync(kAll, lane % 3 == 0) == 0x49249249u, context);
      ROSA_CHECK(__any_sync(kAll, lane == 31) == 1 && __any_sync(kAll, 0) == 0, context);
      ROSA_CHECK(__all_sync(kAll, lane < 32) == 1 && __all_sync(kAll, lane < 31) == 0, context);
      ROSA_CHECK(__match_any_sync(kAll, lane % 2) == (lane % 2 ? 0xaaaaaaaau : 0x55555555u),
                 context);
      int all = -1;
      ROSA_CHECK(__match_all_sync(kAll, 2.5f, &all) == kAll && all == 1, context);
      ROSA_CHECK(__match_all_sync(kAll, lane, &all) == 0 && all == 0, context);
      const int value = static_cast<int>(lane) - 10;
      ROSA_CHECK(__reduce_add_sync(kAll, value) == 176, context);
      ROSA_CHECK(__reduce_min_sync(kAll, value) == -10, context);
      ROSA_CHECK(__reduce_max_sync(kAll, value) == 21, context);
      ROSA_CHECK(__reduce_min_sync(kAll, static_cast<unsigned>(value)) == 0, context);
      ROSA_CHECK(__reduce_max_sync(kAll, static_cast<unsigned>(value)) == kAll, context);
      ROSA_CHECK(__reduce_or_sync(kAll, 1u << lane) == kAll, context);
      ROSA_CHECK(__reduce_and_sync(kAll, ~(1u << lane)) == 0, context);
      ROSA_CHECK(__reduce_xor_sync(kAll, lane) == 0, context);
      if (lane % 2 == 1) {
        ROSA_CHECK(__ballot_sync(0xaaaaaaaau, lane > 15) == 0xaaaa0000u, context);
        ROSA_CHECK(__reduce_add_sync(0xaaaaaaaau, 1) == 16, context);
      }
    });
  });
}

void test_atomics() {
  for_seeds(4, [](const std::string& context) {
    int sum = 0, low = 5, high = 5, last = 0;
    unsigned bits_or = 0, bits_and = kAll, bits_xor = 0;
    unsigned long long large = 0;
    float real = 0;
    double precise = 0;
    std::vector<int> tickets(20 * 64, 0);
    run(20, 64, [&] {
      const int n = static_cast<int>(blockIdx.x * 64 + threadIdx.x);
      ++tickets[static_cast<size_t>(atomicAdd(&sum, 1))];
      atomicMin(&low, -n);
      atomicMax(&high, n);
      atomicOr(&bits_or, 1u << (n % 32));
      atomicAnd(&bits_and, ~(1u << (n % 31)));
      atomicXor(&bits_xor, 1u << (n % 32));
      atomicAdd(&large, 1ull << 40);
      atomicAdd(&real, 0.25f);
      atomicAdd(&precise, 0.25);
      int seen = atomicCAS(&last, 0, 0);
      for (int before; (before = atomicCAS(&last, seen, seen + 2)) != seen;) seen = before;
    });
    ROSA_CHECK(std::all_of(tickets.begin(), tickets.end(), [](int n) { return n == 1; }), context);
    ROSA_CHECK(sum == 1280 && low == -1279 && high == 1279 && last == 2560, context);
    ROSA_CHECK(bits_or == kAll && bits_and == 0x80000000u && bits_xor == 0, context);
    ROSA_CHECK(large == 1280ull << 40 && real == 320 && precise == 320, context);
  });
}

void test_intrinsics() {
  ROSA_CHECK(__popc(0xf0f0u) == 8 && __popcll(~0ull) == 64, "");
  ROSA_CHECK(__clz(0) == 32 && __clz(1) == 31 && __clz(-1) == 0 && __clzll(1) == 63, "");
  ROSA_CHECK(__ffs(0) == 0 && __ffs(8) == 4 && __ffsll(1ll << 40) == 41, "");
  ROSA_CHECK(__umulhi(0x80000000u, 6) == 3, "");
  ROSA_CHECK(__byte_perm(0x33221100u, 0x77665544u, 0x7250) == 0x77225500u, "");
  ROSA_CHECK(__float_as_uint(1.0f) == 0x3f800000u && __int_as_float(0x40000000) == 2.0f, "");
  ROSA_CHECK(min(int64_t{5}, 3) == 3 && max(2u, 7u) == 7 && max(-1.0f, 2.0f) == 2.0f, "");
}

// ---- misuse ---------------------------------------------------------------------------------

// The error that `kernel` ends with, "" if none.
template <class Kernel>
std::string error_of(unsigned threads, const Kernel& kernel, int64_t shared_bytes = 0) {
  try {
    run(2, threads, kernel, shared_bytes);
  } catch (const simt::Error& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// Every misuse must be reported with its line, under every schedule.
void expect_error(const std::string& error, int line, const std::string& part,
                  const std::string& context) {
  ROSA_CHECK(contains(error, part), context + ": expected '" + part + "', got '" + error + "'");
  ROSA_CHECK(contains(error, "test_emulator.cpp:" + std::to_string(line)), error);
  ROSA_CHECK(contains(error, "block (") && contains(error, "thread ("), error);
}

void test_misuse_of_barriers() {
  for_seeds(6, [](const std::string& context) {
    int line = __LINE__ + 2;
    const auto some_exit = [] {
      if (threadIdx.x < 7) __syncthreads();
    };
    expect_error(error_of(64, some_exit), line, "exited", context);

    line = __LINE__ + 3;
    const auto two_places = [] {
      if (threadIdx.x < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
    };
    const std::string error = error_of(64, two_places);
    ROSA_CHECK(contains(error, "waits at another one"), error);
    ROSA_CHECK(contains(error, ":" + std::to_string(line)), error);
    ROSA_CHECK(contains(error, ":" + std::to_string(line + 2)), error);

    line = __LINE__ + 3;
    const auto warp_against_block = [] {
      if (threadIdx.x < 7) {
        __syncwarp();
      } else {
        __syncthreads();
      }
    };
    expect_error(error_of(32, warp_against_block), line, "deadlock", context);
    line = __LINE__ + 1;
    expect_error(error_of(32, [] { __trap(); }), line, "__trap", context);
  });
}

void test_misuse_of_collectives() {
  for_seeds(6, [](const std::string& context) {
    int line = __LINE__ + 2;
    const auto absent = [] {
      if (threadIdx.x < 16) __shfl_xor_sync(kAll, 1, 1);
    };
    expect_error(error_of(32, absent), line, "which has exited", context);

    line = __LINE__ + 1;
    const auto not_in_mask = [] { __ballot_sync(0xffffu, 1); };
    expect_error(error_of(32, not_in_mask), line, "does not name", context);

    line = __LINE__ + 1;
    const auto beyond_block = [] { __syncwarp(); };
    expect_error(error_of(48, beyond_block), line, "which the block does not have", context);

    line = __LINE__ + 2;
    const auto reads_absent = [] {
      if (threadIdx.x < 16) __shfl_sync(0xffffu, 1, 20);
    };
    expect_error(error_of(32, reads_absent), line, "reads lane 20", context);

    line = __LINE__ + 3;
    const auto different_masks = [] {
      const bool low = threadIdx.x < 16;
      __any_sync(low ? kAll : 0xffff0000u, low);
    };
    expect_error(error_of(32, different_masks), line, "which has exited", context);

    line = __LINE__ + 3;
    const auto different_operations = [] {
      if (threadIdx.x < 16) {
        __any_sync(kAll, 1);
      } else {
        __shfl_sync(kAll, 1, 0);
      }
    };
    expect_error(error_of(32, different_operations), line, "deadlock", context);

    line = __LINE__ + 1;
    const auto width = [] { __shfl_sync(kAll, 1, 0, 12); };
    expect_error(error_of(32, width), line, "width 12", context);
  });
}

void test_misuse_of_memory() {
  for_seeds(2, [](const std::string& context) {
    int line = __LINE__ + 2;
    const auto too_much = [] {
      ROSA_SHARED(array, char[49153]);
      array[threadIdx.x] = 0;
    };
    expect_error(error_of(32, too_much), line, "static shared memory", context);
    line = __LINE__ + 2;
    const auto all_there_is = [] {
      ROSA_SHARED(array, char[49152]);
      array[threadIdx.x] = 0;
    };
    ROSA_CHECK(error_of(32, all_there_is).empty(), context);
    expect_error(error_of(32, all_there_is, 200 * 1024), line, "static shared memory", context);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    // Sanitizers report this themselves.
    for (const int64_t bytes : {1, 16, 1000}) {
      const auto past = [=] {
        ROSA_DYNAMIC_SHARED(dynamic);
        dynamic[bytes] = 0;
      };
      ROSA_CHECK(contains(error_of(32, past, bytes), "past the end"), context);
    }
#endif
  });
}

void test_limits() {
  const auto refused = [](dim3 blocks, dim3 threads, int64_t shared_bytes, const char* part) {
    try {
      simt::allow_shared_memory();
      simt::launch(blocks, threads, shared_bytes, [] {});
      ROSA_CHECK(false, part);
    } catch (const simt::Error& error) {
      ROSA_CHECK(contains(error.what(), part), error.what());
    }
  };
  refused(dim3(0), dim3(32), 0, "got a grid of (0, 1, 1)");
  refused(dim3(1, 0), dim3(32), 0, "got a grid of (1, 0, 1)");
  refused(dim3(1), dim3(0), 0, "got (0, 1, 1)");
  refused(dim3(1), dim3(1025), 0, "got (1025, 1, 1)");
  refused(dim3(1), dim3(32, 33), 0, "got (32, 33, 1)");
  refused(dim3(1), dim3(1, 1, 65), 0, "got (1, 1, 65)");
  refused(dim3(1, 65536), dim3(1), 0, "got (1, 65536, 1)");
  refused(dim3(1, 1, 65536), dim3(1), 0, "got (1, 1, 65536)");
  refused(dim3(1u << 31), dim3(1), 0, "blocks");
  refused(dim3(1), dim3(1), 227 * 1024 + 1, "got 232449");
  const std::string nested = error_of(1, [] { simt::launch(dim3(1), dim3(1), 0, [] {}); });
  ROSA_CHECK(contains(nested, "cannot launch another"), nested);
}

// Static and dynamic shared memory count together, as on a device. A launch has 48 KiB, unless it
// is allowed more. The permission is for that launch only, and for no more than the device has.
void test_permission_for_shared_memory() {
  constexpr int64_t kStatic = 16 * 1024, kDefault = 48 * 1024;
  const auto outcome = [](bool allowed, int64_t dynamic_bytes) -> std::string {
    if (allowed) simt::allow_shared_memory();
    try {
      simt::launch(dim3(1), dim3(32), dynamic_bytes, [] {
        ROSA_SHARED(array, char[kStatic]);
        array[threadIdx.x] = 0;
      });
    } catch (const simt::Error& error) {
      return error.what();
    }
    return "";
  };
  const auto refuses = [&](bool allowed, int64_t dynamic_bytes, const char* part) {
    const std::string error = outcome(allowed, dynamic_bytes);
    ROSA_CHECK(contains(error, part), std::to_string(dynamic_bytes) + ": " + error);
  };
  const auto serves = [&](bool allowed, int64_t dynamic_bytes) {
    const std::string error = outcome(allowed, dynamic_bytes);
    ROSA_CHECK(error.empty(), std::to_string(dynamic_bytes) + ": " + error);
  };
  serves(false, kDefault - kStatic);
  refuses(false, kDefault - kStatic + 16, "more than the 49152 bytes of this launch");
  refuses(false, kDefault + 1, "at most 49152 bytes of dynamic shared memory");
  serves(true, simt::kMaxSharedBytes - kStatic);
  refuses(false, kDefault, "more than the 49152 bytes");
  refuses(true, simt::kMaxSharedBytes - kStatic + 16, "more than the 232448 bytes");

  const int64_t before = simt::set_shared_bytes(99 * 1024);
  serves(true, 99 * 1024 - kStatic);
  refuses(true, 99 * 1024 - kStatic + 16, "more than the 101376 bytes");
  refuses(true, 99 * 1024 + 1, "at most 101376 bytes");
  simt::set_shared_bytes(1);  // any device gives the default
  serves(false, kDefault - kStatic);
  simt::set_shared_bytes(before);
}

// A failed kernel leaves nothing behind. The next kernel runs correctly on the same stacks.
void test_after_failures() {
  for_seeds(20, [](const std::string& context) {
    const std::string error = error_of(256, [] {
      __syncthreads();
      if (threadIdx.x == 77) throw simt::Error("thrown by the kernel");
      __syncthreads();
    });
    ROSA_CHECK(contains(error, "thrown by the kernel"), context + error);
    int sum = 0;
    run(3, 256, [&] {
      __syncthreads();
      if (threadIdx.x % 32 == 0) atomicAdd(&sum, 1);
    });
    ROSA_CHECK(sum == 24, context);
  });
  // If several blocks fail, the error is always that of the same block.
  std::set<std::string> reports;
  for (int i = 0; i < 20; ++i) {
    try {
      run(200, 64, [] {
        if (blockIdx.x % 7 == 5) __trap();
      });
    } catch (const simt::Error& error) {
      reports.insert(error.what());
    }
  }
  ROSA_CHECK(reports.size() == 1 && contains(*reports.begin(), "block (5, 0, 0)"),
             std::to_string(reports.size()));
}

// ---- races ----------------------------------------------------------------------------------

// A block reduction without barrier `missing`, 0 or 1. With 2 no barrier is missing.
bool reduction_is_right(int missing) {
  std::vector<int> sums(6, 0);
  run(3, 256, [&] {
    ROSA_SHARED(partial, int[8]);
    for (int turn = 0; turn < 2; ++turn) {
      int sum = static_cast<int>(threadIdx.x) + turn;
      for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAll, sum, offset);
      if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
      if (missing != 0) __syncthreads();
      if (threadIdx.x == 0) {
        int total = 0;
        for (int value : partial) total += value;
        sums[blockIdx.x * 2 + static_cast<unsigned>(turn)] = total;
      }
      if (missing != 1) __syncthreads();
    }
  });
  bool right = true;
  for (int i = 0; i < 6; ++i)
    right = right && sums[static_cast<size_t>(i)] == 32640 + 256 * (i % 2);
  return right;
}

void test_missing_barriers() {
  int right[3] = {};
  constexpr int kSeeds = 40;
  for_seeds(kSeeds, [&](const std::string&) {
    for (int missing = 0; missing < 3; ++missing) right[missing] += reduction_is_right(missing);
  });
  ROSA_CHECK(right[0] < kSeeds, "the barrier before the reading is not missed");
  ROSA_CHECK(right[1] < kSeeds, "the barrier after the reading is not missed");
  ROSA_CHECK(right[2] == kSeeds, "the right kernel fails");
}

// A sanitizer that finds an error ends the process, so a child process commits these misdeeds.
const Misdeed kMisdeeds[] = {
    {"read past dynamic shared memory", Sanitizer::kAddress,
     [] {
       int sum = 0;
       run(
           1, 32,
           [&] {
             ROSA_DYNAMIC_SHARED(dynamic);
             sum += dynamic[threadIdx.x * 4];
           },
           124);
       return sum;
     }},
    {"write past static shared memory", Sanitizer::kAddress,
     [] {
       volatile unsigned past = 33;
       run(1, 32, [&] {
         ROSA_SHARED(words, int[33]);
         words[threadIdx.x + (threadIdx.x == 31 ? past - 31 : 0)] = 1;
       });
       return 0;
     }},
    {"read past global memory", Sanitizer::kAddress,
     [] {
       std::vector<int> from(100), to(128);
       const int* in = from.data();
       run(1, 128, [&] { to[threadIdx.x] = in[threadIdx.x]; });
       return to[127];
     }},
    {"race of two warps", Sanitizer::kThread,
     [] {
       int value = 0;
       run(1, 64, [&] {
         ROSA_SHARED(word, int);
         if (threadIdx.x == 0) word = 1;
         if (threadIdx.x == 63) value = word;
       });
       return value;
     }},
    {"race of two lanes that only shuffle", Sanitizer::kThread,
     [] {
       int value = 0;
       run(1, 32, [&] {
         ROSA_SHARED(word, int);
         if (threadIdx.x == 0) word = 1;
         __shfl_sync(kAll, 1, 0);
         if (threadIdx.x == 31) value = word;
       });
       return value;
     }},
    {"race of two blocks", Sanitizer::kThread,
     [] {
       int value = 0;
       run(2, 1, [&] { value = static_cast<int>(blockIdx.x); });
       return value;
     }},
    {"race across a barrier", Sanitizer::kThread,
     [] {
       int value = 0;
       run(1, 64, [&] {
         ROSA_SHARED(word, int);
         if (threadIdx.x == 0) word = 1;
         __syncthreads();
         if (threadIdx.x == 63) value = word;
         if (threadIdx.x == 0) word = 2;
         __syncthreads();
       });
       return value;
     }},
};

}  // namespace
}  // namespace rosa::test

int main(int argc, char** argv) {
  using namespace rosa::test;
  if (argc > 1) return commit(kMisdeeds, argv[1]);
  test_indices();
  test_schedules();
  test_callers_at_once();
  test_shared_memory();
  test_static_declarations();
  test_barriers();
  test_shuffles();
  test_subwarps();
  test_votes();
  test_atomics();
  test_intrinsics();
  test_misuse_of_barriers();
  test_misuse_of_collectives();
  test_misuse_of_memory();
  test_limits();
  test_permission_for_shared_memory();
  test_after_failures();
  if (kSanitizer != Sanitizer::kThread) test_missing_barriers();  // it would report the races
  expect_caught(kMisdeeds, argv[0]);
  return exit_status();
}
