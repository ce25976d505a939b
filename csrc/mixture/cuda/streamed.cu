// Clone after clone, for many classes: one buffer holds a chunk of one clone's logits.
//
// The responsibilities are not known before all clones have been seen, so every sample keeps a
// running maximum m of a_n + logp_n, the sum of its exponentials and the sum of what they weight,
// rescaled when m grows, as flash attention does over keys.
//
// Floor on an H200 (4.3 TB/s), per logit: the product writes 4 bytes, the row kernel reads 4 and
// writes 2 (bfloat16) or 4, the products read that twice and the bias's sum once: 16 to 24 bytes,
// 3.7 to 5.6 ps; per sample, clone and feature 16 bytes for the sum of terms. Five launches a clone
// and chunk, one dweight written once. 8192 samples, 768 features, 6 x 50304 classes in bfloat16:
// 14.4 ms of flops and 9.3 ms of logits; 4096, 4096, 6 x 128256: 98 and 12 ms. Expected: 60 % and
// 85 % of the flops' floor.
//
// A block takes a row. Up to 24 entries a thread, 24576 classes (6144 in float64), it
// stays in registers: one read, one write. Beyond, it is read twice, the second time from L2.
#include "mixture/cuda/rows.cuh"

namespace alrao::cuda {
namespace {

// Of a block; float64 needs more registers a thread.
template <class scalar_t>
constexpr int kMaxThreads = sizeof(compute_t<scalar_t>) == 8 ? 512 : 1024;
constexpr int kCombineColumns = 2048;
template <class scalar_t>
constexpr int kOptionThreads = sizeof(compute_t<scalar_t>) == 8 ? 256 : 512;

// Everything about a row but its entries.
template <class scalar_t, bool kGaussian, bool kOptions>
struct Row {
  using compute_type = compute_t<scalar_t>;
  static constexpr int kCount = 16 / sizeof(scalar_t);  // entries of an access

  const RowArguments<scalar_t>& a;
  bool counted;
  int32_t target;  // -1: none
  compute_type target_logit;

  __device__ explicit Row(const RowArguments<scalar_t>& arguments) : a(arguments) {
    counted = true;
    target = -1;
    if constexpr (!kGaussian) {
      const int64_t y = a.target.classes[sample()];
      counted = a.target.options.counts(y);
      // What is no class is impossible for every clone: the loss shows it.
      target = y >= 0 && y < a.size.classes ? static_cast<int32_t>(y) : -1;
      target_logit = -INFINITY;
      if (target >= 0) {
        target_logit = logits()[target];
        if (a.bias != nullptr) target_logit += widen(bias()[target]);
      }
    }
    if constexpr (kOptions) {
      counted = counts_with_options(a.options, a.target, sample());
      if (!kGaussian && a.options.softcap != 0) {
        target_logit = capped(target_logit, a.options.softcap);
      }
    }
  }

  // Made again where they are needed: registers are short.
  __device__ int64_t sample() const { return a.first + blockIdx.x; }
  __device__ compute_type* logits() const { return a.z + blockIdx.x * a.ld; }
  __device__ const scalar_t* bias() const { return a.bias + a.clone * a.size.classes; }

  // Logits with bias, or errors, from entry i on; beyond the last class anything.
  __device__ void load(int64_t i, compute_type* value) const {
    constexpr int kWide = 16 / sizeof(compute_type);
#pragma unroll
    for (int k = 0; k < kCount; k += kWide) {
      const auto pack = load_pack<compute_type, kWide>(logits() + i + k);
#pragma unroll
      for (int j = 0; j < kWide; ++j) value[k + j] = pack.values[j];
    }
    // As many at a time as are wide: fewer registers.
    if (a.bias != nullptr) {
      const bool aligned = is_aligned<scalar_t, kWide>(bias());
#pragma unroll
      for (int k = 0; k < kCount; k += kWide) {
        compute_type offset[kWide];
        load_some<kWide>(bias(), i + k, a.size.classes, aligned, offset);
#pragma unroll
        for (int j = 0; j < kWide; ++j) value[k + j] += offset[j];
      }
    }
    if constexpr (kGaussian) {
      const scalar_t* outputs = a.target.values + sample() * a.size.classes;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if (i + j < a.size.classes) value[j] -= widen(outputs[i + j]);
      }
    } else if constexpr (kOptions) {
      if (a.options.softcap != 0) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) value[j] = capped(value[j], a.options.softcap);
      }
    }
  }

  // `value` holds exponentials, or errors; scale 0: no gradient, whatever they are.
  __device__ void store(int64_t i, const compute_type* value, compute_type scale,
                        compute_type norm) const {
    Pack<scalar_t, kCount> pack;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      compute_type gradient = scale == 0 ? compute_type(0) : value[j] * scale;
      if (scale != 0 && i + j == target) gradient -= norm;
      round_to(gradient, pack.values[j]);
    }
    // The gradient lies over the logits.
    store_pack(reinterpret_cast<scalar_t*>(logits()) + i, pack);
  }

  // `value` holds what the logits are below the largest.
  __device__ void store_with_options(int64_t i, const compute_type* value,
                                     const OptionTerms<compute_type>& terms,
                                     compute_type largest) const {
    Pack<scalar_t, kCount> pack;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      compute_type gradient = 0;
      if (terms.scale == terms.scale && i + j < a.size.classes) {
        gradient = option_gradient(a.options, sample(), a.size.classes, i + j, target, value[j],
                                   largest, terms.scale, terms.spread, terms.hit);
      }
      round_to(gradient, pack.values[j]);
    }
    store_pack(reinterpret_cast<scalar_t*>(logits()) + i, pack);
  }

  // Statistics and the running mixture; the factor that turns exponentials (errors) into gradients.
  // `objective` is what the mixture takes of the clone.
  __device__ compute_type finish(compute_type log_likelihood, compute_type score,
                                 compute_type scale, compute_type objective) const {
    const bool alive = is_alive(log_likelihood) && is_alive(objective);
    if (threadIdx.x == 0) {
      const int64_t sample = this->sample();
      double* out = a.out.sums + sample;
      const int64_t clones = a.size.clones, parts = a.out.parts;
      out[a.clone * parts] = !counted ? 0.0 : alive ? -log_likelihood : double(INFINITY);
      out[(clones + a.clone) * parts] = counted ? score : 0.0;
      auto mixture = a.clone == 0
                         ? empty_mixture<compute_type>()
                         : RunningMixture<compute_type>{a.state.max[sample], a.state.sum[sample]};
      const auto factors =
          take_in(mixture, alive && counted
                               ? log_posterior_of<compute_type>(a.posterior, a.clone) + objective
                               : compute_type(-INFINITY));
      a.state.max[sample] = mixture.max;
      a.state.sum[sample] = mixture.sum;
      a.state.keep[sample] = factors.keep;
      a.state.take[sample] = factors.take;
      if (a.clone + 1 == clones) {
        const double loss = counted ? loss_of(mixture_nll(mixture)) : 0.0;
        out[2 * clones * parts] = loss;
        if constexpr (kOptions) {
          if (a.options.losses != nullptr) {
            a.options.losses[sample] = static_cast<compute_type>(loss);
          }
        }
      }
    }
    return alive && counted ? scale : compute_type(0);
  }

  __device__ compute_type loss_of(compute_type nll) const {
    if constexpr (!kOptions) return nll;
    return a.options.row_weight == nullptr ? nll : a.options.row_weight[sample()] * nll;
  }

  __device__ compute_type norm() const {
    const compute_type norm =
        a.norm.on_device == nullptr ? static_cast<compute_type>(a.norm.value) : *a.norm.on_device;
    return kOptions ? weight_with_options(a.options, sample(), norm) : norm;
  }

  __device__ OptionTerms<compute_type> finish_options(Peak<compute_type> peak, compute_type sum,
                                                      const OptionSums<compute_type>& sums) const {
    auto terms = option_terms(a.options, a.size.classes, LogitSums<compute_type>{peak.value, sum},
                              target_logit, target, sums, norm());
    const bool correct = terms.alive() && peak.place == target;
    finish(terms.likelihood, correct, terms.scale, terms.objective);
    if (!counted) terms.scale = NAN;
    return terms;
  }

  __device__ compute_type finish_classes(Peak<compute_type> peak, compute_type sum) const {
    const LogitSums<compute_type> logits{peak.value, sum};
    const compute_type log_likelihood = a.target.options.log_likelihood(target_logit, logits);
    const bool correct = is_alive(log_likelihood) && peak.place == target;
    return finish(log_likelihood, correct, a.target.options.gradient_factor(norm(), logits),
                  log_likelihood);
  }

  __device__ compute_type finish_outputs(compute_type squared) const {
    const compute_type log_likelihood = a.target.density.log_likelihood(squared);
    const compute_type score = is_alive(log_likelihood) ? squared : compute_type(INFINITY);
    const auto inverse = static_cast<compute_type>(a.target.density.inverse_variance);
    return finish(log_likelihood, score, norm() * inverse, log_likelihood);
  }
};

// The row in registers, kEntries a thread.
template <class scalar_t, int kEntries>
__global__ void __launch_bounds__(kMaxThreads<scalar_t>, 1)
    mixture_row_kernel(const __grid_constant__ RowArguments<scalar_t> a) {
  using compute_type = compute_t<scalar_t>;
  constexpr int kCount = Row<scalar_t, false, false>::kCount, kAccesses = kEntries / kCount;
  __shared__ Peak<compute_type> peaks[kMaxWarps];
  __shared__ compute_type sums[kMaxWarps];
  const Row<scalar_t, false, false> row(a);
  const int classes = static_cast<int>(a.size.classes);
  compute_type value[kAccesses][kCount];
  auto peak = Peak<compute_type>::none();
#pragma unroll
  for (int k = 0; k < kAccesses; ++k) {
    const int i = (k * blockDim.x + threadIdx.x) * kCount;
    if (i >= classes) break;
    row.load(i, value[k]);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (i + j < classes) peak.take(value[k][j], i + j);
    }
  }
  peak = block_reduce(peak, Higher(), Peak<compute_type>::none(), peaks);
  compute_type sum = 0;
#pragma unroll
  for (int k = 0; k < kAccesses; ++k) {
    const int i = (k * blockDim.x + threadIdx.x) * kCount;
    if (i >= classes) break;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const compute_type e = std::exp(value[k][j] - peak.value);
      if (i + j < classes) sum += e + poison(value[k][j]);
      value[k][j] = e;
    }
  }
  sum = block_reduce(sum, Sum(), compute_type(0), sums);
  const compute_type scale = row.finish_classes(peak, sum);
  if (!a.need_gradient) return;
  const compute_type norm = row.norm();
#pragma unroll
  for (int k = 0; k < kAccesses; ++k) {
    const int i = (k * blockDim.x + threadIdx.x) * kCount;
    if (i >= classes) break;
    row.store(i, value[k], scale, norm);
  }
}

// The row read three times: any number of classes, with options.
template <class scalar_t>
__global__ void __launch_bounds__(kOptionThreads<scalar_t>, 1)
    mixture_option_row_kernel(const __grid_constant__ RowArguments<scalar_t> a) {
  using compute_type = compute_t<scalar_t>;
  constexpr int kCount = Row<scalar_t, false, true>::kCount;
  __shared__ Peak<compute_type> peaks[kMaxWarps];
  __shared__ compute_type totals[kMaxWarps];
  __shared__ OptionSums<compute_type> option_totals[kMaxWarps];
  const Row<scalar_t, false, true> row(a);
  const int64_t classes = a.size.classes;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kCount;
  auto peak = Peak<compute_type>::none();
  for (int64_t i = threadIdx.x * kCount; i < classes; i += step) {
    compute_type value[kCount];
    row.load(i, value);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (i + j < classes) peak.take(value[j], static_cast<int32_t>(i + j));
    }
  }
  peak = block_reduce(peak, Higher(), Peak<compute_type>::none(), peaks);
  compute_type sum = 0;
  auto sums = OptionSums<compute_type>::none();
  for (int64_t i = threadIdx.x * kCount; i < classes; i += step) {
    compute_type value[kCount];
    row.load(i, value);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (i + j >= classes) break;
      const compute_type below = value[j] - peak.value;
      sum += std::exp(below) + poison(value[j]);
      sums.take(a.options, row.sample(), classes, i + j, below);
    }
  }
  sum = block_reduce(sum, Sum(), compute_type(0), totals);
  sums = block_reduce(sums, AddOptionSums(), OptionSums<compute_type>::none(), option_totals);
  const auto terms = row.finish_options(peak, sum, sums);
  if (!a.need_gradient) return;
  for (int64_t base = 0; base < classes; base += step) {
    const int64_t i = base + threadIdx.x * kCount;
    compute_type value[kCount];
    if (i < classes) row.load(i, value);
    // A narrower gradient lies over logits that other threads read in this round, or before.
    __syncthreads();
    if (i >= classes) continue;
#pragma unroll
    for (int j = 0; j < kCount; ++j) value[j] -= peak.value;
    row.store_with_options(i, value, terms, peak.value);
  }
}

// The row read twice: any number of classes, and regression.
template <class scalar_t, bool kGaussian, bool kOptions>
__global__ void __launch_bounds__(kMaxThreads<scalar_t>, 1)
    mixture_long_row_kernel(const __grid_constant__ RowArguments<scalar_t> a) {
  using compute_type = compute_t<scalar_t>;
  constexpr int kCount = Row<scalar_t, kGaussian, kOptions>::kCount;
  __shared__ Softmax<compute_type> softmaxes[kMaxWarps];
  __shared__ compute_type sums[kMaxWarps];
  const Row<scalar_t, kGaussian, kOptions> row(a);
  const int64_t classes = a.size.classes;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kCount;
  auto softmax = Softmax<compute_type>::none();
  compute_type squared = 0;
  for (int64_t i = threadIdx.x * kCount; i < classes; i += step) {
    compute_type value[kCount];
    row.load(i, value);
    if constexpr (kGaussian) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if (i + j < classes) squared += value[j] * value[j];
      }
    } else {
      take_in<kCount>(softmax, value, i, classes);
    }
  }
  compute_type scale;
  if constexpr (kGaussian) {
    scale = row.finish_outputs(block_reduce(squared, Sum(), compute_type(0), sums));
  } else {
    softmax = block_reduce(softmax, Merge(), Softmax<compute_type>::none(), softmaxes);
    scale = row.finish_classes(softmax.peak, softmax.sum);
  }
  if (!a.need_gradient) return;
  const compute_type norm = row.norm();
  for (int64_t base = 0; base < classes; base += step) {
    const int64_t i = base + threadIdx.x * kCount;
    compute_type value[kCount];
    if (i < classes) row.load(i, value);
    // A narrower gradient lies over logits that other threads read in this round, or before.
    __syncthreads();
    if (i < classes) {
      if constexpr (!kGaussian) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) value[j] = std::exp(value[j] - softmax.peak.value);
      }
      row.store(i, value, scale, norm);
    }
  }
}

template <class scalar_t>
__global__ void __launch_bounds__(kColumnThreads)
    mixture_combine_kernel(const __grid_constant__ CombineArguments<scalar_t> a, int64_t row_blocks,
                           int64_t blocks_per_row) {
  using compute_type = compute_t<scalar_t>;
  __shared__ compute_type scratch[kColumnThreads / kWarp * kTileColumns<scalar_t>];
  const int64_t block = blockIdx.x;
  if (block >= row_blocks) {
    const int64_t tile = block - row_blocks;
    const compute_type sum = sum_columns(a.columns, tile, scratch);
    const int64_t column = tile * kTileColumns<scalar_t> + threadIdx.x;
    if (threadIdx.x < kTileColumns<scalar_t> && column < a.columns.columns) {
      a.columns.out[column] = a.columns.add ? a.columns.out[column] + sum : sum;
    }
    return;
  }
  constexpr int kCount = 16 / sizeof(compute_type);
  const int64_t local = block / blocks_per_row, sample = a.first + local;
  const compute_type keep = a.is_first ? compute_type(0) : a.state.keep[sample];
  const compute_type take = a.state.take[sample];
  compute_type factor = 1;
  if (a.is_last) {
    const compute_type sum = a.state.sum[sample];
    factor = (a.norm == nullptr ? compute_type(1) : *a.norm) / (sum > 0 ? sum : compute_type(1));
  }
  const compute_type* term = a.term + local * a.features;
  compute_type* total = a.total + sample * a.features;
  const bool aligned =
      is_aligned<compute_type, kCount>(term) && is_aligned<compute_type, kCount>(total);
  const int64_t begin = (block % blocks_per_row) * kCombineColumns;
  const int64_t end = begin + kCombineColumns < a.features ? begin + kCombineColumns : a.features;
  for (int64_t i = begin + threadIdx.x * kCount; i < end; i += blockDim.x * kCount) {
    compute_type added[kCount] = {}, value[kCount] = {};
    // Left out, not multiplied by 0: the term of a dead clone may be NaN.
    if (take > 0) load_some<kCount>(term, i, end, aligned, added);
    if (!a.is_first) load_some<kCount>(total, i, end, aligned, value);
    Pack<compute_type, kCount> pack;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      pack.values[j] = (keep * value[j] + take * added[j]) * factor;
    }
    store_some(total, i, end, aligned, pack);
  }
}

// The fewest threads that hold a row of `classes` with so many entries each.
template <class scalar_t>
int threads_for(int64_t classes, int entries, int most = kMaxThreads<scalar_t>) {
  int threads = 128;
  while (threads < most && int64_t(threads) * entries < classes) threads *= 2;
  return threads;
}

}  // namespace

template <class scalar_t>
cudaError_t launch_mixture_rows(const RowArguments<scalar_t>& a, cudaStream_t stream) {
  const int64_t classes = a.size.classes;
  const unsigned rows = grid_of(a.chunk);
  if (a.target.classes == nullptr) {
    const auto kernel = a.options.any ? &mixture_long_row_kernel<scalar_t, true, true>
                                      : &mixture_long_row_kernel<scalar_t, true, false>;
    return launch(kernel, rows, threads_for<scalar_t>(classes, 16), 0, stream, a);
  }
  if (a.options.any) {
    const int threads = threads_for<scalar_t>(classes, 16, kOptionThreads<scalar_t>);
    return launch(mixture_option_row_kernel<scalar_t>, rows, threads, 0, stream, a);
  }
  constexpr int kFew = 64 / sizeof(compute_t<scalar_t>), kMany = 3 * kFew / 2;
  if (classes <= kFew * kMaxThreads<scalar_t>) {
    return launch(mixture_row_kernel<scalar_t, kFew>, rows, threads_for<scalar_t>(classes, kFew), 0,
                  stream, a);
  }
  if (classes <= kMany * kMaxThreads<scalar_t>) {
    return launch(mixture_row_kernel<scalar_t, kMany>, rows, kMaxThreads<scalar_t>, 0, stream, a);
  }
  return launch(mixture_long_row_kernel<scalar_t, false, false>, rows, kMaxThreads<scalar_t>, 0,
                stream, a);
}

template <class scalar_t>
cudaError_t launch_mixture_combine(const CombineArguments<scalar_t>& a, cudaStream_t stream) {
  const int64_t blocks_per_row = ceil_div(a.features, kCombineColumns);
  const int64_t row_blocks = a.term == nullptr ? 0 : a.chunk * blocks_per_row;
  const int64_t blocks = row_blocks + column_blocks(a.columns);
  if (blocks == 0) return cudaSuccess;
  return launch(mixture_combine_kernel<scalar_t>, grid_of(blocks), kColumnThreads, 0, stream, a,
                row_blocks, blocks_per_row);
}

#define ALRAO_INSTANTIATE(scalar_t)                                                                \
  template cudaError_t launch_mixture_rows<scalar_t>(const RowArguments<scalar_t>&, cudaStream_t); \
  template cudaError_t launch_mixture_combine<scalar_t>(const CombineArguments<scalar_t>&,         \
                                                        cudaStream_t)

ALRAO_FOR_EVERY_TYPE(ALRAO_INSTANTIATE);

}  // namespace alrao::cuda
