// The number formats, written independently of the library's conversions. This file uses arithmetic
// on a wide type, and the library uses bit tricks. So the two cannot share a mistake.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "rosa/views.h"

namespace rosa::test {

// The oracle's type. It has 64 significant bits or more on the platforms that matter, so its
// rounding is negligible beside that of float64. If long double is plain double, the tolerance
// still covers the rounding.
using Wide = long double;

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};

constexpr const char* name(DType dtype) {
  constexpr const char* names[] = {"float32", "bfloat16", "float16", "float64"};
  return names[static_cast<int>(dtype)];
}

struct Format {
  int precision;  // significant bits, including the implicit one
  int min_exponent;
  int max_exponent;
};

constexpr Format format_of(DType dtype) {
  constexpr Format formats[] = {{24, -126, 127}, {8, -126, 127}, {11, -14, 15}, {53, -1022, 1023}};
  return formats[static_cast<int>(dtype)];
}

// The nearest value of `dtype`, with ties to even, subnormals and overflow.
inline double round_to(DType dtype, Wide x) {
  if (dtype == DType::kFloat64) return static_cast<double>(x);
  if (dtype == DType::kFloat32) return static_cast<float>(x);
  if (x == 0 || !std::isfinite(x)) return static_cast<double>(x);
  const Format format = format_of(dtype);
  int exponent;
  std::frexp(x, &exponent);  // |x| = f * 2^exponent, f in [0.5, 1)
  const int ulp = std::max(exponent - format.precision, format.min_exponent - format.precision + 1);
  const Wide rounded = std::ldexp(std::nearbyint(std::ldexp(x, -ulp)), ulp);
  const bool overflow = std::fabs(rounded) >= std::ldexp(Wide{1}, format.max_exponent + 1);
  return static_cast<double>(overflow ? std::copysign(std::numeric_limits<Wide>::infinity(), x)
                                      : rounded);
}

template <typename T>
T read_as(const char* at) {
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

inline double load(DType dtype, const char* at) {
  if (dtype == DType::kFloat64) return read_as<double>(at);
  if (dtype == DType::kFloat32) return read_as<float>(at);
  const int bits = read_as<uint16_t>(at);
  const int mantissa_bits = format_of(dtype).precision - 1;
  const int bias = format_of(dtype).max_exponent;
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const int exponent = (bits & 0x7fff) >> mantissa_bits;
  double magnitude;
  if (exponent == 2 * bias + 1) {
    magnitude = mantissa ? std::numeric_limits<double>::quiet_NaN()
                         : std::numeric_limits<double>::infinity();
  } else if (exponent == 0) {
    magnitude = std::ldexp(mantissa, 1 - bias - mantissa_bits);
  } else {
    magnitude = std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
  }
  return bits & 0x8000 ? -magnitude : magnitude;
}

inline void store(DType dtype, char* at, double value) {
  const double x = round_to(dtype, value);
  if (dtype == DType::kFloat64) {
    std::memcpy(at, &x, sizeof x);
    return;
  }
  if (dtype == DType::kFloat32) {
    const float narrow = static_cast<float>(x);
    std::memcpy(at, &narrow, sizeof narrow);
    return;
  }
  const Format format = format_of(dtype);
  const int mantissa_bits = format.precision - 1;
  int bits;
  if (std::isnan(x)) {
    bits = 0x7fff;
  } else if (std::isinf(x)) {
    bits = (2 * format.max_exponent + 1) << mantissa_bits;
  } else if (std::fabs(x) < std::ldexp(1.0, format.min_exponent)) {
    bits = static_cast<int>(std::ldexp(std::fabs(x), mantissa_bits - format.min_exponent));
  } else {
    const int exponent = std::ilogb(x);
    const double mantissa = std::ldexp(std::fabs(x), mantissa_bits - exponent);
    // The implicit bit carries into the exponent field: + (exponent + bias - 1), not + bias.
    bits = static_cast<int>(mantissa) + ((exponent + format.max_exponent - 1) << mantissa_bits);
  }
  const uint16_t narrow = static_cast<uint16_t>(bits | (std::signbit(x) ? 0x8000 : 0));
  std::memcpy(at, &narrow, sizeof narrow);
}

}  // namespace rosa::test
