// Vectors of the width of the instruction set being compiled, for *_kernel.cpp only.
//
// GCC's and Clang's vector extension: the same source gives SSE, AVX2, AVX-512 or NEON, NaN and
// infinity keep their meaning, and lanes never mix, so that what a lane computes does not depend on
// the width.
#pragma once

#include <cstdint>

#ifndef ALRAO_ISA
#error "simd.h is for kernel files, which are compiled once per instruction set"
#endif

#if defined(__AVX512F__)
#define ALRAO_VECTOR_BYTES 64
#elif defined(__AVX__)
#define ALRAO_VECTOR_BYTES 32
#else
#define ALRAO_VECTOR_BYTES 16
#endif

namespace alrao::cpu::ALRAO_ISA {
namespace {

constexpr double kInfinity = __builtin_inf();

#define ALRAO_INLINE inline __attribute__((always_inline))

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vector __attribute__((vector_size(ALRAO_VECTOR_BYTES)));
  typedef int32_t Bits __attribute__((vector_size(ALRAO_VECTOR_BYTES)));
  typedef uint32_t Words __attribute__((vector_size(ALRAO_VECTOR_BYTES)));
  static constexpr int64_t kWidth = ALRAO_VECTOR_BYTES / 4;
};

template <>
struct Simd<double> {
  typedef double Vector __attribute__((vector_size(ALRAO_VECTOR_BYTES)));
  typedef int64_t Bits __attribute__((vector_size(ALRAO_VECTOR_BYTES)));
  typedef uint64_t Words __attribute__((vector_size(ALRAO_VECTOR_BYTES)));
  static constexpr int64_t kWidth = ALRAO_VECTOR_BYTES / 8;
};

template <class T>
using Vector = typename Simd<T>::Vector;

template <class T>
ALRAO_INLINE Vector<T> load(const T* p) {
  Vector<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
ALRAO_INLINE void store(T* p, Vector<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <class T>
ALRAO_INLINE Vector<T> splat(T value) {
  return Vector<T>{} + value;
}

// b where a is NaN.
template <class V>
ALRAO_INLINE V greater(V a, V b) {
  return a > b ? a : b;
}

template <class T>
ALRAO_INLINE T sum_lanes(Vector<T> v) {
  T total = 0;
  for (int64_t i = 0; i < Simd<T>::kWidth; ++i) total += v[i];
  return total;
}

// exp to about 1 ulp. The argument is at most a few; what would be denormal becomes 0, NaN becomes
// 0.
ALRAO_INLINE Vector<float> exp_below(Vector<float> x) {
  typedef Simd<float>::Words Words;
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the bits
  const Vector<float> shifted = x * 1.44269504088896341f + round;
  const Vector<float> k = shifted - round;
  Vector<float> r = x - k * 0.693359375f;
  r = r + k * 2.12194440e-4f;
  Vector<float> p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Vector<float> value = (Vector<float>)((Words)p + ((Words)shifted << 23));
  return x > -87.3f ? value : splat(0.0f);
}

ALRAO_INLINE Vector<double> exp_below(Vector<double> x) {
  typedef Simd<double>::Words Words;
  const double round = 6755399441055744.0;  // 1.5 * 2^52
  const Vector<double> shifted = x * 1.4426950408889634074 + round;
  const Vector<double> k = shifted - round;
  Vector<double> r = x - k * 6.93145751953125e-1;
  r = r - k * 1.42860682030941723212e-6;
  Vector<double> p = splat(1.0 / 6227020800.0);
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * (r * r) + r + 1.0;
  const Vector<double> value = (Vector<double>)((Words)p + ((Words)shifted << 52));
  return x > -708.0 ? value : splat(0.0);
}

// tanh: its series for small arguments, where a difference of exponentials would lose digits.
ALRAO_INLINE Vector<float> tanh_of(Vector<float> x) {
  const Vector<float> size = x < 0.0f ? -x : x;
  const Vector<float> square = x * x;
  Vector<float> p = splat(21844.0f / 6081075.0f);
  p = p * square - 1382.0f / 155925.0f;
  p = p * square + 62.0f / 2835.0f;
  p = p * square - 17.0f / 315.0f;
  p = p * square + 2.0f / 15.0f;
  p = p * square - 1.0f / 3.0f;
  const Vector<float> small = x + x * (square * p);
  const Vector<float> e = exp_below(size * -2.0f);
  const Vector<float> large = (1.0f - e) / (1.0f + e);
  return size < 0.5f ? small : (x < 0.0f ? -large : large);
}

// A series that is exact enough would take as long as the library's.
ALRAO_INLINE Vector<double> tanh_of(Vector<double> x) {
  for (int64_t i = 0; i < Simd<double>::kWidth; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

// log of a positive normal number: 2 atanh((m - 1) / (m + 1)) + e log 2, with sqrt(1/2) <= m <
// sqrt(2).
template <class T, class Bits, int kMantissa, int kTerms>
ALRAO_INLINE Vector<T> log_series(Vector<T> x, Bits half_root, T ln2_high, T ln2_low) {
  const Bits offset = (Bits)x - half_root;
  const Bits exponent = offset >> kMantissa;
  const Vector<T> m = (Vector<T>)((Bits)x - (exponent << kMantissa));
  const Vector<T> e = __builtin_convertvector(exponent, Vector<T>);
  const Vector<T> s = (m - T(1)) / (m + T(1));
  const Vector<T> s2 = s * s;
  Vector<T> p = splat(T(1) / T(2 * kTerms + 1));
  for (int i = kTerms - 1; i >= 1; --i) p = p * s2 + T(1) / T(2 * i + 1);
  // 2 s is the leading term and is added last, the exponent's small part first.
  return (e * ln2_low + (s + s) * (s2 * p)) + ((s + s) + e * ln2_high);
}

ALRAO_INLINE Vector<float> log_positive(Vector<float> x) {
  typedef Simd<float>::Bits Bits;
  return log_series<float, Bits, 23, 5>(x, (Bits)splat(0.70710678f), 0.693359375f, -2.12194440e-4f);
}

ALRAO_INLINE Vector<double> log_positive(Vector<double> x) {
  typedef Simd<double>::Bits Bits;
  return log_series<double, Bits, 52, 11>(x, (Bits)splat(0.70710678118654752440),
                                          6.93145751953125e-1, 1.42860682030941723212e-6);
}

}  // namespace
}  // namespace alrao::cpu::ALRAO_ISA
