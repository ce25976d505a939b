// What the kernels of switch_mixture share.
#pragma once

#include <cfloat>
#include <type_traits>

#include "common/cuda/block.cuh"
#include "common/cuda/runtime.cuh"
#include "common/element.h"
#include "mixture/cuda/kernels.h"
#include "mixture/math.h"

namespace alrao::cuda {

// Of a launch: one dimension, and no more blocks than a grid holds.
inline unsigned grid_of(int64_t blocks) {
  constexpr int64_t kMost = 0x7fffffff;
  return static_cast<unsigned>(blocks < kMost ? blocks : kMost);
}

// 16 bytes of a type, or as many elements as asked for: one access where the address is aligned.
template <class T, int kCount = 16 / sizeof(T)>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
};

template <class T, int kCount>
__device__ Pack<T, kCount> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, kCount>*>(p);
}

template <class T, int kCount>
__device__ void store_pack(T* p, const Pack<T, kCount>& pack) {
  *reinterpret_cast<Pack<T, kCount>*>(p) = pack;
}

template <class T, int kCount>
__device__ bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Pack<T, kCount>) == 0;
}

// Elements i ... i + kCount - 1 of an array of n, 0 beyond its end.
template <int kCount, class T>
__device__ void load_some(const T* p, int64_t i, int64_t n, bool aligned, compute_t<T>* out) {
  if (aligned && i + kCount <= n) {
    const auto pack = load_pack<T, kCount>(p + i);
#pragma unroll
    for (int j = 0; j < kCount; ++j) out[j] = widen(pack.values[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) out[j] = i + j < n ? widen(p[i + j]) : compute_t<T>(0);
  }
}

// The same places written.
template <int kCount, class T>
__device__ void store_some(T* p, int64_t i, int64_t n, bool aligned, const Pack<T, kCount>& pack) {
  if (aligned && i + kCount <= n) {
    store_pack(p + i, pack);
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (i + j < n) p[i + j] = pack.values[j];
    }
  }
}

template <class T>
__device__ T lowest() {
  return std::is_same_v<T, double> ? T(-DBL_MAX) : T(-FLT_MAX);
}

template <class T>
__device__ bool is_finite(T value) {
  return value > T(-INFINITY) && value < T(INFINITY);
}

// 0, or NaN for what is not finite.
template <class T>
__device__ T poison(T value) {
  return value * T(0);
}

template <class compute_type>
__device__ compute_type log_posterior_of(const MixturePosterior& posterior, int64_t clone) {
  return posterior.is_double
             ? static_cast<compute_type>(static_cast<const double*>(posterior.values)[clone])
             : static_cast<compute_type>(static_cast<const float*>(posterior.values)[clone]);
}

// The largest logit and the first class that has it.
template <class T>
struct Peak {
  T value;
  int32_t place;
  int32_t unused;  // whole words for the shuffles

  static __device__ Peak none() { return {lowest<T>(), 0x7fffffff, 0}; }
  __device__ void take(T logit, int32_t at) {
    if (logit > value || (logit == value && at < place)) *this = {logit, at, 0};
  }
};

struct Higher {
  template <class T>
  __device__ Peak<T> operator()(Peak<T> a, Peak<T> b) const {
    a.take(b.value, b.place);
    return a;
  }
};

// exp(x) for a quarter of the instructions: as far from it as x is rounded, x 2^-24, and 2^-22.
__device__ inline float fast_exp(float x) {
  const float exponent = x * 1.4426950408889634f;
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(exponent));
  return result;
#else
  return std::exp2(exponent);
#endif
}
__device__ inline double fast_exp(double x) { return std::exp(x); }

// log(x) of 1 <= x <= 2 within 2^-22.
__device__ inline float fast_log(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
#else
  const float result = std::log2(x);
#endif
  return result * 0.6931471805599453f;
}
__device__ inline double fast_log(double x) { return std::log(x); }

// The largest logit, the first class that has it, and the sum of exp(logit - largest); NaN in the
// sum where a logit is not finite.
template <class T>
struct Softmax {
  Peak<T> peak;
  T sum;

  static __device__ Softmax none() { return {Peak<T>::none(), T(0)}; }
};

// Takes entries of a row in as they are read, those before `end`.
template <int kCount, class T>
__device__ void take_row(Softmax<T>& softmax, const T* value, int i, int end) {
  T top = lowest<T>();
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    if (i + j < end) top = fmax(top, value[j]);
  }
  // Seldom, after the first entries; a logit may be the lowest number there is.
  if (top > softmax.peak.value || (top == softmax.peak.value && i < softmax.peak.place)) {
    int place = i;
#pragma unroll
    for (int j = kCount - 1; j >= 0; --j) {
      if (value[j] == top) place = i + j;
    }
    softmax.sum *= fast_exp(softmax.peak.value - top);
    softmax.peak = {top, place, 0};
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    if (i + j < end) softmax.sum += fast_exp(value[j] - softmax.peak.value) + poison(value[j]);
  }
}

// Of two parts of a row.
struct Merge {
  template <class T>
  __device__ Softmax<T> operator()(const Softmax<T>& a, const Softmax<T>& b) const {
    Softmax<T> both{Higher()(a.peak, b.peak), T(0)};
    both.sum = a.sum * fast_exp(a.peak.value - both.peak.value) +
               b.sum * fast_exp(b.peak.value - both.peak.value);
    return both;
  }
  template <class Sums>
  __device__ Sums operator()(const Sums& a, const Sums& b) const {
    return Sums::merged(a, b);
  }
};

// The reduction over `lanes` neighbouring lanes, a power of two; the whole warp takes part.
template <typename T, typename Op>
__device__ T lanes_reduce(T value, int lanes, Op op) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    value = op(value, shuffle_xor(value, offset));
  }
  return value;
}

// What `row[c]`, c = lane, lane + lanes, ... before `end`, are below the largest, in their place,
// or with kExp the exponentials of that; the largest, its first place, and the sum of the
// exponentials. The same for all of the neighbouring lanes.
template <bool kExp, class T>
__device__ Softmax<T> lower_row(T* row, int lane, int lanes, int end) {
  T top = lowest<T>();
#pragma unroll 4
  for (int c = lane; c < end; c += lanes) top = fmax(top, row[c]);
  top = lanes_reduce(top, lanes, Max());
  T sum = 0;
  int place = 0x7fffffff;
#pragma unroll 4
  for (int c = lane; c < end; c += lanes) {
    const T logit = row[c], below = logit - top, e = fast_exp(below);
    if (logit == top && c < place) place = c;
    sum += e + poison(logit);
    row[c] = kExp ? e : below;
  }
  place = lanes_reduce(place, lanes, Min());
  return {{top, place, 0}, lanes_reduce(sum, lanes, Sum())};
}

// Threads of a block that takes a sample of so many logits, at most kSampleThreads.
constexpr int kSampleThreads = 512;

inline int sample_threads(int64_t logits) {
  const int64_t wanted = ceil_div(logits, 8 * kWarp) * kWarp;
  return static_cast<int>(wanted < 64 ? 64 : wanted < kSampleThreads ? wanted : kSampleThreads);
}

// Neighbouring lanes that take a clone together: four classes each, or more.
inline int lanes_for(int64_t classes) {
  int lanes = 1;
  while (lanes < kWarp && lanes * 4 < classes) lanes *= 2;
  return lanes;
}

// The number of samples that count; the same for every thread of the block.
inline __device__ double count_targets(const ClassTargets& target, int64_t samples,
                                       double* scratch) {
  if (target.classes == nullptr) return static_cast<double>(samples);
  double counted = 0;
  for (int64_t b = threadIdx.x; b < samples; b += blockDim.x) {
    counted += target.options.counts(target.classes[b]);
  }
  return block_reduce(counted, Sum(), 0.0, scratch);
}

// This block's share of a copy, of `blocks` blocks.
template <class from_t, class to_t>
__device__ void copy_finite(const FiniteCopy<from_t, to_t>& copy, int64_t block, int64_t blocks) {
  constexpr int kCount = 16 / (sizeof(from_t) > sizeof(to_t) ? sizeof(from_t) : sizeof(to_t));
  const bool from_aligned = is_aligned<from_t, kCount>(copy.from);
  const bool to_aligned = is_aligned<to_t, kCount>(copy.to);
  const int64_t step = blocks * blockDim.x * kCount;
  for (int64_t i = (block * blockDim.x + threadIdx.x) * kCount; i < copy.size; i += step) {
    compute_t<from_t> value[kCount];
    load_some<kCount>(copy.from, i, copy.size, from_aligned, value);
    Pack<to_t, kCount> pack;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      round_to(is_finite(value[j]) ? value[j] : compute_t<from_t>(0), pack.values[j]);
    }
    if (to_aligned && i + kCount <= copy.size) {
      store_pack(copy.to + i, pack);
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if (i + j < copy.size) copy.to[i + j] = pack.values[j];
      }
    }
  }
}

// Blocks for a copy: 16 accesses a thread, and enough of them to fill a GPU.
template <class from_t, class to_t>
int64_t copy_blocks(const FiniteCopy<from_t, to_t>& copy, int threads) {
  const int64_t blocks = ceil_div(copy.size * static_cast<int64_t>(sizeof(from_t)),
                                  static_cast<int64_t>(threads) * 16 * 16);
  return copy.to == nullptr ? 0 : blocks < 1024 ? blocks : 1024;
}

constexpr int kColumnThreads = 512;

// Columns of one block.
template <class scalar_t>
constexpr int kTileColumns = 4 * 16 / static_cast<int>(sizeof(scalar_t));

template <class scalar_t>
int64_t column_blocks(const ColumnSums<scalar_t>& sums) {
  return sums.out == nullptr ? 0 : ceil_div(sums.columns, int64_t(kTileColumns<scalar_t>));
}

// The sums of a tile of columns: four threads side by side, each with 16 bytes of a row, then over
// the rows in a fixed order. The first kTileColumns threads get one each, the others 0. `scratch`
// has kColumnThreads / kWarp * kTileColumns places.
template <class scalar_t>
__device__ compute_t<scalar_t> sum_columns(const ColumnSums<scalar_t>& sums, int64_t tile,
                                           compute_t<scalar_t>* scratch) {
  using compute_type = compute_t<scalar_t>;
  constexpr int kCount = 16 / sizeof(scalar_t), kColumns = kTileColumns<scalar_t>;
  const int64_t column = tile * kColumns + threadIdx.x % 4 * kCount;
  compute_type total[kCount] = {};
  if (column < sums.columns) {
    constexpr int kRows = kColumnThreads / 4, kUnroll = 4;
    for (int64_t row = threadIdx.x / 4; row < sums.rows; row += kRows * kUnroll) {
      compute_type value[kUnroll][kCount];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t r = row + u * kRows;
        // ld leaves room for a whole access at the end of a row.
        load_some<kCount>(sums.g + (r < sums.rows ? r : row) * sums.ld, column, sums.ld, true,
                          value[u]);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (row + u * kRows >= sums.rows) break;
#pragma unroll
        for (int j = 0; j < kCount; ++j) total[j] += value[u][j];
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    for (int offset = kWarp / 2; offset >= 4; offset /= 2) {
      total[j] += shuffle_xor(total[j], offset);
    }
    if (threadIdx.x % kWarp < 4) {
      scratch[threadIdx.x / kWarp * kColumns + threadIdx.x % 4 * kCount + j] = total[j];
    }
  }
  __syncthreads();
  compute_type sum = 0;
  if (threadIdx.x < kColumns) {
    for (int warp = 0; warp < kColumnThreads / kWarp; ++warp) {
      sum += scratch[warp * kColumns + threadIdx.x];
    }
  }
  return sum;
}

}  // namespace alrao::cuda
