// All clones of a sample at once: softmax, likelihoods, responsibilities, loss and the gradients to
// the logits, for N C logits that fit into shared memory.
//
// Bytes, per logit: 4 read, 2 (bfloat16) to 4 (float32) written for each of G and r G, so 8 to 12.
// The copies without non-finite values, which keep 0 * inf out of the products, add 4 (bfloat16) or
// 8 a weight and a feature. Small heads (10 x 10 classes, up to 512 samples) are bound by their
// launches, five or six.
//
// A sample belongs to a warp where N C is small, else to a block. Its logits are read once, 16
// bytes an access, into shared memory; a group of lanes takes a clone, so that ten classes do not
// idle 22 lanes. Samples are dealt to a number of groups that depends on the shape alone, and what
// a group sums up is added by the finishing kernel in order.
#include "mixture/cuda/options.cuh"

namespace alrao::cuda {
namespace {

constexpr int kWarpGroups = 4;  // warps of a block where a warp takes a sample
constexpr int64_t kMaxParts = 1024;
constexpr int64_t kWarpShared = 16 * 1024;

// The shared memory of the group of threads that takes a sample.
template <class scalar_t>
struct Shared {
  using compute_type = compute_t<scalar_t>;

  double* sums;         // [2 N + 1]: what the group has seen so far
  compute_type* scale;  // [N]: what turns an entry of `row` into the gradient; 0 for the dead
  compute_type* share;  // [N]: log of a_n p_n, then the responsibility
  // With options, [N] each: see OptionTerms, and the largest logit.
  compute_type *spread, *hit, *largest;
  compute_type* row;  // [N C] logits, then their exponentials

  static ALRAO_HOST_DEVICE int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }
  static ALRAO_HOST_DEVICE int64_t vectors(bool with_options) { return with_options ? 5 : 2; }
  static ALRAO_HOST_DEVICE int64_t bytes(int64_t clones, int64_t classes, bool with_options) {
    const int64_t row = (clones * classes + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
    return aligned((2 * clones + 1) * sizeof(double)) +
           aligned(vectors(with_options) * clones * sizeof(compute_type)) +
           row * sizeof(compute_type);
  }

  __device__ Shared(unsigned char* memory, int clones, bool with_options) {
    sums = reinterpret_cast<double*>(memory);
    memory += aligned((2 * clones + 1) * sizeof(double));
    scale = reinterpret_cast<compute_type*>(memory);
    share = scale + clones;
    spread = share + clones;
    hit = spread + clones;
    largest = hit + clones;
    row = reinterpret_cast<compute_type*>(
        memory + aligned(vectors(with_options) * clones * sizeof(compute_type)));
  }
};

template <bool kBlock>
__device__ void sync_group() {
  if constexpr (kBlock) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

template <class scalar_t, bool kGaussian, bool kBlock, bool kOptions>
struct JointSample {
  using compute_type = compute_t<scalar_t>;

  const JointArguments<scalar_t>& a;
  const Shared<scalar_t> s;
  const int clones, classes, logits;
  const int thread, threads;  // of the group
  const int lanes;            // that take a clone together
  const compute_type norm;    // of a counted sample

  __device__ void run(int64_t local) const {
    const int64_t sample = a.first + local;
    bool counted = true;
    int target = -1;
    if constexpr (!kGaussian) {
      const int64_t y = a.target.classes[sample];
      counted = a.target.options.counts(y);
      // What is no class is impossible for every clone: the loss shows it.
      target = y >= 0 && y < classes ? static_cast<int>(y) : -1;
    }
    compute_type weight = norm;
    if constexpr (kOptions) {
      counted = counts_with_options(a.options, a.target, sample);
      weight = weight_with_options(a.options, sample, norm);
    }
    load(local, sample);
    if (a.finite_x != nullptr) copy_features(sample);
    sync_group<kBlock>();
    const int groups = threads / lanes;
    for (int first = 0; first < clones; first += groups) {
      const int clone = first + thread / lanes;
      if constexpr (kOptions && !kGaussian) {
        evaluate_with_options(clone, sample, counted, target, weight);
      } else {
        evaluate(clone, counted, target, weight);
      }
    }
    sync_group<kBlock>();
    if (thread < kWarp) mix(sample, counted, weight);
    sync_group<kBlock>();
    if (a.g != nullptr || a.rg != nullptr) store(local, target, weight);
    sync_group<kBlock>();
  }

  // Logits with bias, or errors.
  __device__ void load(int64_t local, int64_t sample) const {
    constexpr int kCount = 16 / sizeof(compute_type);
    const bool aligned = a.bias != nullptr && is_aligned<scalar_t, kCount>(a.bias);
    const compute_type* z = a.z + local * a.ld;
    for (int i = thread * kCount; i < logits; i += threads * kCount) {
      auto pack = load_pack<compute_type, kCount>(z + i);
      if (a.bias != nullptr) {
        compute_type bias[kCount];
        load_some<kCount>(a.bias, i, logits, aligned, bias);
#pragma unroll
        for (int j = 0; j < kCount; ++j) pack.values[j] += bias[j];
      }
      if constexpr (kGaussian) {
        int c = i % classes;
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          pack.values[j] -= widen(a.target.values[sample * classes + c]);
          c = c + 1 == classes ? 0 : c + 1;
        }
      } else if constexpr (kOptions) {
        if (a.options.softcap != 0) {
#pragma unroll
          for (int j = 0; j < kCount; ++j) {
            pack.values[j] = capped(pack.values[j], a.options.softcap);
          }
        }
      }
      store_pack(s.row + i, pack);
    }
  }

  __device__ void copy_features(int64_t sample) const {
    const int64_t features = a.size.features;
    const scalar_t* from = a.x + sample * features;
    scalar_t* to = a.finite_x + sample * features;
    constexpr int kCount = 16 / sizeof(scalar_t);
    const bool aligned = is_aligned<scalar_t, kCount>(from) && is_aligned<scalar_t, kCount>(to);
    for (int64_t i = thread * kCount; i < features; i += threads * kCount) {
      compute_type value[kCount];
      load_some<kCount>(from, i, features, aligned, value);
      Pack<scalar_t, kCount> pack;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        round_to(is_finite(value[j]) ? value[j] : compute_type(0), pack.values[j]);
      }
      if (aligned && i + kCount <= features) {
        store_pack(to + i, pack);
      } else {
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          if (i + j < features) to[i + j] = pack.values[j];
        }
      }
    }
  }

  // Log-likelihood of one clone; a number beyond the last takes part in the reductions only.
  __device__ void evaluate(int clone, bool counted, int target, compute_type weight) const {
    const int lane = thread % lanes;
    const int end = clone < clones ? classes : 0;
    compute_type* row = s.row + (clone < clones ? clone : 0) * classes;
    compute_type log_likelihood, score, scale;
    if constexpr (kGaussian) {
      compute_type squared = 0;
      for (int c = lane; c < end; c += lanes) squared += row[c] * row[c];
      squared = lanes_reduce(squared, lanes, Sum());
      log_likelihood = a.target.density.log_likelihood(squared);
      score = is_alive(log_likelihood) ? squared : compute_type(INFINITY);
      scale = static_cast<compute_type>(a.target.density.inverse_variance) * weight;
    } else {
      const compute_type at_target = target >= 0 && end > 0 ? row[target] : compute_type(-INFINITY);
      __syncwarp();
      const auto [peak, sum] = lower_row<true>(row, lane, lanes, end);
      const LogitSums<compute_type> sums{peak.value, sum};
      log_likelihood = a.target.options.log_likelihood(at_target, sums);
      score = is_alive(log_likelihood) && peak.place == target;
      scale = a.target.options.gradient_factor(weight, sums);
    }
    if (lane != 0 || clone >= clones) return;
    const bool alive = is_alive(log_likelihood);
    s.scale[clone] = alive && counted ? scale : compute_type(0);
    s.share[clone] = alive ? log_posterior_of<compute_type>(a.posterior, clone) + log_likelihood
                           : compute_type(-INFINITY);
    if (!counted) return;
    s.sums[clone] += alive ? -log_likelihood : compute_type(INFINITY);
    s.sums[clones + clone] += score;
  }

  // The row holds what the logits are below the largest, afterwards.
  __device__ void evaluate_with_options(int clone, int64_t sample, bool counted, int target,
                                        compute_type weight) const {
    const int lane = thread % lanes;
    const int end = clone < clones ? classes : 0;
    compute_type* row = s.row + (clone < clones ? clone : 0) * classes;
    const compute_type at_target = target >= 0 && end > 0 ? row[target] : compute_type(-INFINITY);
    __syncwarp();
    const auto [peak, sum] = lower_row<false>(row, lane, lanes, end);
    auto sums = OptionSums<compute_type>::none();
    if (a.options.smoothing != 0 || a.options.soft != nullptr) {
      for (int c = lane; c < end; c += lanes) {
        const OptionEntries<compute_type, 1> entry(a.options, sample, classes, c);
        sums.add(entry.weight[0], entry.soft[0], row[c]);
      }
      sums = lanes_reduce(sums, lanes, AddOptionSums());
    }
    if (lane != 0 || clone >= clones) return;
    const auto terms = option_terms(a.options, classes, LogitSums<compute_type>{peak.value, sum},
                                    at_target, target, sums, weight);
    const bool alive = terms.alive();
    s.scale[clone] = counted ? terms.scale : compute_type(NAN);
    s.spread[clone] = terms.spread;
    s.hit[clone] = terms.hit;
    s.largest[clone] = peak.value;
    s.share[clone] = alive ? log_posterior_of<compute_type>(a.posterior, clone) + terms.objective
                           : compute_type(-INFINITY);
    if (!counted) return;
    s.sums[clone] += alive ? -terms.likelihood : compute_type(INFINITY);
    s.sums[clones + clone] += alive && peak.place == target;
  }

  // Responsibilities, by one warp.
  __device__ void mix(int64_t sample, bool counted, compute_type weight) const {
    compute_type max = -INFINITY;
    for (int n = thread; n < clones; n += kWarp) max = fmax(max, s.share[n]);
    max = warp_reduce(max, Max());
    const bool possible = max > compute_type(-INFINITY);
    compute_type sum = 0;
    for (int n = thread; n < clones; n += kWarp) {
      const compute_type e = possible ? std::exp(s.share[n] - max) : compute_type(0);
      s.share[n] = e;
      sum += e;
    }
    sum = warp_reduce(sum, Sum());
    if (possible) {
      for (int n = thread; n < clones; n += kWarp) s.share[n] /= sum;
    }
    if (thread == 0 && counted) {
      const compute_type nll = mixture_nll(RunningMixture<compute_type>{max, sum});
      if constexpr (kOptions) {
        const compute_type scale = a.options.scale == nullptr ? 1 : *a.options.scale;
        const compute_type loss = a.options.row_weight == nullptr ? nll : weight * scale * nll;
        s.sums[2 * clones] += loss;
        if (a.options.losses != nullptr) a.options.losses[sample] = loss;
      } else {
        s.sums[2 * clones] += nll;
      }
    } else if (kOptions && thread == 0 && a.options.losses != nullptr) {
      a.options.losses[sample] = 0;
    }
  }

  __device__ void store(int64_t local, int target, compute_type norm) const {
    constexpr int kCount = 16 / sizeof(scalar_t);
    for (int i = thread * kCount; i < logits; i += threads * kCount) {
      Pack<scalar_t, kCount> own, mixed;
      int n = i / classes, c = i - n * classes;
      // Wide accesses: one by one the lanes would meet in few banks.
      constexpr int kWide = 16 / sizeof(compute_type);
      compute_type row[kCount];
#pragma unroll
      for (int j = 0; j < kCount; j += kWide) {
        const auto pack = load_pack<compute_type, kWide>(s.row + i + j);
#pragma unroll
        for (int k = 0; k < kWide; ++k) row[j + k] = pack.values[k];
      }
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        compute_type g = 0, r = 0;
        if (i + j < logits) {
          const compute_type scale = s.scale[n];
          r = s.share[n];
          // Selected, not multiplied: what a dead clone left in the row may be anything.
          if constexpr (kOptions && !kGaussian) {
            const OptionTerms<compute_type> terms{0, 0, scale, s.spread[n], s.hit[n]};
            if (terms.flows()) {
              const OptionEntries<compute_type, 1> entry(a.options, a.first + local, classes, c);
              g = terms.gradient(fast_exp(row[j]), entry.weight[0], entry.share(0, c == target));
              if (a.options.softcap != 0) {
                g *= cap_derivative(row[j] + s.largest[n], a.options.softcap);
              }
            }
          } else if (scale != 0) {
            g = row[j] * scale;
            if (!kGaussian && c == target) g -= norm;
          }
        }
        round_to(g, own.values[j]);
        round_to(g * r, mixed.values[j]);
        if (++c == classes) {
          c = 0;
          ++n;
        }
      }
      if (a.g != nullptr) store_pack(a.g + local * a.ld + i, own);
      if (a.rg != nullptr) store_pack(a.rg + local * a.ld + i, mixed);
    }
  }
};

template <class scalar_t, bool kGaussian, bool kBlock, bool kOptions>
__global__ void __launch_bounds__(kSampleThreads,
                                  kOptions || sizeof(compute_t<scalar_t>) == 8 ? 1 : 2)
    mixture_joint_kernel(const __grid_constant__ JointArguments<scalar_t> a, int sample_blocks,
                         int lanes) {
  ALRAO_DYNAMIC_SHARED(unsigned char, memory);
  __shared__ double scratch[kSampleThreads / kWarp];
  if (static_cast<int>(blockIdx.x) >= sample_blocks) {
    copy_finite(a.weight, blockIdx.x - sample_blocks, gridDim.x - sample_blocks);
    return;
  }
  using compute_type = compute_t<scalar_t>;
  compute_type norm = static_cast<compute_type>(a.norm.value);
  if (a.norm.on_device != nullptr) {
    norm = *a.norm.on_device;
  } else if (a.norm.divisor.items != nullptr) {
    norm = static_cast<compute_type>(1 / a.norm.divisor.get());
  } else if (a.norm.count) {
    const double count = count_targets(a.target, a.size.samples, scratch);
    norm = static_cast<compute_type>(1 / fmax(count, 1.0));
  }

  const int clones = static_cast<int>(a.size.clones);
  const int classes = static_cast<int>(a.size.classes);
  const int threads = kBlock ? blockDim.x : kWarp;
  const int group = kBlock ? 0 : threadIdx.x / kWarp, groups = kBlock ? 1 : kWarpGroups;
  const int thread = kBlock ? threadIdx.x : threadIdx.x % kWarp;
  const Shared<scalar_t> shared(memory + group * Shared<scalar_t>::bytes(clones, classes, kOptions),
                                clones, kOptions);
  const int64_t part = static_cast<int64_t>(blockIdx.x) * groups + group;
  for (int i = thread; i < 2 * clones + 1; i += threads) shared.sums[i] = 0;
  sync_group<kBlock>();
  const JointSample<scalar_t, kGaussian, kBlock, kOptions> sample{
      a, shared, clones, classes, clones * classes, thread, threads, lanes, norm};
  for (int64_t local = part; local < a.chunk; local += int64_t(sample_blocks) * groups) {
    sample.run(local);
  }
  for (int i = thread; i < 2 * clones + 1; i += threads) {
    a.out.sums[i * a.out.parts + a.first_part + part] = shared.sums[i];
  }
}

// How a launch deals samples to groups of threads.
template <class scalar_t>
struct Layout {
  int64_t shared;
  bool block;
  int threads, groups;
  int lanes;

  Layout(int64_t clones, int64_t classes, bool with_options) {
    shared = Shared<scalar_t>::bytes(clones, classes, with_options);
    block = shared * kWarpGroups > kWarpShared;
    groups = block ? 1 : kWarpGroups;
    threads = block ? sample_threads(clones * classes) : kWarp * kWarpGroups;
    lanes = lanes_for(classes);
    // No warp without a clone, where that leaves enough of them.
    const int64_t busy = clones * lanes;
    if (block && busy % kWarp == 0 && busy >= 256 && busy < threads) {
      threads = static_cast<int>(busy);
    }
  }

  int64_t blocks(int64_t chunk) const {
    return ceil_div(chunk < kMaxParts ? chunk : kMaxParts, groups);
  }
};

template <class scalar_t, bool kGaussian, bool kOptions>
cudaError_t launch_joint(const JointArguments<scalar_t>& a, cudaStream_t stream) {
  const Layout<scalar_t> layout(a.size.clones, a.size.classes, kOptions);
  const int sample_blocks = static_cast<int>(layout.blocks(a.chunk));
  const int64_t grid = sample_blocks + copy_blocks(a.weight, layout.threads);
  const auto kernel = layout.block ? &mixture_joint_kernel<scalar_t, kGaussian, true, kOptions>
                                   : &mixture_joint_kernel<scalar_t, kGaussian, false, kOptions>;
  return launch(kernel, grid_of(grid), layout.threads, layout.shared * layout.groups, stream, a,
                sample_blocks, layout.lanes);
}

}  // namespace

template <class scalar_t>
bool fits_joint(int64_t clones, int64_t classes, bool with_options) {
  constexpr int64_t kMostLogits = 1 << 20;  // beyond, the product is not to be computed
  return clones < kMostLogits && classes < kMostLogits &&
         Shared<scalar_t>::bytes(clones, classes, with_options) <= 48 * 1024;
}

template <class scalar_t>
int64_t joint_parts(int64_t chunk, int64_t clones, int64_t classes, bool with_options) {
  const Layout<scalar_t> layout(clones, classes, with_options);
  return layout.blocks(chunk) * layout.groups;
}

template <class scalar_t>
cudaError_t launch_mixture_joint(const JointArguments<scalar_t>& arguments, cudaStream_t stream) {
  const bool gaussian = arguments.target.classes == nullptr;
  if (arguments.options.any) {
    return gaussian ? launch_joint<scalar_t, true, true>(arguments, stream)
                    : launch_joint<scalar_t, false, true>(arguments, stream);
  }
  return gaussian ? launch_joint<scalar_t, true, false>(arguments, stream)
                  : launch_joint<scalar_t, false, false>(arguments, stream);
}

#define ALRAO_INSTANTIATE(scalar_t)                                        \
  template bool fits_joint<scalar_t>(int64_t, int64_t, bool);              \
  template int64_t joint_parts<scalar_t>(int64_t, int64_t, int64_t, bool); \
  template cudaError_t launch_mixture_joint<scalar_t>(const JointArguments<scalar_t>&, cudaStream_t)

ALRAO_FOR_EVERY_TYPE(ALRAO_INSTANTIATE);

}  // namespace alrao::cuda
