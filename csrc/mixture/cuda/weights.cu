// The factors of the samples' losses, and targets that are distributions.
//
// Of classes one block makes them all: 12 bytes a sample and 4 a class, in the time of a launch and
// a few rounds of latency. Distributions have a block a sample, which reads them from memory once
// and writes them once, 8 bytes an entry, so 4096 x 1000 take 8 us at an H200's 4.3 TB/s; the
// second look at a row finds it in the caches. What all blocks ask for, the mean of the class
// weights and the sum of the samples', each adds up by itself where that is little, or gets from a
// launch before.
#include "mixture/cuda/rows.cuh"

namespace alrao::cuda {
namespace {

constexpr int kMostTotalThreads = 512;
constexpr int kMostRowThreads = 256;
// Weights that a block of distributions adds up by itself.
constexpr int64_t kSummedByBlocks = 1024;

// The mean of the class weights, and what factors are divided by.
struct Totals {
  double average, divisor;
};

template <class T>
__device__ double weight_of_sample(const WeightsArguments<T>& a, int64_t sample) {
  return a.sample_weight == nullptr ? 1.0 : static_cast<double>(a.sample_weight[sample]);
}

template <class T>
__device__ double weight_of_class(const WeightsArguments<T>& a, int64_t y) {
  if (a.class_weight == nullptr) return 1;
  // A class that does not exist is the loss's to show.
  return a.class_weight[y < 0 ? 0 : y < a.classes ? y : a.classes - 1];
}

// What the loss weighs a target with whose own weight is w.
template <class T>
__device__ double smoothed(const WeightsArguments<T>& a, double w, double average) {
  if (a.class_weight == nullptr) return 1;
  return a.smoothing == 0 ? w : (1 - a.smoothing) * w + a.smoothing * average;
}

// By a block, the same for all of its threads.
template <class T>
__device__ Totals add_up(const WeightsArguments<T>& a, double* scratch) {
  Totals totals{1, 1};
  if (a.scaled != nullptr) {
    double sum = 0;
    for (int64_t c = threadIdx.x; c < a.classes; c += blockDim.x) sum += a.class_weight[c];
    totals.average = block_reduce(sum, Sum(), 0.0, scratch) / static_cast<double>(a.classes);
  }
  if (a.mean) {
    if (a.given != nullptr && a.sample_weight == nullptr) {
      totals.divisor = static_cast<double>(a.samples);
    } else {
      double sum = 0;
      for (int64_t b = threadIdx.x; b < a.samples; b += blockDim.x) {
        // What does not count may have any weight, NaN too.
        if (a.given != nullptr) {
          sum += weight_of_sample(a, b);
        } else if (a.target.options.counts(a.target.classes[b])) {
          sum += weight_of_sample(a, b) * weight_of_class(a, a.target.classes[b]);
        }
      }
      totals.divisor = block_reduce(sum, Sum(), 0.0, scratch);
    }
    // Where nothing counts the loss is 0.
    if (totals.divisor == 0) totals.divisor = 1;
  }
  totals.divisor *= a.divisor.get();
  return totals;
}

template <class T>
__device__ void scale_class_weights(const WeightsArguments<T>& a, double average) {
  if (a.scaled == nullptr) return;
  const double inverse = 1 / average;
  for (int64_t c = threadIdx.x; c < a.classes; c += blockDim.x) {
    a.scaled[c] = static_cast<T>(a.class_weight[c] * inverse);
  }
}

template <class T>
__global__ void __launch_bounds__(kMostTotalThreads)
    mixture_class_factors_kernel(const __grid_constant__ WeightsArguments<T> a) {
  __shared__ double scratch[kMostTotalThreads / kWarp];
  const Totals totals = add_up(a, scratch);
  scale_class_weights(a, totals.average);
  for (int64_t b = threadIdx.x; b < a.samples; b += blockDim.x) {
    const int64_t y = a.target.classes[b];
    const double factor =
        a.target.options.counts(y)
            ? weight_of_sample(a, b) * smoothed(a, weight_of_class(a, y), totals.average)
            : 0.0;
    a.factors[b] = static_cast<T>(factor / totals.divisor);
  }
}

template <class T>
__global__ void __launch_bounds__(kMostTotalThreads)
    mixture_totals_kernel(const __grid_constant__ WeightsArguments<T> a) {
  __shared__ double scratch[kMostTotalThreads / kWarp];
  const Totals totals = add_up(a, scratch);
  scale_class_weights(a, totals.average);
  if (threadIdx.x == 0) {
    a.totals[0] = totals.average;
    a.totals[1] = totals.divisor;
  }
}

// Of a row q of a distribution: the sums of q and of w q, and where it is largest.
template <class T>
struct RowSums {
  T sum, weighted;
  Peak<T> peak;

  static __device__ RowSums none() { return {T(0), T(0), Peak<T>::none()}; }
};

struct AddRowSums {
  template <class T>
  __device__ RowSums<T> operator()(const RowSums<T>& a, const RowSums<T>& b) const {
    return {a.sum + b.sum, a.weighted + b.weighted, Higher()(a.peak, b.peak)};
  }
};

template <class T>
__global__ void __launch_bounds__(kMostRowThreads)
    mixture_distributions_kernel(const __grid_constant__ WeightsArguments<T> a) {
  constexpr int kCount = 16 / sizeof(T);
  __shared__ double scratch[kMostRowThreads / kWarp];
  __shared__ RowSums<T> row_scratch[kMostRowThreads / kWarp];
  const int64_t sample = blockIdx.x;
  const Totals totals = a.totals == nullptr ? add_up(a, scratch) : Totals{a.totals[0], a.totals[1]};
  if (a.totals == nullptr && sample == 0) scale_class_weights(a, totals.average);
  const double weight = weight_of_sample(a, sample);
  const T* q = a.given + sample * a.classes;
  T* out = a.out + sample * a.classes;
  const bool aligned = is_aligned<T, kCount>(q) && is_aligned<T, kCount>(out);
  auto sums = RowSums<T>::none();
  // What does not count may be anything.
  if (weight != 0) {
    for (int64_t c = threadIdx.x * kCount; c < a.classes; c += blockDim.x * kCount) {
      T value[kCount];
      load_some<kCount>(q, c, a.classes, aligned, value);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if (c + j >= a.classes) break;
        sums.sum += value[j];
        if (a.class_weight != nullptr) sums.weighted += a.class_weight[c + j] * value[j];
        sums.peak.take(value[j], static_cast<int32_t>(c + j));
      }
    }
  }
  sums = block_reduce(sums, AddRowSums(), RowSums<T>::none(), row_scratch);
  const bool is_empty = sums.sum == T(0);
  // The inverse of the smallest sums would be infinite.
  const T scale = sums.sum < T(1e-30) ? T(18446744073709551616.0) : T(1);
  const T inverse = 1 / (sums.sum * scale);
  for (int64_t c = threadIdx.x * kCount; c < a.classes; c += blockDim.x * kCount) {
    T value[kCount];
    Pack<T, kCount> pack;
    load_some<kCount>(q, c, a.classes, aligned, value);
#pragma unroll
    for (int j = 0; j < kCount; ++j) pack.values[j] = is_empty ? T(0) : value[j] * scale * inverse;
    store_some(out, c, a.classes, aligned, pack);
  }
  if (threadIdx.x != 0) return;
  // Of entries that are all NaN none is the largest.
  a.likeliest[sample] = sums.peak.place < a.classes ? sums.peak.place : 0;
  double factor = is_empty ? 0.0 : weight;
  // One that is not finite makes every clone dead for the sample, and its loss inf: it has a
  // weight.
  if (!is_empty && is_finite(sums.sum)) {
    factor *= sums.sum * smoothed(a, sums.weighted / sums.sum, totals.average);
  }
  a.factors[sample] = static_cast<T>(factor / totals.divisor);
}

// Threads for so many items, in whole warps.
int threads_for(int64_t items, int most) {
  int threads = kWarp;
  while (threads < most && threads < items) threads *= 2;
  return threads;
}

template <class T>
int64_t summed(const WeightsArguments<T>& a) {
  return (a.scaled != nullptr ? a.classes : 0) +
         (a.mean && a.sample_weight != nullptr ? a.samples : 0);
}

}  // namespace

template <class T>
bool weights_totals(const WeightsArguments<T>& a) {
  return a.given != nullptr && a.samples > 0 && summed(a) > kSummedByBlocks;
}

template <class T>
cudaError_t launch_weights(const WeightsArguments<T>& a, cudaStream_t stream) {
  const int threads = threads_for(a.samples > a.classes ? a.samples : a.classes, kMostTotalThreads);
  if (a.given == nullptr || a.samples == 0) {
    // Without samples there are the class weights alone to write.
    if (a.samples == 0 && a.scaled == nullptr) return cudaSuccess;
    return launch(mixture_class_factors_kernel<T>, 1, threads, 0, stream, a);
  }
  if (a.totals != nullptr) {
    const cudaError_t status = launch(mixture_totals_kernel<T>, 1, threads, 0, stream, a);
    if (status != cudaSuccess) return status;
  }
  constexpr int64_t kCount = 16 / sizeof(T);
  return launch(mixture_distributions_kernel<T>, grid_of(a.samples),
                threads_for(ceil_div(a.classes, kCount), kMostRowThreads), 0, stream, a);
}

#define ALRAO_INSTANTIATE(T)                                   \
  template bool weights_totals<T>(const WeightsArguments<T>&); \
  template cudaError_t launch_weights<T>(const WeightsArguments<T>&, cudaStream_t)

ALRAO_INSTANTIATE(float);
ALRAO_INSTANTIATE(double);

}  // namespace alrao::cuda
