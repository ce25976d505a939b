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
ALRAO_HOST_DEVICE static inline float widen(Float16 value) { return fp16_to_float(value.bits); }

ALRAO_HOST_DEVICE static inline void round_to(double value, double& out) { out = value; }
ALRAO_HOST_DEVICE static inline void round_to(float value, float& out) { out = value; }
// To nearest even; on the GPU one instruction in place of six.
ALRAO_HOST_DEVICE static inline void round_to(double value, float& out) {
  out = static_cast<float>(value);
}
ALRAO_HOST_DEVICE static inline void round_to(float value, BFloat16& out) {
  out.bits = float_to_bf16(value);
}
ALRAO_HOST_DEVICE static inline void round_to(float value, Float16& out) {
  out.bits = float_to_fp16(value);
}

// Up in magnitude with the probability of the remainder, by 16 random bits.
ALRAO_HOST_DEVICE static inline void round_stochastic(float value, uint32_t random16,
                                                      BFloat16& out) {
  out.bits = float_to_bf16_stochastic(value, random16);
}
ALRAO_HOST_DEVICE static inline void round_stochastic(float value, uint32_t random16,
                                                      Float16& out) {
  out.bits = float_to_fp16_stochastic(value, random16);
}

// For explicit instantiations.
#define ALRAO_FOR_EVERY_TYPE(INSTANTIATE) \
  INSTANTIATE(float);                     \
  INSTANTIATE(double);                    \
  INSTANTIATE(BFloat16);                  \
  INSTANTIATE(Float16)

}  // namespace alrao
