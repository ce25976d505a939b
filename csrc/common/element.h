// The types that tensors store and the one they are computed in, without torch or CUDA headers.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/rounding.h"

namespace alrao {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <class T>
struct ComputeType {
  using type = T;
};
template <>
struct ComputeType<BFloat16> {
  using type = float;
};
template <>
struct ComputeType<Float16> {
  using type = float;
};

// What a sum of values of T is kept in: float, or double for double.
template <class T>
using compute_t = typename ComputeType<T>::type;

ALRAO_HOST_DEVICE static inline double widen(double value) { return value; }
ALRAO_HOST_DEVICE static inline float widen(float value) { return value; }
ALRAO_HOST_DEVICE static inline float widen(BFloat16 value) { return bf16_to_float(value.bits); }
ALRAO_HOST_DEVICE static inline float widen(Float16 value) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  return fp16_to_float(value.bits);
#endif
}

ALRAO_HOST_DEVICE static inline void round_to(double value, double& out) { out = value; }
ALRAO_HOST_DEVICE static inline void round_to(float value, float& out) { out = value; }
// To nearest even; on the GPU one instruction in place of six.
ALRAO_HOST_DEVICE static inline void round_to(float value, BFloat16& out) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
  out.bits = float_to_bf16(value);
#endif
}
ALRAO_HOST_DEVICE static inline void round_to(float value, Float16& out) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
  out.bits = float_to_fp16(value);
#endif
}

}  // namespace alrao
