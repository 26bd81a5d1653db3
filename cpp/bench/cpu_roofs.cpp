// Measures the limits of this machine's cores, to compare a kernel's speed with. There are two
// limits: fused multiply-adds from registers, and multiply-adds on rows gathered from the
// second-level cache.
//
//   cpu_roofs [THREADS]     prints one line of JSON: the best of several rounds
//
// It is compiled for the instruction set whose vectors hold ROSA_LANES floats. The gather has the
// access pattern of spmm, without its bookkeeping.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/isa/simd.h"
#include "cpu/parallel_for.h"

namespace {

using rosa::cpu::load;
using rosa::cpu::parallel_for;
using rosa::cpu::store;
using V = rosa::cpu::Vec<float, ROSA_LANES>;
constexpr int kRounds = 15;
constexpr int kBlock = 32;  // tokens of a panel row, 128 bytes

// The best time of several rounds of `body(worker)`, in seconds.
template <class Body>
double best_seconds(int threads, const Body& body) {
  double best = 1e30;
  for (int round = 0; round < kRounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    parallel_for(threads, body);
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    best = std::min(best, taken.count());
  }
  return best;
}

double fma_gflops(int threads) {
  constexpr int kChains = 12;  // two pipes of latency 4 need 8; a few more hide the loop
  constexpr int64_t kSteps = 2'000'000;
  std::vector<float> sink(static_cast<size_t>(threads) * 64);
  const double seconds = best_seconds(threads, [&](int worker) {
    V sums[kChains];
    for (int c = 0; c < kChains; ++c) sums[c] = V{} + 0.001f * static_cast<float>(c);
    const V factor = V{} + 0.5f, term = V{} + 0.25f;
    for (int64_t s = 0; s < kSteps; ++s)
      for (int c = 0; c < kChains; ++c) sums[c] = sums[c] * factor + term;
    for (int c = 1; c < kChains; ++c) sums[0] += sums[c];
    store<ROSA_LANES>(&sink[static_cast<size_t>(worker) * 64], sums[0]);
  });
  return 2.0 * ROSA_LANES * kChains * kSteps * threads / seconds / 1e9;
}

// Reads rows of kVectors vectors at random from a panel of `panel_bytes` per thread. Returns GB/s.
template <int kVectors>
double gather_gbytes(int threads, int64_t panel_bytes) {
  constexpr int64_t kWidth = kVectors * ROSA_LANES;
  constexpr int64_t kGathers = 400'000;
  constexpr int kUnroll = 8 / kVectors > 1 ? 8 / kVectors : 1;
  const int64_t rows = panel_bytes / (kWidth * 4);
  std::vector<int32_t> order(1 << 14);
  uint32_t state = 1;
  for (int32_t& row : order) {
    state = state * 1664525u + 1013904223u;
    row = static_cast<int32_t>((state >> 8) % rows);
  }
  // Rows ascend within runs of 64, like the columns of a CSR row. The hardware profits from this
  // order.
  for (auto run = order.begin(); run != order.end(); run += 64) std::sort(run, run + 64);
  struct alignas(64) Line {
    float floats[16];
  };
  std::vector<std::vector<Line>> panels(static_cast<size_t>(threads));
  for (auto& panel : panels) panel.assign(static_cast<size_t>(rows * kWidth / 16), Line{});
  std::vector<float> sink(static_cast<size_t>(threads) * 64);
  const double seconds = best_seconds(threads, [&](int worker) {
    const float* panel = panels[static_cast<size_t>(worker)].data()->floats;
    V sums[kUnroll][kVectors] = {};
    const V factor = V{} + 0.5f;
    for (int64_t g = 0; g < kGathers; g += kUnroll)
      for (int u = 0; u < kUnroll; ++u) {
        const float* row = panel + order[(g + u) & (order.size() - 1)] * kWidth;
        for (int v = 0; v < kVectors; ++v)
          sums[u][v] += factor * load<ROSA_LANES>(row + v * ROSA_LANES);
      }
    V sum = V{};
    for (int u = 0; u < kUnroll; ++u)
      for (int v = 0; v < kVectors; ++v) sum += sums[u][v];
    store<ROSA_LANES>(&sink[static_cast<size_t>(worker) * 64], sum);
  });
  return static_cast<double>(kGathers) * kWidth * 4 * threads / seconds / 1e9;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  std::printf("{\"lanes\": %d, \"threads\": %d, \"fma_gflops\": %.1f", ROSA_LANES, threads,
              fma_gflops(threads));
  for (int panel_kib : {16, 256, 512, 1024, 2048})
    std::printf(", \"gather_%dKiB_gbytes\": %.1f", panel_kib,
                gather_gbytes<kBlock / ROSA_LANES>(threads, panel_kib * 1024));
  std::printf("}\n");
}
