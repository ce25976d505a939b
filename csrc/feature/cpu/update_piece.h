// How a feature optimizer goes over a piece of one parameter, whatever the optimizer: which entries
// share a rate, and storage of other dtypes than the arithmetic's. Included by *_kernel.cpp only.
//
// `Update` is the optimizer: update.uniform(arrays, rate, n) and update.varying(arrays, rates, n)
// take the first n entries of `Arrays`, with one rate or one each, in the arithmetic's type.
// Update::kUsual says whether most trainings make it at each step.
#pragma once

#include <cstdint>

#include "common/rounding.h"
#include "feature/cpu/random_bits.h"
#include "feature/master.h"
#include "feature/optimizer.h"
#include "feature/record.h"

namespace alrao::cpu::ALRAO_ISA {

// Entries that go through buffers at a time: they stay in the L1 cache.
constexpr int64_t kBlock = kMostBits;
// Entries that are updated before their averages are: they stay in the L1 cache, too.
constexpr int64_t kAveragedBlock = 2048;
// Runs of equal rates shorter than this are expanded into a buffer, one rate per entry.
constexpr int64_t kShortRun = 16;

// How a new value goes to memory.
enum class Store {
  kNearest,
  kStochastic,  // by random bits
  kMaster,      // to the master as it is, and to the parameter rounded to nearest
};

// Neighbouring entries of one parameter. The arithmetic's type stores itself.
template <class Param, class State, int STATES, Store STORE = Store::kNearest>
struct Arrays {
  using Acc = compute_t<Param>;

  Param* p;
  const Param* g;
  State* states[STATES > 0 ? STATES : 1];
  float* master;         // of kMaster
  const uint16_t* bits;  // of kStochastic

  Acc value(int64_t i) const {
    if constexpr (STORE == Store::kMaster) return master_value(master[i], p[i]);
    return widen(p[i]);
  }

  void store(int64_t i, Acc value) const {
    if constexpr (STORE == Store::kStochastic) {
      round_stochastic(value, bits[i], p[i]);
    } else {
      round_to(value, p[i]);
    }
    if constexpr (STORE == Store::kMaster) master[i] = value;
  }

  void advance(int64_t n) {
    p += n;
    g += n;
    for (int k = 0; k < STATES; ++k) states[k] += n;
    if constexpr (STORE == Store::kMaster) master += n;
    if constexpr (STORE == Store::kStochastic) bits += n;
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

static void store_stochastic(const FeatureRecord& record, int64_t begin, const float* from,
                             int64_t n) {
  uint16_t bits[kBlock];
  random_bits(record.seed, record.step, begin, n, bits);
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

// Where the next entry is among those that share a rate, and which rate that is.
struct Place {
  int64_t within;
  int64_t feature;

  Place(const FeatureRecord& record, int64_t entry)
      : within(entry % record.inner), feature(entry / record.inner % record.period) {}

  // Over entries that share the rate.
  void advance(const FeatureRecord& record, int64_t n) {
    within += n;
    if (within < record.inner) return;
    within = 0;
    if (++feature == record.period) feature = 0;
  }
};

// n entries from `place` on, which is advanced, and which the arrays start at.
template <class Entries, class Update>
static void update_entries(const FeatureRecord& record, Place& place, int64_t n, Entries arrays,
                           const Update& update) {
  using acc = typename Entries::Acc;
  if (record.period == 1) {
    update.uniform(arrays, rate_of<acc>(record, 0), n);
    return;
  }
  const int64_t inner = record.inner, period = record.period;
  if (inner >= kShortRun) {
    while (n > 0) {
      const int64_t run = smaller(inner - place.within, n);
      update.uniform(arrays, rate_of<acc>(record, place.feature), run);
      arrays.advance(run);
      place.advance(record, run);
      n -= run;
    }
  } else if (inner == 1 && period >= kShortRun && record.rate_dtype == kDtypeOf<acc>) {
    while (n > 0) {
      const int64_t run = smaller(period - place.feature, n);
      update.varying(arrays, static_cast<const acc*>(record.rates) + place.feature, run);
      arrays.advance(run);
      n -= run;
      place.feature += run;
      if (place.feature == period) place.feature = 0;
    }
  } else {
    acc rates[kBlock];
    while (n > 0) {
      const int64_t block = smaller(n, kBlock);
      for (int64_t i = 0; i < block;) {
        const acc rate = rate_of<acc>(record, place.feature);
        const int64_t run = smaller(inner - place.within, block - i);
        for (const int64_t end = i + run; i < end; ++i) rates[i] = rate;
        place.advance(record, run);
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
  if (!record.average || record.average_weight == 0) return;
  acc* const averages = static_cast<acc*>(record.average) + begin;
  const acc weight = static_cast<acc>(record.average_weight);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) averages[i] = averaged(averages[i], values[i], weight);
}

// Entries [begin, end) of a parameter whose arrays are all read and written by the update's own
// loop, `block` of them at a time.
template <class Param, class State, Store STORE, class Update>
static void update_in_place(const FeatureRecord& record, int64_t begin, int64_t end, int64_t block,
                            const Update& update) {
  constexpr int kStates = Update::kStates;
  Place place(record, begin);
  uint16_t bits[STORE == Store::kStochastic ? kBlock : 1];
  for (int64_t i = begin; i < end; i += block) {
    const int64_t n = smaller(block, end - i);
    Arrays<Param, State, kStates, STORE> arrays{};
    arrays.p = static_cast<Param*>(record.param) + i;
    arrays.g = static_cast<const Param*>(record.grad) + i;
    for (int k = 0; k < kStates; ++k) arrays.states[k] = static_cast<State*>(record.states[k]) + i;
    if constexpr (STORE == Store::kMaster) arrays.master = record.master + i;
    if constexpr (STORE == Store::kStochastic) {
      random_bits(record.seed, record.step, i, n, bits);
      arrays.bits = bits;
    }
    update_entries(record, place, n, arrays, update);
    if constexpr (sizeof(Param) > 2)
      average_entries(record, i, static_cast<const Param*>(arrays.p), n);
  }
}

// Entries [begin, end) of a parameter of any storage, a block at a time through buffers.
template <typename acc, class Update>
static void update_in_buffers(const FeatureRecord& record, int64_t begin, int64_t end,
                              const Update& update) {
  constexpr Dtype kAcc = kDtypeOf<acc>;
  constexpr int kStates = Update::kStates;
  acc* const direct_p = record.param_dtype == kAcc ? static_cast<acc*>(record.param)
                        : record.master            ? reinterpret_cast<acc*>(record.master)
                                                   : nullptr;
  Place place(record, begin);
  acc p_buffer[kBlock], g_buffer[kBlock], state_buffers[kStates > 0 ? kStates : 1][kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = smaller(kBlock, end - i);
    Arrays<acc, acc, kStates> arrays{};
    arrays.p = p_buffer;
    arrays.g = g_buffer;
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

    update_entries(record, place, n, arrays, update);
    average_entries(record, i, static_cast<const acc*>(arrays.p), n);

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

// Whether all states that the update has are stored as `dtype`.
template <class Update>
static bool states_are(const FeatureRecord& record, Dtype dtype) {
  for (int k = 0; k < Update::kStates; ++k)
    if (record.state_dtypes[k] != dtype) return false;
  return true;
}

// Entries [begin, end) of the parameter, `begin` a multiple of 8. What is stored as usual is
// updated in place: one loop keeps the memory busy, where one for each array and the buffers would
// not.
template <typename acc, class Update>
static void update_piece(const FeatureRecord& record, int64_t begin, int64_t end,
                         const Update& update) {
  constexpr Dtype kAcc = kDtypeOf<acc>, kHalf = Dtype::kBFloat16;
  const int64_t all = end - begin;
  if (record.param_dtype == kAcc && states_are<Update>(record, kAcc)) {
    const int64_t block = record.average ? kAveragedBlock : all;
    update_in_place<acc, acc, Store::kNearest>(record, begin, end, block, update);
    return;
  }
  // Each is a loop of its own in the library, so that there are only the usual ones.
  if constexpr (sizeof(acc) == 4 && Update::kUsual) {
    if (record.param_dtype == kHalf && !record.average) {
      if (record.master && states_are<Update>(record, kAcc)) {
        update_in_place<BFloat16, acc, Store::kMaster>(record, begin, end, all, update);
        return;
      }
      if (!record.master && states_are<Update>(record, kHalf)) {
        if (record.stochastic) {
          update_in_place<BFloat16, BFloat16, Store::kStochastic>(record, begin, end, kBlock,
                                                                  update);
        } else {
          update_in_place<BFloat16, BFloat16, Store::kNearest>(record, begin, end, all, update);
        }
        return;
      }
    }
  }
  update_in_buffers<acc>(record, begin, end, update);
}

}  // namespace alrao::cpu::ALRAO_ISA
