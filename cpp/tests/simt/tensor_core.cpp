// Matrix fragments and products, in the layouts of the PTX ISA. Products of 16-bit elements are
// exact in float32. Sums are taken in float32, in the order of the inner index.
#include <cstring>
#include <utility>

#include "cuda/numeric.h"
#include "simt/ptx.h"
#include "simt/state.h"

namespace rosa::simt {
namespace {

using cuda::Bf16;
using cuda::Half;

float element(uint16_t bits, bool bf16) {
  return bf16 ? cuda::to_float(Bf16{bits}) : cuda::to_float(Half{bits});
}

template <class Lane>
Lane& lane_of(void* const (&exchange)[32], int lane) {
  return *static_cast<Lane*>(exchange[lane]);
}

}  // namespace

// ---- ldmatrix -------------------------------------------------------------------------------

void load_matrix_x4(uint32_t* words, const void* row, bool transposed, Where where) {
  struct Lane {
    const uint16_t* row;
    uint32_t* words;
  };
  uint32_t address = 0;
  if (!here().shared.find(row, 16, &address)) {
    here().fail(where, "ldmatrix of a row outside shared memory");
  }
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    here().fail(where, "ldmatrix of a row that is not 16-byte aligned");
  }
  tsan::read(row, 16);
  Lane mine{static_cast<const uint16_t*>(row), words};
  const auto rows = [](void* const(&exchange)[32], uint32_t) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int q = 0; q < 4; ++q) {
        const Lane& from = lane_of<Lane>(exchange, q * 8 + lane / 4);
        std::memcpy(&lane_of<Lane>(exchange, lane).words[q], from.row + lane % 4 * 2, 4);
      }
    }
  };
  const auto columns = [](void* const(&exchange)[32], uint32_t) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int q = 0; q < 4; ++q) {
        const uint32_t low = lane_of<Lane>(exchange, q * 8 + lane % 4 * 2).row[lane / 4];
        const uint32_t high = lane_of<Lane>(exchange, q * 8 + lane % 4 * 2 + 1).row[lane / 4];
        lane_of<Lane>(exchange, lane).words[q] = low | high << 16;
      }
    }
  };
  warp_collective("ldmatrix", kAllLanes, &mine,
                  transposed ? static_cast<Complete>(columns) : static_cast<Complete>(rows), where);
}

// ---- mma.sync -------------------------------------------------------------------------------

namespace {

struct MmaLane {
  float* d;
  const uint32_t *a, *b;
};

// a: element (row, k) is half k % 2 of word row / 8 + k / 8 * 2 of lane row % 8 * 4 + k % 8 / 2.
// b: element (k, column) is half k % 2 of word k / 8 of lane column * 4 + k % 8 / 2.
// d: element (row, column) is register row / 8 * 2 + column % 2 of lane row % 8 * 4 + column / 2.
template <bool kBf16>
void mma(void* const (&exchange)[32], uint32_t) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaLane& from = lane_of<MmaLane>(exchange, lane);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      const auto of = [half](uint32_t word) {
        return element(static_cast<uint16_t>(word >> (16 * half)), kBf16);
      };
      for (int q = 0; q < 4; ++q) {
        a[group + q % 2 * 8][pair + half + q / 2 * 8] = of(from.a[q]);
        d[group + q / 2 * 8][pair + q % 2] = from.d[q];
      }
      for (int q = 0; q < 2; ++q) b[pair + half + q * 8][group] = of(from.b[q]);
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* to = lane_of<MmaLane>(exchange, lane).d;
    for (int q = 0; q < 4; ++q) to[q] = d[lane / 4 + q / 2 * 8][lane % 4 * 2 + q % 2];
  }
}

}  // namespace

void mma_16x8x16(float* d, const uint32_t* a, const uint32_t* b, bool bf16, Where where) {
  MmaLane mine{d, a, b};
  warp_collective("mma", kAllLanes, &mine, bf16 ? mma<true> : mma<false>, where);
}

// ---- wgmma ----------------------------------------------------------------------------------
//
// A warp's share of a wgmma, 16 rows, is executed at a random moment between its issue and the wait
// that covers it. Until that wait, the kernel's accumulators hold a signalling NaN. Arithmetic
// makes quiet NaNs, so an early write shows as well as an early read.

namespace {

constexpr uint32_t kInFlight = 0xFFA0DEADu;

struct WgmmaLane {
  float* d;
  Wgmma wgmma;
  Where where;
};

// A K-major operand with the 128-byte swizzle. It keeps 16 elements of a row in two segments.
struct Operand {
  uint32_t start, stride;
  // Bits 4 to 6 of an address are XORed with bits 7 to 9.
  uint32_t segment(int row, int half) const {
    const uint32_t linear = start + static_cast<uint32_t>(row) / 8 * stride +
                            static_cast<uint32_t>(row) % 8 * 128 + static_cast<uint32_t>(half) * 16;
    return linear ^ (linear >> 7 & 7) << 4;
  }
};

Operand decode(uint64_t descriptor) {
  return {static_cast<uint32_t>(descriptor & 0x3fff) << 4,
          static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4};
}

std::string check_operand(const Block& block, uint64_t descriptor, int rows) {
  if (descriptor >> 62 != 1) return "has no 128-byte swizzle";
  if ((descriptor >> 49 & 7) != 0) return "has a base offset";
  const Operand operand = decode(descriptor);
  if (operand.start % 128 > 96) return "begins in the last 16 columns of its lines";
  if (operand.start / 128 % 8 != 0) return "does not begin with a group of eight lines";
  for (int row = 0; row < rows; row += 8) {
    const uint32_t group =
        operand.start / 1024 * 1024 + static_cast<uint32_t>(row) / 8 * operand.stride;
    if (block.shared.at(group, 1024) == nullptr) return "reaches beyond shared memory";
  }
  return "";
}

// Tells ThreadSanitizer what this warp's share of a wgmma reads.
void reads(const Block& block, const Wgmma& wgmma) {
  if (!tsan::active()) return;
  const auto read = [&](uint64_t descriptor, int first, int rows) {
    const Operand operand = decode(descriptor);
    for (int row = first; row < first + rows; ++row) {
      for (int half = 0; half < 2; ++half) {
        tsan::read(block.shared.at(operand.segment(row, half), 16), 16);
      }
    }
  };
  read(wgmma.a, wgmma.rank * 16, 16);
  read(wgmma.b, 0, wgmma.columns);
}

void load_rows(const Block& block, uint64_t descriptor, int first, int rows, bool bf16,
               float (*to)[16]) {
  const Operand operand = decode(descriptor);
  for (int row = 0; row < rows; ++row) {
    for (int half = 0; half < 2; ++half) {
      uint16_t bits[8];
      std::memcpy(bits, block.shared.at(operand.segment(first + row, half), 16), 16);
      for (int k = 0; k < 8; ++k) to[row][half * 8 + k] = element(bits[k], bf16);
    }
  }
}

// Executes this warp's 16 rows of its oldest wgmma that has not been executed.
void execute_oldest(Block& block, Warp& warp) {
  size_t index = 0;
  while (warp.wgmmas[index].executed) ++index;
  Wgmma& wgmma = warp.wgmmas[index];
  wgmma.executed = true;
  --warp.pending_wgmmas;
  --block.wgmmas;
  Accumulator& sum = warp.accumulators[static_cast<size_t>(wgmma.accumulator)];
  float a[16][16];
  load_rows(block, wgmma.a, wgmma.rank * 16, 16, wgmma.bf16, a);
  for (int column = 0; column < wgmma.columns; ++column) {
    float b[1][16];
    load_rows(block, wgmma.b, column, 1, wgmma.bf16, b);
    for (int row = 0; row < 16; ++row) {
      const int lane = row % 8 * 4 + column % 8 / 2;
      const int at = column / 8 * 4 + row / 8 * 2 + column % 2;
      float& value = sum.values[static_cast<size_t>(lane * sum.count + at)];
      float total = wgmma.accumulate ? value : 0;
      for (int k = 0; k < 16; ++k) total += a[row][k] * b[0][k];
      value = total;
    }
  }
}

bool untouched(const Accumulator& sum) {
  for (const float* registers : sum.registers) {
    for (int i = 0; i < sum.count; ++i) {
      uint32_t bits;
      std::memcpy(&bits, registers + i, 4);
      if (bits != kInFlight) return false;
    }
  }
  return true;
}

void take_registers(Accumulator& sum) {
  sum.values.resize(static_cast<size_t>(32 * sum.count));
  for (int lane = 0; lane < 32; ++lane) {
    float* saved = &sum.values[static_cast<size_t>(lane * sum.count)];
    for (int i = 0; i < sum.count; ++i) {
      std::memcpy(saved + i, sum.registers[lane] + i, 4);
      std::memcpy(sum.registers[lane] + i, &kInFlight, 4);
    }
  }
}

void give_registers(const Accumulator& sum) {
  for (int lane = 0; lane < 32; ++lane) {
    std::memcpy(sum.registers[lane], &sum.values[static_cast<size_t>(lane * sum.count)],
                static_cast<size_t>(sum.count) * 4);
  }
}

Warp& own_warp() { return here().warps[static_cast<size_t>(self().warp)]; }

// Finds the accumulator with these registers, or adds it. From now on its registers are in flight.
size_t accumulator_of(Warp& warp, void* const (&exchange)[32], const WgmmaLane& first) {
  for (size_t i = 0; i < warp.accumulators.size(); ++i) {
    if (warp.accumulators[i].registers[0] == first.d) return i;
  }
  if (!warp.wgmma_fenced) {
    here().fail(first.where, "wgmma on accumulators that no wgmma_fence hands over");
  }
  Accumulator sum{};
  for (int lane = 0; lane < 32; ++lane) {
    sum.registers[lane] = lane_of<WgmmaLane>(exchange, lane).d;
  }
  sum.count = first.wgmma.columns / 2;
  sum.where = first.where;
  take_registers(sum);
  warp.accumulators.push_back(std::move(sum));
  return warp.accumulators.size() - 1;
}

void issue(void* const (&exchange)[32], uint32_t) {
  Block& block = here();
  reads(block, lane_of<WgmmaLane>(exchange, 0).wgmma);
  const tsan::Quiet quiet;
  Warp& warp = own_warp();
  const WgmmaLane& first = lane_of<WgmmaLane>(exchange, 0);
  Wgmma wgmma = first.wgmma;
  for (int lane = 1; lane < 32; ++lane) {
    const Wgmma& other = lane_of<WgmmaLane>(exchange, lane).wgmma;
    if (other.a != wgmma.a || other.b != wgmma.b || other.accumulate != wgmma.accumulate) {
      block.fail(first.where, "wgmma with operands that differ between lanes");
    }
  }
  const size_t accumulator = accumulator_of(warp, exchange, first);
  warp.accumulators[accumulator].last_group = warp.wgmma_group;
  wgmma.accumulator = static_cast<int>(accumulator);
  wgmma.group = warp.wgmma_group;
  warp.wgmmas.push_back(wgmma);
  ++warp.wgmma_count;
  ++warp.pending_wgmmas;
  ++block.wgmmas;
  if (block.random.below(4) < warp.wgmma_eagerness) {
    while (warp.pending_wgmmas > 0) execute_oldest(block, warp);
  }
}

// Drops the accumulators whose last wgmma lies in a group before `done`, and renumbers the others.
void drop_accumulators(Warp& warp, int64_t done) {
  std::vector<Accumulator> kept;
  std::vector<int> number(warp.accumulators.size(), -1);
  for (size_t i = 0; i < warp.accumulators.size(); ++i) {
    if (warp.accumulators[i].last_group < done) continue;
    number[i] = static_cast<int>(kept.size());
    kept.push_back(std::move(warp.accumulators[i]));
  }
  for (Wgmma& wgmma : warp.wgmmas) {
    wgmma.accumulator = number[static_cast<size_t>(wgmma.accumulator)];
  }
  warp.accumulators = std::move(kept);
}

}  // namespace

void wgmma(float* d, int columns, uint64_t a, uint64_t b, bool accumulate, bool bf16, Where where) {
  Block& block = here();
  const int rank = self().warp % 4;
  if (static_cast<size_t>(self().warp - rank + 4) > block.warps.size()) {
    block.fail(where, "wgmma in a warpgroup of fewer than four warps");
  }
  for (const bool first : {true, false}) {
    const std::string problem = check_operand(block, first ? a : b, first ? 64 : columns);
    if (!problem.empty()) {
      block.fail(where, std::string("wgmma whose ") + (first ? "a " : "b ") + problem);
    }
  }
  WgmmaLane mine{d, {}, where};
  mine.wgmma.columns = columns;
  mine.wgmma.a = a;
  mine.wgmma.b = b;
  mine.wgmma.accumulate = accumulate;
  mine.wgmma.bf16 = bf16;
  mine.wgmma.rank = rank;
  warp_collective("wgmma", kAllLanes, &mine, issue, where);
}

void wgmma_fence(Where where) {
  const Complete complete = [](void* const(&)[32], uint32_t) { own_warp().wgmma_fenced = true; };
  warp_collective("wgmma_fence", kAllLanes, nullptr, complete, where);
}

void wgmma_commit(Where where) {
  const Complete complete = [](void* const(&)[32], uint32_t) { ++own_warp().wgmma_group; };
  warp_collective("wgmma_commit", kAllLanes, nullptr, complete, where);
}

void wgmma_wait(int groups, Where where) {
  struct Lane {
    int groups;
    Where where;
  };
  Lane mine{groups, where};
  const Complete complete = [](void* const(&exchange)[32], uint32_t) {
    Block& block = here();
    Warp& warp = own_warp();
    const Lane& lane = lane_of<Lane>(exchange, 0);
    const int64_t done = warp.wgmma_group - lane.groups;  // earlier groups must be complete
    size_t count = 0;
    for (; count < warp.wgmmas.size() && warp.wgmmas[count].group < done; ++count) {
      while (!warp.wgmmas[count].executed) execute_oldest(block, warp);
    }
    const tsan::Quiet quiet;
    warp.wgmmas.erase(warp.wgmmas.begin(),
                      warp.wgmmas.begin() + static_cast<std::ptrdiff_t>(count));
    for (const Accumulator& sum : warp.accumulators) {
      if (sum.last_group >= done) continue;
      if (!untouched(sum)) {
        block.fail(lane.where, "the accumulators of the wgmma at " + describe(sum.where) +
                                   " were written to before this wait");
      }
      give_registers(sum);
      warp.wgmma_fenced = false;
    }
    drop_accumulators(warp, done);
  };
  // For ThreadSanitizer, a warp's wgmmas read their operands on behalf of all its lanes, until this
  // wait. After it, any lane may signal to others that the operands have been read.
  const Warp& warp = own_warp();
  if (self().lane == 0) {
    for (const Wgmma& wgmma : warp.wgmmas) {
      if (wgmma.group < warp.wgmma_group - groups) reads(here(), wgmma);
    }
  }
  ordering_collective("wgmma_wait", kAllLanes, &mine, complete, where);
}

void advance_wgmma(Block& block, bool forced) {
  const size_t count = block.warps.size();
  size_t index = block.random.below(static_cast<uint32_t>(count));
  while (block.warps[index].pending_wgmmas == 0) index = (index + 1) % count;
  Warp& warp = block.warps[index];
  if (forced || warp.wgmma_eagerness > 0) execute_oldest(block, warp);
}

std::string unfinished_wgmma(const Warp& warp) {
  if (warp.accumulators.empty()) return "";
  return "the thread exits with this wgmma under way";
}

std::string uneven_wgmma(const Block& block) {
  for (size_t i = 0; i < block.warps.size(); ++i) {
    const size_t first = i / 4 * 4;
    if (block.warps[i].wgmma_count != block.warps[first].wgmma_count) {
      return "warps " + std::to_string(first) + " and " + std::to_string(i) + " issued " +
             std::to_string(block.warps[first].wgmma_count) + " and " +
             std::to_string(block.warps[i].wgmma_count) + " wgmmas";
    }
  }
  return "";
}

}  // namespace rosa::simt
