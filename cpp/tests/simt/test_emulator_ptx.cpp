// Tests the emulator's versions of cuda/ptx.h and numeric.h. Layouts are compared with the PTX
// ISA's tables, and products with float64. Mistakes with asynchronous operations must be found.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "../check.h"
#include "../floats.h"
#include "../operands.h"
#include "cuda/ptx.h"
#include "simt/child.h"

namespace rosa::test {
namespace {

using cuda::Bf16;
using cuda::Half;

template <class T>
constexpr DType kDType = std::is_same_v<T, Bf16> ? DType::kBFloat16 : DType::kFloat16;

template <class Kernel>
void run(unsigned threads, const Kernel& kernel, int64_t shared_bytes = 0) {
  simt::allow_shared_memory();
  simt::launch(dim3(1), dim3(threads), shared_bytes, kernel);
}

template <class Test>
void for_seeds(int count, Test test) {
  for (int seed = 0; seed < count; ++seed) {
    simt::set_seed(static_cast<uint64_t>(seed));
    test("seed " + std::to_string(seed));
  }
  simt::set_seed(0);
}

template <class Kernel>
std::string error_of(unsigned threads, const Kernel& kernel, int64_t shared_bytes = 0) {
  try {
    run(threads, kernel, shared_bytes);
  } catch (const simt::Error& error) {
    return error.what();
  }
  return "";
}

// Every misuse must be reported with its place in this file.
template <class Kernel>
void expect_error(const std::string& part, unsigned threads, const Kernel& kernel,
                  int64_t shared_bytes = 0) {
  for_seeds(4, [&](const std::string& context) {
    const std::string error = error_of(threads, kernel, shared_bytes);
    ROSA_CHECK(error.find(part) != std::string::npos,
               context + ": expected '" + part + "', got '" + error + "'");
    ROSA_CHECK(error.find("test_emulator_ptx.cpp:") != std::string::npos, error);
    ROSA_CHECK(error.find("block (0, 0, 0), thread (") != std::string::npos, error);
  });
}

// The number of seeds, out of `count`, under which a test passes.
template <class Test>
int passes(int count, Test test) {
  int passed = 0;
  for_seeds(count, [&](const std::string&) {
    try {
      passed += test();
    } catch (const simt::Error&) {
    }
  });
  return passed;
}

// ---- numeric.h ------------------------------------------------------------------------------

template <class T>
void test_conversions() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const T x{static_cast<uint16_t>(bits)};
    const double want = load(kDType<T>, reinterpret_cast<const char*>(&x));
    const float got = cuda::to_float(x);
    ROSA_CHECK(std::isnan(want) ? std::isnan(got) : got == want, std::to_string(bits));
    // The value itself, and other numbers, which must be rounded up or down.
    const double next = std::nextafter(std::fabs(want) * 1.001 + 1e-30, 1e300);
    for (const double value : {want, want + (next - want) / 2, want * 1.002, want * 0.998}) {
      const float narrow = static_cast<float>(value);
      const float rounded = cuda::to_float(cuda::from_float<T>(narrow));
      const double expected = round_to(kDType<T>, narrow);
      ROSA_CHECK(std::isnan(expected) ? std::isnan(rounded) : rounded == expected,
                 std::to_string(bits));
    }
  }
  const uint32_t pair = cuda::pack_pair<T>(1.5f, -2.0f);
  ROSA_CHECK((pair & 0xffff) == cuda::from_float<T>(1.5f).bits, "the first is the lower half");
  const float2 both = cuda::unpack_pair<T>(pair);
  ROSA_CHECK(both.x == 1.5f && both.y == -2.0f, "");
  const float eight[8] = {1, 2, 3, 4, -5, 6, -7, 0.5f};
  float back[8] = {};
  cuda::unpack_vec16<T>(cuda::pack_vec16<T>(eight), back);
  ROSA_CHECK(std::equal(eight, eight + 8, back), "");
}

// ---- ldmatrix and mma -----------------------------------------------------------------------

// Each element holds its matrix, row and column, so that a word shows where it came from.
void test_load_matrix() {
  for_seeds(4, [](const std::string& context) {
    for (const bool transposed : {false, true}) {
      run(
          32,
          [&] {
            ROSA_DYNAMIC_SHARED(shared);
            uint16_t* elements = reinterpret_cast<uint16_t*>(shared);
            const int lane = static_cast<int>(threadIdx.x);
            // Row r of matrix q lies at line 31 - (8 q + r).
            for (int c = 0; c < 8; ++c) {
              elements[(31 - lane) * 8 + c] =
                  static_cast<uint16_t>(lane / 8 * 64 + lane % 8 * 8 + c);
            }
            __syncwarp();
            uint32_t words[4];
            if (transposed) {
              cuda::load_matrix_x4_transposed(words, shared + (31 - lane) * 16);
            } else {
              cuda::load_matrix_x4(words, shared + (31 - lane) * 16);
            }
            for (int q = 0; q < 4; ++q) {
              for (int half = 0; half < 2; ++half) {
                const int row = lane / 4, col = lane % 4 * 2 + half;
                const int want = q * 64 + (transposed ? col * 8 + row : row * 8 + col);
                ROSA_CHECK(static_cast<int>(words[q] >> (16 * half) & 0xffff) == want, context);
              }
            }
          },
          512);
    }
  });
  expect_error("outside shared memory", 32, [] {
    alignas(16) unsigned char here[16] = {};
    uint32_t words[4];
    cuda::load_matrix_x4(words, here);
  });
  expect_error(
      "outside shared memory", 32,
      [] {
        ROSA_DYNAMIC_SHARED(shared);
        uint32_t words[4];
        cuda::load_matrix_x4(words, shared + threadIdx.x * 16);
      },
      511);
  expect_error(
      "not 16-byte aligned", 32,
      [] {
        ROSA_DYNAMIC_SHARED(shared);
        uint32_t words[4];
        cuda::load_matrix_x4_transposed(words, shared + threadIdx.x * 16 + 8);
      },
      1024);
  expect_error(
      "exited", 32,
      [] {
        ROSA_DYNAMIC_SHARED(shared);
        uint32_t words[4];
        if (threadIdx.x < 31) cuda::load_matrix_x4(words, shared);
      },
      1024);
}

template <class T>
struct Operands {
  std::vector<T> a, b;  // (rows, k) and (columns, k), row-major
  int k;

  Operands(int rows, int columns, int k, uint64_t seed) : k(k) {
    Random random(seed);
    for (int i = 0; i < rows * k; ++i) a.push_back(cuda::from_float<T>(small(random)));
    for (int i = 0; i < columns * k; ++i) b.push_back(cuda::from_float<T>(small(random)));
  }
  double product(int row, int column) const {
    double sum = 0;
    for (int i = 0; i < k; ++i) {
      sum += double{cuda::to_float(a[static_cast<size_t>(row * k + i)])} *
             double{cuda::to_float(b[static_cast<size_t>(column * k + i)])};
    }
    return sum;
  }

 private:
  // Multiples of 1/2. Their products and sums are exact, so no tolerance is needed.
  static float small(Random& random) {
    return static_cast<float>(static_cast<int>(random.bits() % 17) - 8) / 2;
  }
};

template <class T>
void test_mma() {
  for_seeds(4, [](const std::string& context) {
    const Operands<T> operands(16, 8, 16, 5);
    std::vector<float> d(16 * 8);
    run(32, [&] {
      // The ISA's formulas, by element index i of a fragment.
      const int lane = static_cast<int>(threadIdx.x), group = lane >> 2, in_group = lane % 4;
      uint32_t a[4] = {}, b[2] = {};
      for (int i = 0; i < 8; ++i) {
        const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
        const int col = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
        a[i / 2] |= static_cast<uint32_t>(operands.a[static_cast<size_t>(row * 16 + col)].bits)
                    << (i % 2 * 16);
      }
      for (int i = 0; i < 4; ++i) {
        const int row = in_group * 2 + (i & 1) + (i < 2 ? 0 : 8), col = group;
        b[i / 2] |= static_cast<uint32_t>(operands.b[static_cast<size_t>(col * 16 + row)].bits)
                    << (i % 2 * 16);
      }
      float sums[4] = {1, 2, 3, 4};
      cuda::mma_16x8x16<T>(sums, a, b[0], b[1]);
      for (int i = 0; i < 4; ++i) {
        const int row = i < 2 ? group : group + 8, col = in_group * 2 + (i & 1);
        d[static_cast<size_t>(row * 8 + col)] = sums[i] - static_cast<float>(i + 1);
      }
    });
    for (int row = 0; row < 16; ++row) {
      for (int col = 0; col < 8; ++col) {
        ROSA_CHECK(d[static_cast<size_t>(row * 8 + col)] == operands.product(row, col), context);
      }
    }
  });
}

// ---- cp.async -------------------------------------------------------------------------------

enum class Mistake {
  kNone,
  kNoWait,
  kWaitTooFew,
  kNoBarrier,
  kEarlyRefill,
  kNoDrain,
};

constexpr int kStages = 3, kTiles = 9, kThreads = 64;

// Sums columns of a matrix through a ring of stages. Each thread reads what another thread copied.
// Afterwards the stages are used for something else.
bool pipeline_is_right(Mistake mistake) {
  std::vector<uint4> from(kTiles * kThreads);
  for (unsigned i = 0; i < from.size(); ++i) from[i] = make_uint4(i, 2 * i, 3 * i, 5 * i);
  std::vector<unsigned> sums(kThreads), last(kThreads);
  run(
      kThreads,
      [&] {
        ROSA_DYNAMIC_SHARED(shared);
        uint4* stages = reinterpret_cast<uint4*>(shared);
        const unsigned thread = threadIdx.x, other = (thread + 37) % kThreads;
        const auto load = [&](unsigned tile) {
          if (tile < kTiles) {
            cuda::copy_async_16(stages + tile % kStages * kThreads + thread,
                                from.data() + tile * kThreads + thread);
          }
          cuda::copy_async_commit();
        };
        for (unsigned tile = 0; tile < kStages - 1; ++tile) load(tile);
        unsigned sum = 0;
        for (unsigned tile = 0; tile < kTiles; ++tile) {
          if (mistake == Mistake::kWaitTooFew) {
            cuda::copy_async_wait<kStages - 1>();
          } else if (mistake != Mistake::kNoWait) {
            cuda::copy_async_wait<kStages - 2>();
          }
          if (mistake == Mistake::kEarlyRefill) load(tile + kStages - 1);
          if (mistake != Mistake::kNoBarrier) __syncthreads();
          if (mistake != Mistake::kEarlyRefill) load(tile + kStages - 1);
          const uint4 value = stages[tile % kStages * kThreads + other];
          sum += value.x + value.y + value.z + value.w;
        }
        sums[thread] = sum;
        cuda::copy_async_wait<0>();
        if (mistake != Mistake::kNoDrain) __syncthreads();
        for (unsigned stage = 0; stage < kStages; ++stage)
          stages[stage * kThreads + thread].x = thread;
        __syncthreads();
        last[thread] = stages[other].x;
      },
      kStages * kThreads * 16);
  bool right = true;
  for (unsigned thread = 0; thread < kThreads; ++thread) {
    unsigned want = 0;
    for (unsigned tile = 0; tile < kTiles; ++tile) {
      want += 11 * (tile * kThreads + (thread + 37) % kThreads);
    }
    right = right && sums[thread] == want && last[thread] == (thread + 37) % kThreads;
  }
  return right;
}

void test_copy_async() {
  constexpr int kSeeds = 30;
  const auto passed = [](Mistake mistake) {
    return passes(kSeeds, [=] { return pipeline_is_right(mistake); });
  };
  ROSA_CHECK(passed(Mistake::kNone) == kSeeds, "the right pipeline fails");
  if (kSanitizer != Sanitizer::kThread) {  // which reports them itself
    for (const Mistake mistake : {Mistake::kNoWait, Mistake::kWaitTooFew, Mistake::kNoBarrier,
                                  Mistake::kEarlyRefill, Mistake::kNoDrain}) {
      const int count = passed(mistake);
      ROSA_CHECK(count < kSeeds / 2,
                 std::to_string(static_cast<int>(mistake)) + ": " + std::to_string(count));
    }
  }

  for_seeds(4, [](const std::string& context) {
    run(
        17,
        [&] {
          ROSA_DYNAMIC_SHARED(shared);
          alignas(16) unsigned char from[16];
          std::fill(from, from + 16, static_cast<unsigned char>(7));
          const int bytes = static_cast<int>(threadIdx.x);
          unsigned char* own = shared + 16 * bytes;
          cuda::copy_async_16(own, bytes > 0 ? from : nullptr, bytes);
          cuda::copy_async_commit();
          cuda::copy_async_wait<0>();
          for (int i = 0; i < 16; ++i) ROSA_CHECK(own[i] == (i < bytes ? 7 : 0), context);
        },
        17 * 16);
  });
  alignas(16) static const unsigned char source[32] = {};
  const auto copy = [](int64_t to, int64_t from, int bytes) {
    return [=] {
      ROSA_DYNAMIC_SHARED(shared);
      cuda::copy_async_16(shared + to, source + from, bytes);
    };
  };
  expect_error("not 16-byte aligned", 1, copy(8, 0, 16), 64);
  expect_error("not 16-byte aligned", 1, copy(16, 4, 16), 64);
  expect_error("outside shared memory", 1, copy(64, 0, 16), 64);
  expect_error("17 bytes", 1, copy(0, 0, 17), 64);
}

// ---- named barriers -------------------------------------------------------------------------

// Warps 0 and 1 write one slot, and warps 2 and 3 read it, ten times.
bool handover_is_right(bool wait_for_empty) {
  bool right = true;
  run(128, [&] {
    ROSA_SHARED(slot, unsigned[64]);
    constexpr int kFull = 1, kEmpty = 2;
    const unsigned lane = threadIdx.x % 64;
    if (threadIdx.x < 64) {
      for (unsigned turn = 0; turn < 10; ++turn) {
        if (wait_for_empty) cuda::named_barrier_sync(kEmpty, 128);
        slot[lane] = lane + turn;
        cuda::named_barrier_arrive(kFull, 128);
      }
      if (wait_for_empty) cuda::named_barrier_sync(kEmpty, 128);
    } else {
      if (wait_for_empty) cuda::named_barrier_arrive(kEmpty, 128);
      for (unsigned turn = 0; turn < 10; ++turn) {
        cuda::named_barrier_sync(kFull, 128);
        const unsigned other = (lane + 33) % 64;
        if (slot[other] != other + turn) right = false;
        if (wait_for_empty) cuda::named_barrier_arrive(kEmpty, 128);
      }
    }
  });
  return right;
}

void test_named_barriers() {
  ROSA_CHECK(passes(20, [] { return handover_is_right(true); }) == 20, "");
  if (kSanitizer != Sanitizer::kThread) {
    ROSA_CHECK(passes(20, [] { return handover_is_right(false); }) < 15, "");
  }
  expect_error("named barrier 16", 64, [] { cuda::named_barrier_sync(16, 64); });
  expect_error("named barrier 0", 64, [] { cuda::named_barrier_sync(0, 64); });
  expect_error("of 40 threads", 64, [] { cuda::named_barrier_arrive(1, 40); });
  expect_error("of 96 threads", 64, [] { cuda::named_barrier_arrive(1, 96); });
  expect_error("for others of", 96, [] {
    if (threadIdx.x < 64) cuda::named_barrier_arrive(1, threadIdx.x < 32 ? 96 : 64);
  });
  expect_error("deadlock", 64, [] {
    if (threadIdx.x < 32) cuda::named_barrier_sync(3, 64);
  });
}

// ---- mbarrier and bulk copies ---------------------------------------------------------------

enum class BulkMistake {
  kNone,
  kNoFullWait,
  kNoEmptyWait,
  kParityNeverFlips,
  kExpectsTooFew,
  kExpectsTooMany,
  kArrivesTwice,
  kTooFewArrivals,
};

// One warp copies data, and two warps use it.
bool bulk_pipeline_is_right(BulkMistake mistake) {
  constexpr unsigned kStageBytes = 1024, kWords = kStageBytes / 4;
  constexpr unsigned kRounds = 8;
  std::vector<unsigned> from(kRounds * kWords);
  for (unsigned i = 0; i < from.size(); ++i) from[i] = i * i;
  std::vector<unsigned> sums(64);
  run(
      96,
      [&] {
        ROSA_DYNAMIC_SHARED(stages);
        ROSA_SHARED(full, uint64_t[2]);
        ROSA_SHARED(empty, uint64_t[2]);
        if (threadIdx.x == 0) {
          for (int stage = 0; stage < 2; ++stage) {
            cuda::mbarrier_init(full + stage, 1);
            cuda::mbarrier_init(empty + stage, mistake == BulkMistake::kTooFewArrivals ? 32 : 64);
          }
          cuda::fence_barrier_init();
          cuda::fence_proxy_async();
        }
        __syncthreads();
        if (threadIdx.x >= 64) {
          if (threadIdx.x > 64) return;
          for (unsigned round = 0; round < kRounds; ++round) {
            const unsigned stage = round % 2;
            if (mistake != BulkMistake::kNoEmptyWait) {
              cuda::mbarrier_wait(empty + stage, (round / 2 & 1) ^ 1);
            }
            const int bytes = mistake == BulkMistake::kExpectsTooFew    ? 512
                              : mistake == BulkMistake::kExpectsTooMany ? 2048
                                                                        : 1024;
            cuda::mbarrier_expect_bytes(full + stage, bytes);
            // In two halves, which may land in any order.
            for (unsigned half = 0; half < 2; ++half) {
              cuda::copy_bulk_global_to_shared(stages + stage * kStageBytes + half * 512,
                                               from.data() + round * kWords + half * 128, 512,
                                               full + stage);
            }
          }
          return;
        }
        unsigned sum = 0;
        for (unsigned round = 0; round < kRounds; ++round) {
          const unsigned stage = round % 2;
          const unsigned parity = mistake == BulkMistake::kParityNeverFlips ? 0 : round / 2 & 1;
          if (mistake != BulkMistake::kNoFullWait) cuda::mbarrier_wait(full + stage, parity);
          const unsigned* words = reinterpret_cast<const unsigned*>(stages + stage * kStageBytes);
          for (unsigned i = threadIdx.x; i < kWords; i += 64) sum += words[i];
          cuda::mbarrier_arrive(empty + stage);
          if (mistake == BulkMistake::kArrivesTwice) cuda::mbarrier_arrive(empty + stage);
        }
        sums[threadIdx.x] = sum;
      },
      2 * kStageBytes);
  bool right = true;
  for (unsigned thread = 0; thread < 64; ++thread) {
    unsigned want = 0;
    for (unsigned i = thread; i < from.size(); i += 64) want += i * i;
    right = right && sums[thread] == want;
  }
  return right;
}

void test_bulk_copies() {
  constexpr int kSeeds = 30;
  const auto passed = [](BulkMistake mistake) {
    return passes(kSeeds, [=] { return bulk_pipeline_is_right(mistake); });
  };
  ROSA_CHECK(passed(BulkMistake::kNone) == kSeeds, "the right pipeline fails");
  if (kSanitizer != Sanitizer::kThread) {
    for (const BulkMistake mistake :
         {BulkMistake::kNoFullWait, BulkMistake::kNoEmptyWait, BulkMistake::kParityNeverFlips,
          BulkMistake::kExpectsTooFew, BulkMistake::kExpectsTooMany, BulkMistake::kArrivesTwice,
          BulkMistake::kTooFewArrivals}) {
      const int count = passed(mistake);
      ROSA_CHECK(count < kSeeds / 2,
                 std::to_string(static_cast<int>(mistake)) + ": " + std::to_string(count));
    }
  }

  alignas(16) static const unsigned char source[4096] = {};
  const auto with_barrier = [](auto use) {
    return [=] {
      ROSA_DYNAMIC_SHARED(shared);
      ROSA_SHARED(barrier, uint64_t);
      cuda::mbarrier_init(&barrier, 1);
      cuda::fence_proxy_async();
      use(shared, &barrier);
    };
  };
  expect_error("never initialised", 1, [] {
    ROSA_SHARED(barrier, uint64_t);
    cuda::mbarrier_wait(&barrier, 0);
  });
  expect_error("outside shared memory", 1, [] {
    uint64_t barrier = 0;
    cuda::mbarrier_init(&barrier, 1);
  });
  expect_error(
      "may not see its mbarrier", 2,
      [] {
        ROSA_DYNAMIC_SHARED(shared);
        ROSA_SHARED(barrier, uint64_t);
        if (threadIdx.x == 0) cuda::mbarrier_init(&barrier, 1);
        __syncthreads();
        if (threadIdx.x == 0) return;
        cuda::fence_proxy_async();  // not by the thread that initialised the barrier
        cuda::mbarrier_expect_bytes(&barrier, 16);
        cuda::copy_bulk_global_to_shared(shared, source, 16, &barrier);
      },
      16);
  expect_error("for 0 arrivals", 1, [] {
    ROSA_SHARED(barrier, uint64_t);
    cuda::mbarrier_init(&barrier, 0);
  });
  expect_error("deadlock", 1, with_barrier([](unsigned char*, uint64_t* barrier) {
                 cuda::mbarrier_wait(barrier, 0);
               }));
  expect_error("more arrivals", 1, with_barrier([](unsigned char*, uint64_t* barrier) {
                 cuda::mbarrier_expect_bytes(barrier, 16);
                 cuda::mbarrier_arrive(barrier);
               }));
  expect_error("overwritten", 1, with_barrier([](unsigned char*, uint64_t* barrier) {
                 *barrier = 1;
                 cuda::mbarrier_arrive(barrier);
               }));
  const auto copy = [&](int64_t to, int64_t from, int bytes, bool wait) {
    return with_barrier([=](unsigned char* shared, uint64_t* barrier) {
      cuda::mbarrier_expect_bytes(barrier, bytes);
      cuda::copy_bulk_global_to_shared(shared + to, source + from, bytes, barrier);
      if (wait) cuda::mbarrier_wait(barrier, 0);
    });
  };
  ROSA_CHECK(error_of(1, copy(0, 0, 4096, true), 4096).empty(), "");
  expect_error("not a multiple of 16", 1, copy(0, 0, 24, true), 4096);
  expect_error("not 16-byte aligned", 1, copy(8, 0, 16, true), 4096);
  expect_error("not 16-byte aligned", 1, copy(0, 8, 16, true), 4096);
  expect_error("outside shared memory", 1, copy(16, 0, 4096, true), 4096);
  // It is an error if a block ends before its copy has landed. That shows if the copy is late.
  int reported = 0;
  for_seeds(
      20, [&](const std::string&) { reported += !error_of(1, copy(0, 0, 64, false), 64).empty(); });
  ROSA_CHECK(reported > 0, "a copy that outlives its block");
}

// ---- wgmma ----------------------------------------------------------------------------------

enum class WgmmaMistake {
  kNone,
  kNoFence,
  kNoCommit,
  kNoWait,
  kWaitTooFew,
  kReadsEarly,
  kWritesEarly,
  kRefillsBeforeWait,
  kWrongSwizzle,
  kMissingBarrier,
};

// Multiplies (64, k) by (columns, k)^T. Blocks of 64 of k pass through two stages of shared memory.
// With some mistakes, the wgmmas of one stage are under way while the other stage is filled.
template <class T, int kColumns>
bool wgmma_is_right(WgmmaMistake mistake) {
  constexpr int kBlocks = 3, kK = 64 * kBlocks;
  constexpr int kStageBytes = (64 + kColumns) * 128;
  const Operands<T> operands(64, kColumns, kK, 3);
  std::vector<float> out(64 * kColumns);
  run(
      128,
      [&] {
        ROSA_DYNAMIC_SHARED(shared);
        const int thread = static_cast<int>(threadIdx.x);
        const auto fill = [&](int block) {
          unsigned char* stage = shared + block % 2 * kStageBytes;
          for (int i = thread; i < (64 + kColumns) * 64; i += 128) {
            const int row = i / 64, k = i % 64;
            const T value = row < 64
                                ? operands.a[static_cast<size_t>(row * kK + block * 64 + k)]
                                : operands.b[static_cast<size_t>((row - 64) * kK + block * 64 + k)];
            const int swizzle = mistake == WgmmaMistake::kWrongSwizzle ? row / 2 % 8 : row % 8;
            *reinterpret_cast<T*>(stage + row * 128 + (k / 8 ^ swizzle) * 16 + k % 8 * 2) = value;
          }
          cuda::fence_proxy_async();
        };
        float sums[kColumns / 2];
        for (float& sum : sums) sum = 0;
        fill(0);
        for (int block = 0; block < kBlocks; ++block) {
          if (mistake != WgmmaMistake::kMissingBarrier) __syncthreads();
          const unsigned char* stage = shared + block % 2 * kStageBytes;
          if (mistake != WgmmaMistake::kNoFence) cuda::wgmma_fence();
          for (int step = 0; step < 4; ++step) {
            const uint64_t a = cuda::swizzled_descriptor(stage + step * 32);
            const uint64_t b = cuda::swizzled_descriptor(stage + 64 * 128 + step * 32);
            const bool accumulate = block > 0 || step > 0;
            if constexpr (kColumns == 256) {
              cuda::wgmma_64x256x16<T>(sums, a, b, accumulate);
            } else {
              cuda::wgmma_64x128x16<T>(sums, a, b, accumulate);
            }
          }
          if (mistake != WgmmaMistake::kNoCommit) cuda::wgmma_commit();
          if (mistake == WgmmaMistake::kReadsEarly) out[0] = sums[0];
          if (mistake == WgmmaMistake::kWritesEarly) sums[1] += 1;
          // The wgmmas of the previous block have read the other stage.
          if (mistake == WgmmaMistake::kRefillsBeforeWait) {
            if (block + 1 < kBlocks) fill(block + 1);
            cuda::wgmma_wait<1>();
          } else if (mistake == WgmmaMistake::kWaitTooFew) {
            cuda::wgmma_wait<2>();
            __syncthreads();
            if (block + 1 < kBlocks) fill(block + 1);
          } else {
            if (mistake != WgmmaMistake::kNoWait) cuda::wgmma_wait<0>();
            __syncthreads();
            if (block + 1 < kBlocks) fill(block + 1);
          }
        }
        if (mistake == WgmmaMistake::kRefillsBeforeWait || mistake == WgmmaMistake::kWaitTooFew) {
          cuda::wgmma_wait<0>();
        }
        for (int i = 0; i < kColumns / 2; ++i) {
          const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
          const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
          out[static_cast<size_t>(row * kColumns + column)] = sums[i];
        }
      },
      2 * kStageBytes);
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      if (out[static_cast<size_t>(row * kColumns + column)] != operands.product(row, column)) {
        return false;
      }
    }
  }
  return true;
}

void test_wgmma() {
  for_seeds(4, [](const std::string& context) {
    ROSA_CHECK((wgmma_is_right<Bf16, 128>(WgmmaMistake::kNone)), context);
    ROSA_CHECK((wgmma_is_right<Bf16, 256>(WgmmaMistake::kNone)), context);
    ROSA_CHECK((wgmma_is_right<Half, 128>(WgmmaMistake::kNone)), context);
    ROSA_CHECK((wgmma_is_right<Half, 256>(WgmmaMistake::kNone)), context);
  });
  constexpr int kSeeds = 12;
  if (kSanitizer != Sanitizer::kThread) {
    for (const WgmmaMistake mistake :
         {WgmmaMistake::kNoFence, WgmmaMistake::kNoCommit, WgmmaMistake::kNoWait,
          WgmmaMistake::kWaitTooFew, WgmmaMistake::kWritesEarly, WgmmaMistake::kRefillsBeforeWait,
          WgmmaMistake::kWrongSwizzle, WgmmaMistake::kMissingBarrier}) {
      const int count = passes(kSeeds, [=] { return wgmma_is_right<Bf16, 128>(mistake); });
      ROSA_CHECK(count < kSeeds / 2,
                 std::to_string(static_cast<int>(mistake)) + ": " + std::to_string(count));
    }
  }
}

void test_misuse_of_wgmma() {
  const auto multiply = [](auto change) {
    return [=] {
      ROSA_DYNAMIC_SHARED(shared);
      float sums[64] = {};
      uint64_t a = cuda::swizzled_descriptor(shared);
      uint64_t b = cuda::swizzled_descriptor(shared + 8192);
      change(shared, &a, &b);
      cuda::wgmma_fence();
      cuda::wgmma_64x128x16<Bf16>(sums, a, b, false);
      cuda::wgmma_commit();
      cuda::wgmma_wait<0>();
    };
  };
  constexpr int64_t kBytes = 192 * 128;
  using Address = unsigned char*;
  const auto nothing = [](Address, uint64_t*, uint64_t*) {};
  ROSA_CHECK(error_of(128, multiply(nothing), kBytes).empty(), "");
  expect_error("fewer than four warps", 96, multiply(nothing), kBytes);
  expect_error("b reaches beyond", 128, multiply(nothing), kBytes - 16);
  expect_error("no 128-byte swizzle", 128,
               multiply([](Address, uint64_t* a, uint64_t*) { *a &= ~(uint64_t{3} << 62); }),
               kBytes);
  expect_error("base offset", 128,
               multiply([](Address, uint64_t*, uint64_t* b) { *b |= uint64_t{1} << 49; }), kBytes);
  expect_error("group of eight lines", 128, multiply([](Address shared, uint64_t* a, uint64_t*) {
                 *a = cuda::swizzled_descriptor(shared + 512);
               }),
               kBytes);
  expect_error("differ between lanes", 128, multiply([](Address shared, uint64_t* a, uint64_t*) {
                 if (threadIdx.x % 32 == 9) *a = cuda::swizzled_descriptor(shared + 1024);
               }),
               kBytes);
  expect_error("not shared memory", 128,
               multiply([](Address, uint64_t* a, uint64_t*) { *a = cuda::swizzled_descriptor(a); }),
               kBytes);
  // One warp of the warpgroup issues no wgmma.
  for_seeds(4, [&](const std::string& context) {
    const std::string error = error_of(
        128,
        [&] {
          if (threadIdx.x < 96) multiply(nothing)();
        },
        kBytes);
    ROSA_CHECK(error.find("issued 1 and 0 wgmmas") != std::string::npos, context + error);
  });
}

// Accumulators hold NaN until the wait for their wgmma.
void test_accumulators_in_flight() {
  for_seeds(6, [](const std::string& context) {
    run(
        128,
        [&] {
          ROSA_DYNAMIC_SHARED(shared);
          for (unsigned i = threadIdx.x; i < 192 * 64; i += 128) {
            reinterpret_cast<uint16_t*>(shared)[i] = 0;
          }
          __syncthreads();
          float first[64], second[64];
          for (float& x : first) x = 3;
          for (float& x : second) x = 4;
          const uint64_t a = cuda::swizzled_descriptor(shared);
          const uint64_t b = cuda::swizzled_descriptor(shared + 8192);
          cuda::wgmma_fence();
          cuda::wgmma_64x128x16<Bf16>(first, a, b, true);
          cuda::wgmma_commit();
          cuda::wgmma_64x128x16<Bf16>(second, a, b, true);
          cuda::wgmma_commit();
          ROSA_CHECK(std::isnan(first[5]) && std::isnan(second[63]), context);
          cuda::wgmma_wait<1>();
          ROSA_CHECK(first[5] == 3 && std::isnan(second[0]), context);
          cuda::wgmma_wait<0>();
          ROSA_CHECK(second[0] == 4, context);
        },
        192 * 128);
  });
}

// ---- launches that may begin early ----------------------------------------------------------

void test_early_launch() {
  const auto launch = [](unsigned waiting) {
    simt::launch(
        dim3(2), dim3(64), 0,
        [=] {
          cuda::let_next_kernel_begin();
          if (threadIdx.x < waiting) cuda::wait_for_kernel_ahead();
        },
        true);
  };
  launch(64);
  try {
    launch(63);
    ROSA_CHECK(false, "one thread does not wait");
  } catch (const simt::Error& error) {
    ROSA_CHECK(std::string(error.what()).find("thread (63, 0, 0)") != std::string::npos,
               error.what());
  }
}

// ---- what only ThreadSanitizer sees ---------------------------------------------------------

int pipeline_with(Mistake mistake) {
  simt::set_seed(2);
  return pipeline_is_right(mistake);
}
int bulk_pipeline_with(BulkMistake mistake) {
  simt::set_seed(2);
  return bulk_pipeline_is_right(mistake);
}

const Misdeed kMisdeeds[] = {
    {"cp.async: no barrier", Sanitizer::kThread, [] { return pipeline_with(Mistake::kNoBarrier); }},
    {"cp.async: early refill", Sanitizer::kThread,
     [] { return pipeline_with(Mistake::kEarlyRefill); }},
    {"bulk copy: full not awaited", Sanitizer::kThread,
     [] { return bulk_pipeline_with(BulkMistake::kNoFullWait); }},
    {"bulk copy: empty not awaited", Sanitizer::kThread,
     [] { return bulk_pipeline_with(BulkMistake::kNoEmptyWait); }},
    {"wgmma: no barrier", Sanitizer::kThread,
     [] { return int{wgmma_is_right<Bf16, 128>(WgmmaMistake::kMissingBarrier)}; }},
};

}  // namespace
}  // namespace rosa::test

int main(int argc, char** argv) {
  using namespace rosa::test;
  if (argc > 1) return commit(kMisdeeds, argv[1]);
  test_conversions<Bf16>();
  test_conversions<Half>();
  test_load_matrix();
  test_mma<Bf16>();
  test_mma<Half>();
  test_copy_async();
  test_named_barriers();
  test_bulk_copies();
  test_wgmma();
  test_misuse_of_wgmma();
  test_accumulators_in_flight();
  test_early_launch();
  expect_caught(kMisdeeds, argv[0]);
  return exit_status();
}
