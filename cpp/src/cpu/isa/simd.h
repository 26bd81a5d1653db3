// Short vectors on the vector extension of GCC and Clang. One source serves SSE2, AVX2, AVX-512 and
// NEON.
//
// Everything has internal linkage, for the reason given in floats.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/floats.h"

#if defined(__F16C__) || defined(__AVX512DQ__)
#include <immintrin.h>
#endif

namespace rosa::cpu {
namespace {

template <class T, int N>
struct VecOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
  typedef T unaligned __attribute__((vector_size(N * sizeof(T)), aligned(alignof(T)), may_alias));
};
template <class T, int N>
using Vec = typename VecOf<T, N>::type;

template <int N, class T>
inline Vec<T, N> load(const T* from) {
  return *reinterpret_cast<const typename VecOf<T, N>::unaligned*>(from);
}

template <int N, class T>
inline void store(T* to, Vec<T, N> x) {
  *reinterpret_cast<typename VecOf<T, N>::unaligned*>(to) = x;
}

// Lanes I... of the concatenation of a and b.
template <int... I, class V>
inline V shuffle(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  using Index = decltype(a < b);
  return __builtin_shuffle(a, b, Index{I...});
#endif
}

// ---- eight elements of a storage type, as a vector of its accumulator --------------------------

inline Vec<float, 8> load8(const float* from) { return load<8>(from); }
inline Vec<double, 8> load8(const double* from) { return load<8>(from); }
inline Vec<float, 8> load8(const BFloat16* from) {
  Vec<uint16_t, 8> bits;
  std::memcpy(&bits, from, sizeof(bits));
  const Vec<uint32_t, 8> wide = __builtin_convertvector(bits, Vec<uint32_t, 8>) << 16;
  return reinterpret_cast<Vec<float, 8>>(wide);
}
inline Vec<float, 8> load8(const Float16* from) {
#ifdef __F16C__
  __m128i bits;
  std::memcpy(&bits, from, sizeof(bits));
  return reinterpret_cast<Vec<float, 8>>(_mm256_cvtph_ps(bits));
#else
  Vec<float, 8> x;
  for (int i = 0; i < 8; ++i) x[i] = widen(from[i]);
  return x;
#endif
}

inline void store8(float* to, Vec<float, 8> x) { store<8>(to, x); }
inline void store8(double* to, Vec<double, 8> x) { store<8>(to, x); }
inline void store8(BFloat16* to, Vec<float, 8> x) {
  const Vec<uint32_t, 8> bits = reinterpret_cast<Vec<uint32_t, 8>>(x);
  const Vec<uint32_t, 8> rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const Vec<uint32_t, 8> quiet = bits >> 16 | 0x0040u;
  const Vec<uint32_t, 8> nan = reinterpret_cast<Vec<uint32_t, 8>>(x != x);
  const Vec<uint32_t, 8> chosen = (nan & quiet) | (~nan & rounded);
  const Vec<uint16_t, 8> narrow = __builtin_convertvector(chosen, Vec<uint16_t, 8>);
  std::memcpy(to, &narrow, sizeof(narrow));
}
inline void store8(Float16* to, Vec<float, 8> x) {
#ifdef __F16C__
  const __m128i bits = _mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &bits, sizeof(bits));
#else
  for (int i = 0; i < 8; ++i) to[i] = Narrow<Float16>::from(x[i]);
#endif
}

// ---- rearrangements; all steps but the last stay inside 128-bit lanes --------------------------

// r[i][j] <-> r[j][i]
template <class A>
inline void transpose8(Vec<A, 8> (&r)[8]) {
  Vec<A, 8> s[8];
  for (int i = 0; i < 8; i += 2) {
    s[i] = shuffle<0, 8, 1, 9, 4, 12, 5, 13>(r[i], r[i + 1]);
    s[i + 1] = shuffle<2, 10, 3, 11, 6, 14, 7, 15>(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = shuffle<0, 1, 8, 9, 4, 5, 12, 13>(s[i], s[i + 2]);
    r[i + 1] = shuffle<2, 3, 10, 11, 6, 7, 14, 15>(s[i], s[i + 2]);
    r[i + 2] = shuffle<0, 1, 8, 9, 4, 5, 12, 13>(s[i + 1], s[i + 3]);
    r[i + 3] = shuffle<2, 3, 10, 11, 6, 7, 14, 15>(s[i + 1], s[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    s[i] = shuffle<0, 1, 2, 3, 8, 9, 10, 11>(r[i], r[i + 4]);
    s[i + 4] = shuffle<4, 5, 6, 7, 12, 13, 14, 15>(r[i], r[i + 4]);
  }
  for (int i = 0; i < 8; ++i) r[i] = s[i];
}

// The sums of pairs of neighbouring lanes of a and b, interleaved per 128 bits.
template <class A>
inline Vec<A, 8> add_pairs(Vec<A, 8> a, Vec<A, 8> b) {
  return shuffle<0, 2, 8, 10, 4, 6, 12, 14>(a, b) + shuffle<1, 3, 9, 11, 5, 7, 13, 15>(a, b);
}
inline Vec<float, 16> add_pairs(Vec<float, 16> a, Vec<float, 16> b) {
  return shuffle<0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30>(a, b) +
         shuffle<1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31>(a, b);
}

// The sums of the two halves of a, then of b.
template <class A>
inline Vec<A, 8> add_halves(Vec<A, 8> a, Vec<A, 8> b) {
  return shuffle<0, 1, 2, 3, 8, 9, 10, 11>(a, b) + shuffle<4, 5, 6, 7, 12, 13, 14, 15>(a, b);
}
inline Vec<float, 16> add_halves(Vec<float, 16> a, Vec<float, 16> b) {
  return shuffle<0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23>(a, b) +
         shuffle<8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31>(a, b);
}
// The sums of neighbouring quarters of a, then of b.
inline Vec<float, 16> add_quarters(Vec<float, 16> a, Vec<float, 16> b) {
  return shuffle<0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27>(a, b) +
         shuffle<4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31>(a, b);
}

// Lane i of the result is the sum of all lanes of x[i].
template <class A>
inline Vec<A, 8> sum_lanes(const Vec<A, 8> (&x)[8]) {
  return add_halves<A>(add_pairs<A>(add_pairs<A>(x[0], x[1]), add_pairs<A>(x[2], x[3])),
                       add_pairs<A>(add_pairs<A>(x[4], x[5]), add_pairs<A>(x[6], x[7])));
}
// The same for four vectors. Lanes 4 to 7 repeat lanes 0 to 3.
template <class A>
inline Vec<A, 8> sum_lanes(const Vec<A, 8> (&x)[4]) {
  const Vec<A, 8> four = add_pairs<A>(add_pairs<A>(x[0], x[1]), add_pairs<A>(x[2], x[3]));
  return add_halves<A>(four, four);
}
inline Vec<float, 16> sum_lanes(const Vec<float, 16> (&x)[16]) {
  Vec<float, 16> four[4];
  for (int i = 0; i < 4; ++i)
    four[i] = add_pairs(add_pairs(x[4 * i], x[4 * i + 1]), add_pairs(x[4 * i + 2], x[4 * i + 3]));
  return add_quarters(add_halves(four[0], four[1]), add_halves(four[2], four[3]));
}

// The sum of the two halves.
inline Vec<float, 8> fold(Vec<float, 8> x) { return x; }
inline Vec<double, 8> fold(Vec<double, 8> x) { return x; }
inline Vec<float, 8> fold(Vec<float, 16> x) {
#ifdef __AVX512DQ__
  const __m512 wide = reinterpret_cast<__m512>(x);
  return reinterpret_cast<Vec<float, 8>>(_mm512_castps512_ps256(wide)) +
         reinterpret_cast<Vec<float, 8>>(_mm512_extractf32x8_ps(wide, 1));
#else
  Vec<float, 8> half[2];
  std::memcpy(half, &x, sizeof(x));
  return half[0] + half[1];
#endif
}

}  // namespace
}  // namespace rosa::cpu
