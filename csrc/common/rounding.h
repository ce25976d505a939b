// float32 from and to bf16 and fp16, to nearest and stochastically, and the random bits for the
// latter. The stochastic rules and the order of the bits are those of
// alrao_fast/reference/rounding.py.
//
// Integer arithmetic instead of the hardware's conversions: loops over these functions vectorise on
// every instruction set, and flushed denormals do not change the result. GPUs convert by an
// instruction, to the same bits but for a NaN's payload.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace alrao {

ALRAO_HOST_DEVICE static inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

ALRAO_HOST_DEVICE static inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

ALRAO_HOST_DEVICE static inline float bf16_to_float(uint16_t half) {
  return bits_float(static_cast<uint32_t>(half) << 16);
}

// A NaN that bf16 keeps: rounding up could carry its payload into the sign, and what is dropped
// could be all of it.
ALRAO_HOST_DEVICE static inline uint32_t quiet_nan(uint32_t bits) { return bits | 0x400000u; }

ALRAO_HOST_DEVICE static inline uint16_t float_to_bf16(float value) {
#ifdef __CUDA_ARCH__
  uint16_t half;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
#else
  const uint32_t bits = float_bits(value);
  const uint32_t nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
  return static_cast<uint16_t>((value != value ? quiet_nan(bits) : nearest) >> 16);
#endif
}

ALRAO_HOST_DEVICE static inline uint16_t float_to_bf16_stochastic(float value, uint32_t random16) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = bits + random16;  // that of an infinity carries nothing
  return static_cast<uint16_t>((value != value ? quiet_nan(bits) : rounded) >> 16);
}

ALRAO_HOST_DEVICE static inline float fp16_to_float(uint16_t half) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
#else
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t normal = magnitude + ((127u - 15u) << 23);
  const uint32_t special = normal + ((128u - 16u) << 23);
  // A subnormal becomes the low bits of a float in [2^-14, 2^-13), from which 2^-14 is taken.
  const float subnormal = bits_float(magnitude + (113u << 23)) - bits_float(113u << 23);
  uint32_t bits = magnitude >= (31u << 23) ? special : normal;
  bits = magnitude < (1u << 23) ? float_bits(subnormal) : bits;
  return bits_float(bits | sign);
#endif
}

// The fp16 pattern of a magnitude that needs no rounding of its own any more: `normal` is the
// float's pattern with the rounding added, `subnormal` the number of 2^-24 steps.
ALRAO_HOST_DEVICE static inline uint16_t assemble_fp16(uint32_t bits, uint32_t normal,
                                                       uint32_t subnormal) {
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half = (normal - (112u << 23)) >> 13;
  half = normal >= (143u << 23) ? 0x7c00u : half;
  half = magnitude < (113u << 23) ? subnormal : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

ALRAO_HOST_DEVICE static inline uint16_t float_to_fp16(float value) {
#ifdef __CUDA_ARCH__
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
#else
  const uint32_t bits = float_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  // Adding 2^-1, whose last place is 2^-24, makes the addition do the rounding.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  return assemble_fp16(bits, normal, subnormal);
#endif
}

ALRAO_HOST_DEVICE static inline uint16_t float_to_fp16_stochastic(float value, uint32_t random16) {
  const uint32_t bits = float_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // 13 bits are dropped: up where remainder / 2^13 + random / 2^16 >= 1.
  const uint32_t normal = magnitude + (random16 >> 3);
  // Capped at 2^-14 where it is not used, so that the conversion to an integer is defined.
  const float capped = bits_float(magnitude < (113u << 23) ? magnitude : (113u << 23));
  const float steps = capped * 16777216.0f;
  const int32_t below = static_cast<int32_t>(steps);
  const float remainder = steps - static_cast<float>(below);
  const float raised = remainder + static_cast<float>(random16) * (1.0f / 65536.0f);
  return assemble_fp16(bits, normal, static_cast<uint32_t>(below + static_cast<int32_t>(raised)));
}

// Philox4x32-7 (Salmon et al., SC 2011): rounds turn a counter into four random words, seven of
// them are the fewest whose words pass all of BigCrush; the keys advance between the rounds.
constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhiloxFactor0 = 0xD2511F53u, kPhiloxFactor1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9u, kPhiloxKeyStep1 = 0xBB67AE85u;

ALRAO_HOST_DEVICE static inline void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2,
                                                  uint32_t& c3, uint32_t key0, uint32_t key1) {
  const uint64_t product0 = static_cast<uint64_t>(c0) * kPhiloxFactor0;
  const uint64_t product1 = static_cast<uint64_t>(c2) * kPhiloxFactor1;
  c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
  c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
  c1 = static_cast<uint32_t>(product1);
  c3 = static_cast<uint32_t>(product0);
}

// The random words of entries 8 * block, ..., 8 * block + 7 of a parameter: 16 bits each, low half
// first.
ALRAO_HOST_DEVICE static inline void philox(uint32_t (&words)[4], int64_t block, int64_t step,
                                            uint64_t seed) {
  words[0] = static_cast<uint32_t>(block);
  words[1] = static_cast<uint32_t>(static_cast<uint64_t>(block) >> 32);
  words[2] = static_cast<uint32_t>(step);
  words[3] = static_cast<uint32_t>(static_cast<uint64_t>(step) >> 32);
  uint32_t key0 = static_cast<uint32_t>(seed);
  uint32_t key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    philox_round(words[0], words[1], words[2], words[3], key0, key1);
    key0 += kPhiloxKeyStep0;
    key1 += kPhiloxKeyStep1;
  }
}

}  // namespace alrao
