// Tests the tests' own number formats, by which every kernel is judged.
#include "support.h"

namespace rosa::test {
namespace {

void test_every_half_survives_a_round_trip() {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (uint32_t half = 0; half < 0x10000; ++half) {
      const uint16_t bits = static_cast<uint16_t>(half);
      char in[8], out[8];
      std::memcpy(in, &bits, 2);
      const double value = load(dtype, in);
      store(dtype, out, value);
      ROSA_CHECK(std::isnan(value) || std::memcmp(in, out, 2) == 0, std::to_string(bits));
    }
  }
}

void test_rounding() {
  struct Example {
    DType dtype;
    double x, rounded;
  };
  const double infinity = std::numeric_limits<double>::infinity();
  for (const Example& example : {
           Example{DType::kBFloat16, 1 + 0x1p-8, 1},  // ties go to even
           Example{DType::kBFloat16, 1 + 0x3p-8, 1 + 0x1p-6},
           Example{DType::kBFloat16, 1 + 0x1p-8 + 0x1p-40, 1 + 0x1p-7},
           Example{DType::kFloat16, 65519, 65504},
           Example{DType::kFloat16, 65520, infinity},
           Example{DType::kFloat16, -65520, -infinity},
           Example{DType::kFloat16, 0x1p-25, 0},  // half the smallest subnormal
           Example{DType::kFloat16, 0x3p-25, 0x1p-23},
           Example{DType::kFloat32, 1 + 0x1p-24, 1},
       }) {
    ROSA_CHECK(round_to(example.dtype, example.x) == example.rounded, std::to_string(example.x));
  }
}

}  // namespace
}  // namespace rosa::test

int main() {
  rosa::test::test_every_half_survives_a_round_trip();
  rosa::test::test_rounding();
  return rosa::test::exit_status();
}
