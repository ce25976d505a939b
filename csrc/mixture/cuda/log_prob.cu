// Log-probabilities of the mixture, log sum_n exp(a_n + logp[n, c]) - log_mass over the clones
// alive for the sample, with log_mass = log sum_n exp(a_n) over them, and the gradients to the
// logits.
//
// With w[n, c] = exp(a_n + logp[n, c] - log_mass - out[c]), the clone's share in the probability of
// a class, the gradient to the logits is dz[n, c] = w[n, c] grad[c] - p[n, c] sum_c w[n, c]
// grad[c].
//
// Bytes, per logit: 4 read once where all clones of a sample fit into shared memory; clone after
// clone 4, twice, and 8 for the result. The backward makes the logits again and multiplies in
// float32.
#include "mixture/cuda/options.cuh"

namespace alrao::cuda {
namespace {

constexpr int kRowThreads = 512;

// log(e^a + e^b), -inf where both are.
template <class T>
__device__ T log_add(T a, T b) {
  const T high = fmax(a, b), low = fmin(a, b);
  return high > T(-INFINITY) ? high + fast_log(1 + fast_exp(low - high)) : high;
}

// A clone's share in the probability of a class, of logarithm `log_prob`: at most 1, however large
// the numbers are whose rounding may say otherwise.
template <class T>
__device__ T share_of(T joint, T log_prob) {
  return fast_exp(fmin(joint - log_prob, T(0)));
}

// All clones of a sample by a block.
template <class scalar_t, bool kCapped>
struct LogProbSample {
  using compute_type = compute_t<scalar_t>;

  const LogProbArguments<scalar_t>& a;
  const int clones, classes, logits, lanes;
  compute_type* offset;   // [N]: a_n - log sum exp(z - max), backward less log_mass; -inf: dead
  compute_type* weight;   // [N]: forward a_n, -inf for the dead; backward 1 / sum, sum_c w grad
  compute_type* row;      // [N C]: z - max
  compute_type* largest;  // [N]: max, with a softcap

  __device__ void load(const compute_type* z) const {
    for (int i = threadIdx.x; i < logits; i += blockDim.x) {
      row[i] = z[i] + (a.bias == nullptr ? compute_type(0) : widen(a.bias[i]));
      if constexpr (kCapped) row[i] = capped(row[i], a.softcap);
    }
  }

  // A number beyond the last clone takes part in the reductions only.
  __device__ void normalise(int clone) const {
    const int lane = threadIdx.x % lanes, end = clone < clones ? classes : 0;
    compute_type* z = row + (clone < clones ? clone : 0) * classes;
    const auto [peak, sum] = lower_row<false>(z, lane, lanes, end);
    if (lane != 0 || clone >= clones) return;
    if constexpr (kCapped) largest[clone] = peak.value;
    const compute_type log_sum = std::log(sum);
    const bool alive = is_alive(log_sum);
    const compute_type posterior =
        alive ? log_posterior_of<compute_type>(a.posterior, clone) : compute_type(-INFINITY);
    if (a.grad == nullptr) {
      offset[clone] = alive ? posterior - log_sum : posterior;
      weight[clone] = posterior;
    } else {
      const compute_type log_mass = a.log_mass[a.first + blockIdx.x];
      // The mass is 0 where no clone has any.
      offset[clone] =
          posterior > compute_type(-INFINITY) ? posterior - log_mass - log_sum : posterior;
      weight[clone] = alive ? 1 / sum : compute_type(0);
    }
  }

  // log sum e^a over the living clones, -inf without any; by every warp for itself.
  __device__ compute_type log_mass() const {
    compute_type peak = -INFINITY, sum = 0;
    for (int n = threadIdx.x % kWarp; n < clones; n += kWarp) peak = fmax(peak, weight[n]);
    peak = warp_reduce(peak, Max());
    const bool possible = peak > compute_type(-INFINITY);
    for (int n = threadIdx.x % kWarp; n < clones; n += kWarp) {
      sum += possible ? std::exp(weight[n] - peak) : compute_type(1);
    }
    return peak + std::log(warp_reduce(sum, Sum()));
  }

  __device__ void mix(compute_type* out, compute_type log_mass) const {
    for (int c = threadIdx.x; c < classes; c += blockDim.x) {
      compute_type peak = -INFINITY;
      for (int n = 0; n < clones; ++n) {
        if (offset[n] > compute_type(-INFINITY))
          peak = fmax(peak, offset[n] + row[n * classes + c]);
      }
      compute_type sum = 0;
      for (int n = 0; n < clones; ++n) {
        if (offset[n] > compute_type(-INFINITY))
          sum += fast_exp(offset[n] + row[n * classes + c] - peak);
      }
      out[c] = peak > compute_type(-INFINITY) ? peak + std::log(sum) - log_mass : peak;
    }
  }

  __device__ compute_type share(int n, int c, const compute_type* out,
                                const compute_type* grad) const {
    // Where a class has no probability the gradient is cut.
    return out[c] > compute_type(-INFINITY)
               ? share_of(offset[n] + row[n * classes + c], out[c]) * grad[c]
               : compute_type(0);
  }

  __device__ void backward(compute_type* z, const compute_type* out,
                           const compute_type* grad) const {
    const int lane = threadIdx.x % lanes, groups = blockDim.x / lanes;
    compute_type* total = weight + clones;
    for (int first = 0; first < clones; first += groups) {
      const int clone = first + threadIdx.x / lanes;
      // A clone without mass or alive nowhere has no share, and no gradient.
      const bool flows = clone < clones && offset[clone] > compute_type(-INFINITY);
      compute_type sum = 0;
      for (int c = lane; c < (flows ? classes : 0); c += lanes) sum += share(clone, c, out, grad);
      sum = lanes_reduce(sum, lanes, Sum());
      if (lane == 0 && clone < clones) total[clone] = sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < logits; i += blockDim.x) {
      const int n = i / classes, c = i - n * classes;
      z[i] = offset[n] > compute_type(-INFINITY)
                 ? share(n, c, out, grad) - std::exp(row[i]) * weight[n] * total[n]
                 : compute_type(0);
      if constexpr (kCapped) {
        if (z[i] != 0) z[i] *= cap_derivative(row[i] + largest[n], a.softcap);
      }
    }
  }
};

template <class scalar_t, bool kCapped>
__global__ void __launch_bounds__(kSampleThreads)
    log_prob_sample_kernel(const __grid_constant__ LogProbArguments<scalar_t> a, int lanes) {
  using compute_type = compute_t<scalar_t>;
  ALRAO_DYNAMIC_SHARED(compute_type, memory);
  const int clones = static_cast<int>(a.size.clones), classes = static_cast<int>(a.size.classes);
  const LogProbSample<scalar_t, kCapped> sample{a,
                                                clones,
                                                classes,
                                                clones * classes,
                                                lanes,
                                                memory,
                                                memory + clones,
                                                memory + 3 * clones,
                                                memory + 3 * clones + clones * classes};
  compute_type* z = a.z + blockIdx.x * a.ld;
  sample.load(z);
  __syncthreads();
  const int groups = blockDim.x / lanes;
  for (int first = 0; first < clones; first += groups) {
    sample.normalise(first + threadIdx.x / lanes);
  }
  __syncthreads();
  const int64_t number = a.first + blockIdx.x, at = number * a.size.classes;
  if (a.grad == nullptr) {
    const compute_type log_mass = sample.log_mass();
    if (threadIdx.x == 0) a.log_mass[number] = log_mass;
    sample.mix(a.out + at, log_mass);
  } else {
    sample.backward(z, a.out + at, a.grad + at);
  }
}

// One row of one clone by a block.
template <class scalar_t, bool kCapped>
__global__ void __launch_bounds__(kRowThreads)
    log_prob_row_kernel(const __grid_constant__ LogProbArguments<scalar_t> a) {
  using compute_type = compute_t<scalar_t>;
  constexpr int kCount = 16 / sizeof(compute_type);
  __shared__ Softmax<compute_type> softmaxes[kRowThreads / kWarp];
  __shared__ compute_type sums[kRowThreads / kWarp];
  const int64_t classes = a.size.classes, sample = a.first + blockIdx.x;
  compute_type* z = a.z + blockIdx.x * a.ld;
  compute_type* out = a.out + sample * classes;
  const scalar_t* bias = a.bias == nullptr ? nullptr : a.bias + a.clone * classes;
  const bool bias_is_aligned = is_aligned<scalar_t, kCount>(bias);
  const bool out_is_aligned = is_aligned<compute_type, kCount>(out);
  const int64_t step = static_cast<int64_t>(blockDim.x) * kCount;
  const auto load = [&](int64_t i, compute_type* value) {
    const auto pack = load_pack<compute_type, kCount>(z + i);
    compute_type offset[kCount] = {};
    if (bias != nullptr) load_some<kCount>(bias, i, classes, bias_is_aligned, offset);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      value[j] = pack.values[j] + offset[j];
      if constexpr (kCapped) value[j] = capped(value[j], a.softcap);
    }
  };

  const compute_type none = -INFINITY;
  // Of the clones before; all read it before the reduction, and one writes it after.
  const compute_type mass_before = a.clone > 0 && a.grad == nullptr ? a.log_mass[sample] : none;
  auto softmax = Softmax<compute_type>::none();
  for (int64_t i = threadIdx.x * kCount; i < classes; i += step) {
    compute_type value[kCount];
    load(i, value);
    take_row<kCount>(softmax, value, static_cast<int>(i), static_cast<int>(classes));
  }
  softmax = block_reduce(softmax, Merge(), Softmax<compute_type>::none(), softmaxes);
  const compute_type largest = softmax.peak.value, log_sum = std::log(softmax.sum);
  const bool alive = is_alive(log_sum);
  const compute_type posterior =
      alive ? log_posterior_of<compute_type>(a.posterior, a.clone) : none;

  if (a.grad == nullptr) {
    const compute_type offset = alive ? posterior - log_sum : none;
    const compute_type log_mass = log_add(mass_before, posterior);
    if (threadIdx.x == 0) a.log_mass[sample] = log_mass;
    // Without any mass every class is at -inf already.
    const bool normalise = a.clone + 1 == a.size.clones && log_mass > none;
    const compute_type norm = normalise ? log_mass : compute_type(0);
    for (int64_t i = threadIdx.x * kCount; i < classes; i += step) {
      compute_type value[kCount], old[kCount];
      load(i, value);
      if (a.clone > 0) load_some<kCount>(out, i, classes, out_is_aligned, old);
      Pack<compute_type, kCount> pack;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        // The largest is taken off before anything small is added: logits may be huge.
        const compute_type added = alive ? offset + (value[j] - largest) : none;
        pack.values[j] = log_add(a.clone > 0 ? old[j] : none, added) - norm;
      }
      store_some(out, i, classes, out_is_aligned, pack);
    }
    return;
  }

  const compute_type offset = posterior > none ? posterior - a.log_mass[sample] - log_sum : none;
  const compute_type* grad = a.grad + sample * classes;
  const bool grad_is_aligned = is_aligned<compute_type, kCount>(grad);
  // What w and grad give, 0 where a class has no probability or the clone no share.
  const auto shares = [&](int64_t i, const compute_type* value, compute_type* share) {
    compute_type upstream[kCount], log_prob[kCount];
    load_some<kCount>(grad, i, classes, grad_is_aligned, upstream);
    load_some<kCount>(out, i, classes, out_is_aligned, log_prob);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      share[j] = offset > none && log_prob[j] > none && i + j < classes
                     ? share_of(offset + (value[j] - largest), log_prob[j]) * upstream[j]
                     : compute_type(0);
    }
  };
  compute_type total = 0;
  for (int64_t i = threadIdx.x * kCount; i < classes; i += step) {
    compute_type value[kCount], share[kCount];
    load(i, value);
    shares(i, value, share);
#pragma unroll
    for (int j = 0; j < kCount; ++j) total += share[j];
  }
  total = block_reduce(total, Sum(), compute_type(0), sums);
  const compute_type inverse = 1 / softmax.sum;
  for (int64_t i = threadIdx.x * kCount; i < classes; i += step) {
    compute_type value[kCount], share[kCount];
    load(i, value);
    shares(i, value, share);
    Pack<compute_type, kCount> pack;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      pack.values[j] =
          alive ? share[j] - fast_exp(value[j] - largest) * inverse * total : compute_type(0);
      if constexpr (kCapped) {
        if (alive) pack.values[j] *= cap_derivative(value[j], a.softcap);
      }
    }
    store_pack(z + i, pack);
  }
  if (threadIdx.x == 0) {
    a.state.keep[sample] = a.state.sum[sample] = 1;
    a.state.take[sample] = alive ? 1 : 0;
  }
}

}  // namespace

template <class scalar_t>
cudaError_t launch_log_prob(const LogProbArguments<scalar_t>& a, cudaStream_t stream) {
  const int64_t classes = a.size.classes, clones = a.size.clones;
  if (a.clone < 0) {
    const bool is_capped = a.softcap != 0;
    const int64_t shared =
        (clones * classes + (is_capped ? 4 : 3) * clones) * sizeof(compute_t<scalar_t>);
    const auto kernel = is_capped ? &log_prob_sample_kernel<scalar_t, true>
                                  : &log_prob_sample_kernel<scalar_t, false>;
    return launch(kernel, grid_of(a.chunk), sample_threads(clones * classes), shared, stream, a,
                  lanes_for(classes));
  }
  const auto kernel =
      a.softcap != 0 ? &log_prob_row_kernel<scalar_t, true> : &log_prob_row_kernel<scalar_t, false>;
  return launch(kernel, grid_of(a.chunk), sample_threads(classes), 0, stream, a);
}

#define ALRAO_INSTANTIATE(scalar_t) \
  template cudaError_t launch_log_prob<scalar_t>(const LogProbArguments<scalar_t>&, cudaStream_t)

ALRAO_FOR_EVERY_TYPE(ALRAO_INSTANTIATE);

}  // namespace alrao::cuda
