// How a feature optimizer goes over a piece of one parameter, whatever the optimizer: which entries
// share a rate, and storage of other dtypes than the arithmetic's. Included by *_kernel.cpp only.
//
// `Update` is the optimizer: update.uniform(arrays, rate, n) and update.varying(arrays, rates, n)
// take n neighbouring entries, with one rate or one each, in the arithmetic's type.
#pragma once

#include <cstdint>

#include "common/rounding.h"
#include "feature/master.h"
#include "feature/optimizer.h"
#include "feature/record.h"

namespace alrao::cpu::ALRAO_ISA {

// Entries that go through buffers at a time: they stay in the L1 cache. A multiple of 8, the
// entries served by one Philox call.
constexpr int64_t kBlock = 512;
// Entries that are updated before their averages are: they stay in the L1 cache, too.
constexpr int64_t kAveragedBlock = 2048;
// Runs of equal rates shorter than this are expanded into a buffer, one rate per entry.
constexpr int64_t kShortRun = 16;

template <typename acc, int STATES>
struct Arrays {
  acc* p;
  const acc* g;
  acc* states[STATES > 0 ? STATES : 1];

  void advance(int64_t n) {
    p += n;
    g += n;
    for (int k = 0; k < STATES; ++k) states[k] += n;
  }
};

template <typename acc>
constexpr Dtype kDtypeOf = sizeof(acc) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename acc>
static void load(acc* to, const void* from, Dtype dtype, int64_t begin, int64_t n) {
  if (dtype == Dtype::kFloat32) {
    const float* x = static_cast<const float*>(from) + begin;
    for (int64_t i = 0; i < n; ++i) to[i] = x[i];
  } else if (dtype == Dtype::kBFloat16) {
    const uint16_t* x = static_cast<const uint16_t*>(from) + begin;
    for (int64_t i = 0; i < n; ++i) to[i] = bf16_to_float(x[i]);
  } else {
    const uint16_t* x = static_cast<const uint16_t*>(from) + begin;
    for (int64_t i = 0; i < n; ++i) to[i] = fp16_to_float(x[i]);
  }
}

template <typename acc>
static void store(void* to, Dtype dtype, int64_t begin, const acc* from, int64_t n) {
  if (dtype == Dtype::kFloat32) {
    float* x = static_cast<float*>(to) + begin;
    for (int64_t i = 0; i < n; ++i) x[i] = static_cast<float>(from[i]);
  } else if (dtype == Dtype::kBFloat16) {
    uint16_t* x = static_cast<uint16_t*>(to) + begin;
    for (int64_t i = 0; i < n; ++i) x[i] = float_to_bf16(static_cast<float>(from[i]));
  } else {
    uint16_t* x = static_cast<uint16_t*>(to) + begin;
    for (int64_t i = 0; i < n; ++i) x[i] = float_to_fp16(static_cast<float>(from[i]));
  }
}

// Takes into n masters what was written into their parameters since the last step.
template <class Param>
static void follow(float* masters, const Param* params, int64_t n) {
  // Nearly always nothing was, and need not be widened.
  uint32_t written = 0;
  for (int64_t i = 0; i < n; ++i) written |= holds_master(masters[i], params[i]) ? 0u : 1u;
  if (written == 0) return;
  for (int64_t i = 0; i < n; ++i) masters[i] = master_value(masters[i], params[i]);
}

// The random bits of entries [begin, begin + n): `begin` a multiple of 8, n at most kBlock. Round
// after round for all counters at once, which vectorises.
static void random_bits(const FeatureRecord& record, int64_t begin, int64_t n, uint32_t* bits) {
  constexpr int64_t kCalls = kBlock / 8;
  const uint64_t first = static_cast<uint64_t>(begin) / 8;
  const uint64_t step = static_cast<uint64_t>(record.step);
  uint32_t c0[kCalls], c1[kCalls], c2[kCalls], c3[kCalls], words[4 * kCalls];
  const int64_t calls = (n + 7) / 8;
  for (int64_t k = 0; k < calls; ++k) {
    const uint64_t block = first + static_cast<uint64_t>(k);
    c0[k] = static_cast<uint32_t>(block);
    c1[k] = static_cast<uint32_t>(block >> 32);
    c2[k] = static_cast<uint32_t>(step);
    c3[k] = static_cast<uint32_t>(step >> 32);
  }
  uint32_t key0 = static_cast<uint32_t>(record.seed);
  uint32_t key1 = static_cast<uint32_t>(record.seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
#pragma omp simd
    for (int64_t k = 0; k < calls; ++k) philox_round(c0[k], c1[k], c2[k], c3[k], key0, key1);
    key0 += kPhiloxKeyStep0;
    key1 += kPhiloxKeyStep1;
  }
  for (int64_t k = 0; k < calls; ++k) {
    words[4 * k] = c0[k];
    words[4 * k + 1] = c1[k];
    words[4 * k + 2] = c2[k];
    words[4 * k + 3] = c3[k];
  }
  for (int64_t k = 0; k < 4 * calls; ++k) {
    bits[2 * k] = words[k] & 0xffffu;
    bits[2 * k + 1] = words[k] >> 16;
  }
}

static void store_stochastic(const FeatureRecord& record, int64_t begin, const float* from,
                             int64_t n) {
  uint32_t bits[kBlock];
  random_bits(record, begin, n, bits);
  uint16_t* x = static_cast<uint16_t*>(record.param) + begin;
  if (record.param_dtype == Dtype::kBFloat16) {
    for (int64_t i = 0; i < n; ++i) x[i] = float_to_bf16_stochastic(from[i], bits[i]);
  } else {
#pragma omp simd  // gcc leaves the loop scalar otherwise
    for (int64_t i = 0; i < n; ++i) x[i] = float_to_fp16_stochastic(from[i], bits[i]);
  }
}

template <typename acc>
static inline acc rate_of(const FeatureRecord& record, int64_t feature) {
  return record.rate_dtype == Dtype::kFloat64
             ? static_cast<acc>(static_cast<const double*>(record.rates)[feature])
             : static_cast<acc>(static_cast<const float*>(record.rates)[feature]);
}

// Entries [begin, begin + n) of the parameter, whose arrays start at `begin`.
template <typename acc, class Update>
static void update_entries(const FeatureRecord& record, int64_t begin, int64_t n,
                           Arrays<acc, Update::kStates> arrays, const Update& update) {
  if (record.period == 1) {
    update.uniform(arrays, rate_of<acc>(record, 0), n);
    return;
  }
  const int64_t inner = record.inner, period = record.period;
  int64_t within = begin % inner;
  int64_t feature = begin / inner % period;
  if (inner >= kShortRun) {
    while (n > 0) {
      const int64_t run = smaller(inner - within, n);
      update.uniform(arrays, rate_of<acc>(record, feature), run);
      arrays.advance(run);
      n -= run;
      within = 0;
      if (++feature == period) feature = 0;
    }
  } else if (inner == 1 && period >= kShortRun && record.rate_dtype == kDtypeOf<acc>) {
    while (n > 0) {
      const int64_t run = smaller(period - feature, n);
      update.varying(arrays, static_cast<const acc*>(record.rates) + feature, run);
      arrays.advance(run);
      n -= run;
      feature = 0;
    }
  } else {
    acc rates[kBlock];
    while (n > 0) {
      const int64_t block = smaller(n, kBlock);
      for (int64_t i = 0; i < block;) {
        const acc rate = rate_of<acc>(record, feature);
        const int64_t end = smaller(i + inner - within, block);
        within += end - i;
        for (; i < end; ++i) rates[i] = rate;
        if (within == inner) {
          within = 0;
          if (++feature == period) feature = 0;
        }
      }
      update.varying(arrays, rates, block);
      arrays.advance(block);
      n -= block;
    }
  }
}

// Takes n new values into the averages from `begin` on, if there are any.
template <typename acc>
static void average_entries(const FeatureRecord& record, int64_t begin, const acc* values,
                            int64_t n) {
  if (!record.average) return;
  acc* const averages = static_cast<acc*>(record.average) + begin;
  const acc weight = static_cast<acc>(record.average_weight);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) averages[i] = averaged(averages[i], values[i], weight);
}

// Entries [begin, end) of the parameter, `begin` a multiple of 8. Arrays of the arithmetic's type
// are updated in place, others a block at a time through buffers.
template <typename acc, class Update>
static void update_piece(const FeatureRecord& record, int64_t begin, int64_t end,
                         const Update& update) {
  constexpr Dtype kAcc = kDtypeOf<acc>;
  constexpr int kStates = Update::kStates;
  acc* const direct_p = record.param_dtype == kAcc ? static_cast<acc*>(record.param)
                        : record.master            ? reinterpret_cast<acc*>(record.master)
                                                   : nullptr;
  bool buffered = record.param_dtype != kAcc;
  for (int k = 0; k < kStates; ++k) buffered |= record.state_dtypes[k] != kAcc;
  if (!buffered) {
    const int64_t block = record.average ? kAveragedBlock : end - begin;
    for (int64_t i = begin; i < end; i += block) {
      const int64_t n = smaller(block, end - i);
      Arrays<acc, kStates> arrays{direct_p + i, static_cast<const acc*>(record.grad) + i, {}};
      for (int k = 0; k < kStates; ++k) arrays.states[k] = static_cast<acc*>(record.states[k]) + i;
      update_entries<acc>(record, i, n, arrays, update);
      average_entries(record, i, direct_p + i, n);
    }
    return;
  }

  acc p_buffer[kBlock], g_buffer[kBlock], state_buffers[kStates > 0 ? kStates : 1][kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = smaller(kBlock, end - i);
    Arrays<acc, kStates> arrays{p_buffer, g_buffer, {}};
    if (direct_p) {
      arrays.p = direct_p + i;
      if constexpr (sizeof(acc) == 4) {
        if (record.master && record.param_dtype == Dtype::kBFloat16) {
          follow(arrays.p, static_cast<const BFloat16*>(record.param) + i, n);
        } else if (record.master) {
          follow(arrays.p, static_cast<const Float16*>(record.param) + i, n);
        }
      }
    } else {
      load(p_buffer, record.param, record.param_dtype, i, n);
    }
    if (record.param_dtype == kAcc) {
      arrays.g = static_cast<const acc*>(record.grad) + i;
    } else {
      load(g_buffer, record.grad, record.param_dtype, i, n);
    }
    for (int k = 0; k < kStates; ++k) {
      if (record.state_dtypes[k] == kAcc) {
        arrays.states[k] = static_cast<acc*>(record.states[k]) + i;
      } else {
        arrays.states[k] = state_buffers[k];
        load(state_buffers[k], record.states[k], record.state_dtypes[k], i, n);
      }
    }

    update_entries<acc>(record, i, n, arrays, update);
    average_entries(record, i, arrays.p, n);

    if constexpr (sizeof(acc) == 4) {
      if (record.stochastic) {
        store_stochastic(record, i, arrays.p, n);
      } else if (record.param_dtype != kAcc) {
        store(record.param, record.param_dtype, i, arrays.p, n);
      }
    }
    for (int k = 0; k < kStates; ++k)
      if (record.state_dtypes[k] != kAcc)
        store(record.states[k], record.state_dtypes[k], i, state_buffers[k], n);
  }
}

}  // namespace alrao::cpu::ALRAO_ISA
