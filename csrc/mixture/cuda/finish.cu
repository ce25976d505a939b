// Before and after the mixture's own kernels: the norm, copies without non-finite values, and the
// sums over samples with the switch as their tail.
//
// The finishing kernel is one launch of blocks with different tasks. Its first block is bound by
// latency (2 to 4 us): 16 N + 8 bytes a part. The others read the gradient to the logits again for
// the bias (2 to 4 bytes a logit), look whether a clone was dead, and write only if it was;
// float16, whose gradients would lose their digits if they carried the 1 / B, is scaled here (8
// bytes a weight).
#include "mixture/cuda/rows.cuh"
#include "switch/cuda/update.cuh"

namespace alrao::cuda {
namespace {

constexpr int kNormThreads = 1024;
constexpr int kCopyThreads = 256;
constexpr int kThreads = kColumnThreads;
constexpr int kWarps = kThreads / kWarp;

template <class compute_type>
__global__ void mixture_norm_kernel(ClassTargets target, bool mean, MixtureDivisor divisor,
                                    int64_t samples, compute_type* norm) {
  __shared__ double scratch[kNormThreads / kWarp];
  const double divided = mean ? fmax(count_targets(target, samples, scratch), 1.0) : divisor.get();
  if (threadIdx.x == 0) *norm = static_cast<compute_type>(1 / divided);
}

template <class compute_type>
__global__ void mixture_largest_kernel(const compute_type* row_weight, int64_t samples,
                                       compute_type* largest) {
  __shared__ double scratch[kNormThreads / kWarp];
  double most = 0;
  for (int64_t b = threadIdx.x; b < samples; b += blockDim.x) {
    const double weight = row_weight[b];
    most = fmax(most, weight < 0 ? -weight : weight);
  }
  most = block_reduce(most, Max(), 0.0, scratch);
  if (threadIdx.x == 0) *largest = static_cast<compute_type>(most > 0 ? most : 1.0);
}

// The number of samples that count; the same for every thread of the block.
template <class scalar_t>
__device__ double count_samples(const FinishArguments<scalar_t>& a, double* scratch) {
  if (a.row_weight == nullptr) return count_targets(a.target, a.size.samples, scratch);
  double counted = 0;
  for (int64_t b = threadIdx.x; b < a.size.samples; b += blockDim.x) {
    counted += a.row_weight[b] != 0 &&
               (a.target.classes == nullptr || a.target.options.counts(a.target.classes[b]));
  }
  return block_reduce(counted, Sum(), 0.0, scratch);
}

template <class from_t, class to_t>
__global__ void finite_copy_kernel(FiniteCopy<from_t, to_t> copy) {
  copy_finite(copy, blockIdx.x, gridDim.x);
}

// What `op` makes of one row of the parts and 0, by a warp.
template <class Op>
__device__ double reduce_parts(const MixtureParts& parts, int64_t row, Op op) {
  const double* values = parts.sums + row * parts.parts;
  double result = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x % kWarp; i < parts.parts; i += kWarp) result = op(result, values[i]);
  return warp_reduce(result, op);
}

// Whether a clone was dead for a counted sample: its -log p is inf there. By a warp.
__device__ bool was_dead(const MixtureParts& parts, int64_t clone) {
  return reduce_parts(parts, clone, Max()) == INFINITY;
}

template <class scalar_t>
__device__ void finish_statistics(const FinishArguments<scalar_t>& a, double* scratch) {
  const int64_t clones = a.size.clones;
  const double count = count_samples(a, scratch);
  for (int64_t row = threadIdx.x / kWarp; row <= 2 * clones; row += kWarps) {
    const double sum = reduce_parts(a.parts, row, Sum());
    if (threadIdx.x % kWarp != 0) continue;
    if (row < 2 * clones) {
      a.stats[row] = sum;
    } else {
      *a.loss =
          static_cast<compute_t<scalar_t>>(sum / (a.mean ? fmax(count, 1.0) : a.divisor.get()));
    }
  }
  for (int64_t n = threadIdx.x; n < clones; n += kThreads) a.stats[2 * clones + n] = count;
  if (a.observation.running == nullptr) return;
  // The block reads what it has written.
  __syncthreads();
  observe(a.observation, a.stats, scratch);
}

// A tile of dbias, of all clones' rows.
template <class scalar_t>
__device__ void finish_bias(const FinishArguments<scalar_t>& a, int64_t tile,
                            compute_t<scalar_t>* scratch) {
  using compute_type = compute_t<scalar_t>;
  constexpr int kColumns = kTileColumns<scalar_t>;
  __shared__ bool dead[kColumns];
  const int64_t first = tile * kColumns / a.size.classes;
  const int64_t column = tile * kColumns + threadIdx.x;
  const bool mine = threadIdx.x < kColumns && column < a.columns.columns;
  for (int i = threadIdx.x / kWarp; i < kColumns; i += kWarps) {
    const int64_t clone = first + i;
    if (clone * a.size.classes >= (tile + 1) * kColumns || clone >= a.size.clones) break;
    const bool is_dead = was_dead(a.parts, clone);
    if (threadIdx.x % kWarp == 0) dead[i] = is_dead;
  }
  compute_type sum = sum_columns(a.columns, tile, scratch);
  if (!mine) return;
  if (a.columns.add) sum += a.columns.out[column];
  if (a.norm != nullptr) sum *= *a.norm;
  a.columns.out[column] = dead[column / a.size.classes - first] ? compute_type(0) : sum;
}

// values = factor * values, or 0 for a factor of 0 whatever they are; this block's share.
template <class T>
__device__ void scale_or_clear(T* values, int64_t size, compute_t<T> factor, int64_t block,
                               int64_t blocks) {
  using compute_type = compute_t<T>;
  constexpr int kCount = 16 / sizeof(T);
  const bool aligned = is_aligned<T, kCount>(values);
  for (int64_t i = (block * kThreads + threadIdx.x) * kCount; i < size;
       i += blocks * kThreads * kCount) {
    compute_type value[kCount] = {};
    if (factor != 0) load_some<kCount>(values, i, size, aligned, value);
    Pack<T, kCount> pack;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      round_to(factor == 0 ? compute_type(0) : value[j] * factor, pack.values[j]);
    }
    store_some(values, i, size, aligned, pack);
  }
}

template <class scalar_t>
__device__ void finish_weight(const FinishArguments<scalar_t>& a, int64_t clone, int64_t block,
                              int64_t blocks) {
  using compute_type = compute_t<scalar_t>;
  const double* losses = a.parts.sums + clone * a.parts.parts;
  bool infinite = false;
  for (int64_t i = threadIdx.x; i < a.parts.parts; i += kThreads) {
    infinite |= losses[i] == INFINITY;
  }
  const bool dead = __syncthreads_or(infinite);
  if (!dead && a.norm == nullptr) return;
  const compute_type factor = dead ? compute_type(0) : *a.norm;
  const int64_t size = a.size.classes * a.size.features;
  scale_or_clear(a.dweight + clone * size, size, factor, block, blocks);
  if (a.columns.out == nullptr && a.dbias != nullptr) {
    scale_or_clear(a.dbias + clone * a.size.classes, a.size.classes, factor, block, blocks);
  }
}

// Blocks: one for the statistics, then for the bias, the weights and the features.
struct FinishBlocks {
  int64_t bias, per_clone, features;
};

template <class scalar_t>
__global__ void __launch_bounds__(kThreads, 1)
    mixture_finish_kernel(const __grid_constant__ FinishArguments<scalar_t> a,
                          FinishBlocks blocks) {
  using compute_type = compute_t<scalar_t>;
  __shared__ double scratch[kWarps * kTileColumns<scalar_t>];
  int64_t block = blockIdx.x;
  if (block == 0) {
    finish_statistics(a, scratch);
    return;
  }
  block -= 1;
  if (block < blocks.bias) {
    finish_bias(a, block, reinterpret_cast<compute_type*>(scratch));
    return;
  }
  block -= blocks.bias;
  if (block < blocks.per_clone * a.size.clones) {
    finish_weight(a, block / blocks.per_clone, block % blocks.per_clone, blocks.per_clone);
    return;
  }
  block -= blocks.per_clone * a.size.clones;
  scale_or_clear(a.dx, a.size.samples * a.size.features, *a.norm, block, blocks.features);
}

int64_t between(int64_t low, int64_t value, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

}  // namespace

template <class compute_type>
cudaError_t launch_mixture_norm(const ClassTargets& target, bool mean,
                                const MixtureDivisor& divisor, int64_t samples, compute_type* norm,
                                cudaStream_t stream) {
  return launch(mixture_norm_kernel<compute_type>, 1, mean ? kNormThreads : kWarp, 0, stream,
                target, mean, divisor, samples, norm);
}

template <class compute_type>
cudaError_t launch_mixture_largest(const compute_type* row_weight, int64_t samples,
                                   compute_type* largest, cudaStream_t stream) {
  return launch(mixture_largest_kernel<compute_type>, 1, kNormThreads, 0, stream, row_weight,
                samples, largest);
}

template <class from_t, class to_t>
cudaError_t launch_finite_copy(const FiniteCopy<from_t, to_t>& copy, cudaStream_t stream) {
  if (copy.size == 0) return cudaSuccess;
  return launch(finite_copy_kernel<from_t, to_t>, grid_of(copy_blocks(copy, kCopyThreads)),
                kCopyThreads, 0, stream, copy);
}

template <class scalar_t>
cudaError_t launch_mixture_finish(const FinishArguments<scalar_t>& a, cudaStream_t stream) {
  constexpr int64_t kSizeOfBlock = 64 * kThreads;
  FinishBlocks blocks{column_blocks(a.columns), 0, 0};
  if (a.dweight != nullptr) {
    const int64_t size = a.size.classes * (a.size.features > 0 ? a.size.features : 1);
    blocks.per_clone = between(1, ceil_div(size, kSizeOfBlock), 64);
  }
  if (a.dx != nullptr) {
    blocks.features = between(1, ceil_div(a.size.samples * a.size.features, kSizeOfBlock), 1024);
  }
  const int64_t grid = 1 + blocks.bias + blocks.per_clone * a.size.clones + blocks.features;
  return launch(mixture_finish_kernel<scalar_t>, grid_of(grid), kThreads, 0, stream, a, blocks);
}

#define ALRAO_INSTANTIATE(scalar_t)                                                      \
  template cudaError_t launch_finite_copy<scalar_t, compute_t<scalar_t>>(                \
      const FiniteCopy<scalar_t, compute_t<scalar_t>>&, cudaStream_t);                   \
  template cudaError_t launch_mixture_finish<scalar_t>(const FinishArguments<scalar_t>&, \
                                                       cudaStream_t)

ALRAO_FOR_EVERY_TYPE(ALRAO_INSTANTIATE);

template cudaError_t launch_finite_copy<BFloat16, BFloat16>(const FiniteCopy<BFloat16, BFloat16>&,
                                                            cudaStream_t);
template cudaError_t launch_finite_copy<Float16, Float16>(const FiniteCopy<Float16, Float16>&,
                                                          cudaStream_t);
template cudaError_t launch_mixture_norm<float>(const ClassTargets&, bool, const MixtureDivisor&,
                                                int64_t, float*, cudaStream_t);
template cudaError_t launch_mixture_norm<double>(const ClassTargets&, bool, const MixtureDivisor&,
                                                 int64_t, double*, cudaStream_t);
template cudaError_t launch_mixture_largest<float>(const float*, int64_t, float*, cudaStream_t);
template cudaError_t launch_mixture_largest<double>(const double*, int64_t, double*, cudaStream_t);

}  // namespace alrao::cuda
