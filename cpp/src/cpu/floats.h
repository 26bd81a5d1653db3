// Conversions of single elements between the storage types and their accumulators.
//
// Everything here has internal linkage, because files compiled for AVX-512 include this header too.
// The linker could keep the AVX-512 version of a shared inline function, which would crash an older
// machine.
#pragma once

#include <cstdint>
#include <cstring>

namespace rosa::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
// The type in which products of T are summed: float, or double for double.
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

namespace {

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x0400u) return bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
  // Subnormal: magnitude * 2^-24, exact in float.
  const float value = static_cast<float>(magnitude) * 0x1p-24f;
  return sign ? -value : value;
}

// Narrow<T>::from(x) is x rounded to T, to nearest, ties to even.
template <class T>
struct Narrow;
template <>
struct Narrow<float> {
  static float from(float x) { return x; }
  static float from(double x) { return static_cast<float>(x); }
};
template <>
struct Narrow<double> {
  static double from(double x) { return x; }
};
template <>
struct Narrow<BFloat16> {
  static BFloat16 from(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x0040u)};
    return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
  }
};
template <>
struct Narrow<Float16> {
  static Float16 from(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // >= 65520
    if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds at 2^-24, ties to even
      const float shifted = bit_cast<float>(magnitude) + 0.5f;
      return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u))};
    }
    const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23);
    return {static_cast<uint16_t>(sign | rounded >> 13)};
  }
};

}  // namespace
}  // namespace rosa::cpu
