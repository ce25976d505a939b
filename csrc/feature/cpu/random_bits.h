// The random bits of stochastic rounding, many calls of Philox at a time. Included by *_kernel.cpp
// only.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/cpu/simd.h"
#include "common/rounding.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace alrao::cpu::ALRAO_ISA {
namespace {

// Words of Philox in the low halves of 64-bit lanes; what the high halves hold does not count.
using Words = Simd<double>::Words;

// All 64 bits of the low halves' products. The compilers do not find the instruction by themselves.
ALRAO_INLINE Words wide_product(Words a, uint32_t factor) {
#if defined(__AVX512F__)
  // Not _mm512_mul_epu32, of which GCC 12 warns.
  return (Words)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(factor));
#elif defined(__AVX2__)
  return (Words)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(factor));
#elif defined(__SSE2__)
  return (Words)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(factor));
#else
  return (a & 0xffffffffu) * factor;
#endif
}

// Entries that are given bits together, eight by each call.
constexpr int64_t kMostBits = 512;

// bits[i] for entries begin + i, `begin` a multiple of 8, n at most kMostBits: philox of
// rounding.h, but for many calls side by side.
void random_bits(uint64_t seed, int64_t step, int64_t begin, int64_t n, uint16_t* bits) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "a word's low half comes first");
  constexpr int64_t kLanes = sizeof(Words) / sizeof(uint64_t);
  constexpr int64_t kVectors = 4;  // as many hide what a multiplication waits for
  uint64_t halves[2][kMostBits / 8], words[kMostBits / 4];
  Words count{};
  for (int64_t lane = 0; lane < kLanes; ++lane) count[lane] = static_cast<uint64_t>(lane);
  const int64_t calls = (n + 7) / 8;
  for (int64_t call = 0; call < calls; call += kVectors * kLanes) {
    Words c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) {
      c0[v] = count + static_cast<uint64_t>(begin / 8 + call + v * kLanes);
      c1[v] = c0[v] >> 32;
      c2[v] = Words{} + static_cast<uint64_t>(step);
      c3[v] = c2[v] >> 32;
    }
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int64_t v = 0; v < kVectors; ++v) {
        const Words product0 = wide_product(c0[v], kPhiloxFactor0);
        const Words product1 = wide_product(c2[v], kPhiloxFactor1);
        c0[v] = (product1 >> 32) ^ c1[v] ^ key0;
        c2[v] = (product0 >> 32) ^ c3[v] ^ key1;
        c1[v] = product1;
        c3[v] = product0;
      }
      key0 += kPhiloxKeyStep0;
      key1 += kPhiloxKeyStep1;
    }
    for (int64_t v = 0; v < kVectors; ++v) {
      const Words first = (c0[v] & 0xffffffffu) | c1[v] << 32;
      const Words second = (c2[v] & 0xffffffffu) | c3[v] << 32;
      std::memcpy(halves[0] + call + v * kLanes, &first, sizeof first);
      std::memcpy(halves[1] + call + v * kLanes, &second, sizeof second);
    }
  }
#pragma omp simd
  for (int64_t call = 0; call < calls; ++call) {
    words[2 * call] = halves[0][call];
    words[2 * call + 1] = halves[1][call];
  }
  std::memcpy(bits, words, static_cast<size_t>(n) * sizeof *bits);
}

}  // namespace
}  // namespace alrao::cpu::ALRAO_ISA
