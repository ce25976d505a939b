// Clone after clone, for many classes: one buffer holds a chunk of one clone's logits.
//
// The responsibilities are not known before all clones have been seen, so every sample keeps a
// running maximum m of a_n + logp_n, the sum of its exponentials and the sum of what they weight,
// rescaled when m grows, as flash attention does over keys.
//
// A block takes rows one after the other. A row is read once, into shared memory, where the pass
// for the maximum and the sum and the one for the gradient find it; what does not fit there is read
// twice. Each thread copies and reads its own entries, so that nothing waits for a barrier but the
// row's sums, and it asks for those of the next row as soon as it has used the present ones: the
// memory is never idle. Rows of which no gradient is wanted are not kept.
//
// Bytes, per logit: the product writes 4, this kernel reads 4 and writes 2 (bfloat16) or 4, the
// products read that twice: 14 to 20; the sum for a bias reads it once more. Per sample, clone and
// feature 16 for the sum of terms. Four launches a clone and chunk.
#include "common/cuda/async_copy.cuh"
#include "common/cuda/device.cuh"
#include "mixture/cuda/options.cuh"

namespace alrao::cuda {
namespace {

// Of a block; float64 needs more registers a thread, and more shared memory for sums.
template <class scalar_t>
constexpr int kRowThreads = sizeof(compute_t<scalar_t>) == 8 ? 256 : 512;
// Groups of a row's copies: as many waits a row.
constexpr int kStages = 4;

// Which options a kernel knows: none of the classes; those that treat all but the target's alike
// (smoothing, z-loss), for an instruction or two an entry; all.
enum class Known { kNone, kUniform, kAll };

// Everything about a row but its entries.
template <class scalar_t, bool kGaussian, Known kOptions>
struct Row {
  using compute_type = compute_t<scalar_t>;
  static constexpr int kCount = 16 / sizeof(compute_type);  // entries of an access

  const RowArguments<scalar_t>& a;
  const int local;  // number in the chunk
  bool counted;
  int32_t target;  // -1: none
  compute_type target_logit;

  __device__ Row(const RowArguments<scalar_t>& arguments, int number)
      : a(arguments), local(number) {
    counted = counts_with_options(a.options, a.target, sample());
    target = -1;
    if constexpr (!kGaussian) {
      const int64_t y = a.target.classes[sample()];
      // What is no class is impossible for every clone: the loss shows it.
      target = y >= 0 && y < a.size.classes ? static_cast<int32_t>(y) : -1;
      target_logit = -INFINITY;
      if (target >= 0) {
        target_logit = logits()[target];
        if (a.bias != nullptr) target_logit += widen(bias()[target]);
        if (kOptions == Known::kAll && a.options.softcap != 0) {
          target_logit = capped(target_logit, a.options.softcap);
        }
      }
    }
  }

  // Made again where they are needed: registers are short.
  __device__ int64_t sample() const { return a.first + local; }
  __device__ compute_type* logits() const { return a.z + local * a.ld; }
  __device__ const scalar_t* bias() const { return a.bias + a.clone * a.size.classes; }

  // What makes of the product's entries logits, or errors.
  __device__ bool has_changes() const {
    return a.bias != nullptr || kGaussian || (kOptions == Known::kAll && a.options.softcap != 0);
  }

  // That, from entry i on; beyond the last class anything.
  __device__ void change(int i, compute_type* value) const {
    if (a.bias != nullptr) {
      compute_type offset[kCount];
      const bool aligned = is_aligned<scalar_t, kCount>(bias());
      load_some<kCount>(bias(), i, a.size.classes, aligned, offset);
#pragma unroll
      for (int j = 0; j < kCount; ++j) value[j] += offset[j];
    }
    if constexpr (kGaussian) {
      const scalar_t* outputs = a.target.values + sample() * a.size.classes;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if (i + j < a.size.classes) value[j] -= widen(outputs[i + j]);
      }
    } else if constexpr (kOptions == Known::kAll) {
      if (a.options.softcap != 0) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) value[j] = capped(value[j], a.options.softcap);
      }
    }
  }

  // The gradient, which lies over the logits. `value` holds logits less the largest, or errors.
  __device__ void store(int i, const compute_type* value, compute_type scale,
                        compute_type norm) const {
    Pack<scalar_t, kCount> pack;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const compute_type e = kGaussian ? value[j] : fast_exp(value[j]);
      // 0: no gradient, whatever they are.
      compute_type gradient = scale == 0 ? compute_type(0) : e * scale;
      if (scale != 0 && i + j == target) gradient -= norm;
      round_to(gradient, pack.values[j]);
    }
    store_pack(reinterpret_cast<scalar_t*>(logits()) + i, pack);
  }

  __device__ void store_uniform(int i, const compute_type* value,
                                const OptionTerms<compute_type>& terms) const {
    Pack<scalar_t, kCount> pack;
    const bool flows = terms.flows();
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const auto gradient =
          terms.gradient(fast_exp(value[j]), 1, static_cast<compute_type>(i + j == target));
      round_to(flows ? gradient : compute_type(0), pack.values[j]);
    }
    store_pack(reinterpret_cast<scalar_t*>(logits()) + i, pack);
  }

  __device__ void store_with_options(int i, const compute_type* value,
                                     const OptionTerms<compute_type>& terms,
                                     compute_type largest) const {
    Pack<scalar_t, kCount> pack;
    const bool flows = terms.flows();
    const OptionEntries<compute_type, kCount> entries(a.options, sample(), a.size.classes, i);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      auto gradient =
          terms.gradient(fast_exp(value[j]), entries.weight[j], entries.share(j, i + j == target));
      if (a.options.softcap != 0) {
        gradient *= cap_derivative(value[j] + largest, a.options.softcap);
      }
      round_to(flows ? gradient : compute_type(0), pack.values[j]);
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
        if (a.options.losses != nullptr) {
          a.options.losses[sample] = static_cast<compute_type>(loss);
        }
      }
    }
    return alive && counted ? scale : compute_type(0);
  }

  __device__ compute_type loss_of(compute_type nll) const {
    return a.options.row_weight == nullptr ? nll : a.options.row_weight[sample()] * nll;
  }

  __device__ compute_type norm() const {
    const compute_type norm =
        a.norm.on_device == nullptr ? static_cast<compute_type>(a.norm.value) : *a.norm.on_device;
    return weight_with_options(a.options, sample(), norm);
  }

  __device__ OptionTerms<compute_type> finish_options(
      const OptionSoftmax<compute_type>& seen) const {
    const auto& [peak, sum] = seen.softmax;
    auto terms = option_terms(a.options, a.size.classes, LogitSums<compute_type>{peak.value, sum},
                              target_logit, target, seen.sums, norm());
    const bool correct = terms.alive() && peak.place == target;
    finish(terms.likelihood, correct, terms.scale, terms.objective);
    if (!counted) terms.scale = NAN;
    return terms;
  }

  __device__ compute_type finish_classes(const Softmax<compute_type>& seen) const {
    const LogitSums<compute_type> logits{seen.peak.value, seen.sum};
    const compute_type log_likelihood = a.target.options.log_likelihood(target_logit, logits);
    const bool correct = is_alive(log_likelihood) && seen.peak.place == target;
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

// The entries of a row that a thread has: every kCount of them at i, i + step, ... The first
// `staged` entries of the row go by way of shared memory.
template <class compute_type>
struct RowEntries {
  static constexpr int kCount = 16 / sizeof(compute_type);

  compute_type* memory;
  const int staged, step, first;
  const int per_stage;  // a multiple of `step`

  __device__ RowEntries(compute_type* shared, int num_staged)
      : memory(shared),
        staged(num_staged),
        step(blockDim.x * kCount),
        first(threadIdx.x * kCount),
        per_stage((num_staged + step * kStages - 1) / (step * kStages) * step) {}

  __device__ int begin(int stage) const {
    const int at = stage * per_stage;
    return at < staged ? at : staged;
  }

  // body(i, value) for the entries of a stage; they are kept where it returns true.
  template <class Body>
  __device__ void visit(int stage, const Body& body) const {
    for (int i = begin(stage) + first; i < begin(stage + 1); i += step) {
      auto pack = load_pack<compute_type, kCount>(memory + i);
      if (body(i, pack.values)) store_pack(memory + i, pack);
    }
  }

  __device__ void copy(int stage, const compute_type* row) const {
    for (int i = begin(stage) + first; i < begin(stage + 1); i += step) {
      copy_async(memory + i, row + i);
    }
  }
};

template <class scalar_t, bool kGaussian, Known kOptions>
__global__ void __launch_bounds__(kRowThreads<scalar_t>, kOptions == Known::kNone ? 2 : 1)
    mixture_row_kernel(const __grid_constant__ RowArguments<scalar_t> a, int staged) {
  using compute_type = compute_t<scalar_t>;
  using TheRow = Row<scalar_t, kGaussian, kOptions>;
  constexpr int kCount = TheRow::kCount, kWarps = kRowThreads<scalar_t> / kWarp;
  // What a thread gathers of a row: squares, or a softmax, with or without the options' sums.
  using Seen =
      std::conditional_t<kGaussian, compute_type,
                         std::conditional_t<kOptions == Known::kNone, Softmax<compute_type>,
                                            OptionSoftmax<compute_type>>>;
  ALRAO_DYNAMIC_SHARED(compute_type, memory);
  __shared__ Seen scratch[kWarps];
  const int classes = static_cast<int>(a.size.classes), rows = static_cast<int>(a.chunk);
  const RowEntries<compute_type> entries(memory, staged < classes ? staged : classes);

#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    entries.copy(stage, a.z + blockIdx.x * a.ld);
    commit_copies();
  }
  for (int local = blockIdx.x; local < rows; local += gridDim.x) {
    const TheRow row(a, local);
    const bool changes = row.has_changes();
    Seen seen;
    if constexpr (kGaussian) {
      seen = 0;
    } else {
      seen = Seen::none();
    }
    const auto take = [&](int i, compute_type* value) {
      if (changes) row.change(i, value);
      if constexpr (kGaussian) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          if (i + j < classes) seen += value[j] * value[j];
        }
      } else if constexpr (kOptions == Known::kAll) {
        const OptionEntries<compute_type, kCount> options(a.options, row.sample(), classes, i);
        seen.template take<kCount>(options, value, i, classes);
      } else if constexpr (kOptions == Known::kUniform) {
        seen.template take_uniform<kCount>(a.options.smoothing != 0, value, i, classes);
      } else {
        take_row<kCount>(seen, value, i, classes);
      }
      return changes;
    };
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      // The copies of this stage are the oldest under way.
      if (stage == 0) wait_for_copies<kStages - 1>();
      if (stage == 1) wait_for_copies<kStages - 2>();
      if (stage == 2) wait_for_copies<kStages - 3>();
      if (stage == 3) wait_for_copies<kStages - 4>();
      entries.visit(stage, take);
    }
    const compute_type* z = row.logits();
    // Several accesses are under way at a time.
    constexpr int kUnroll = 4;
    for (int base = entries.staged; base < classes; base += kUnroll * entries.step) {
      Pack<compute_type, kCount> packs[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int i = base + u * entries.step + entries.first;
        if (i < classes) packs[u] = load_pack<compute_type, kCount>(z + i);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int i = base + u * entries.step + entries.first;
        if (i < classes) take(i, packs[u].values);
      }
    }

    compute_type scale = 0, largest = 0;
    OptionTerms<compute_type> terms;
    if constexpr (kGaussian) {
      scale = row.finish_outputs(block_reduce(seen, Sum(), compute_type(0), scratch));
    } else if constexpr (kOptions != Known::kNone) {
      seen = block_reduce(seen, Merge(), Seen::none(), scratch);
      largest = seen.softmax.peak.value;
      terms = row.finish_options(seen);
    } else {
      seen = block_reduce(seen, Merge(), Seen::none(), scratch);
      largest = seen.peak.value;
      scale = row.finish_classes(seen);
    }
    if (!a.need_gradient) continue;
    const compute_type norm = row.norm();
    const auto give = [&](int i, compute_type* value) {
      if constexpr (!kGaussian) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) value[j] -= largest;
      }
      if constexpr (kOptions == Known::kAll) {
        row.store_with_options(i, value, terms, largest);
      } else if constexpr (kOptions == Known::kUniform) {
        row.store_uniform(i, value, terms);
      } else {
        row.store(i, value, scale, norm);
      }
      return false;
    };
    const bool has_next = local + gridDim.x < rows;
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      entries.visit(stage, give);
      if (has_next) entries.copy(stage, row.logits() + gridDim.x * a.ld);
      commit_copies();
    }
    for (int base = entries.staged; base < classes; base += entries.step) {
      const int i = base + entries.first;
      Pack<compute_type, kCount> pack;
      if (i < classes) {
        pack = load_pack<compute_type, kCount>(z + i);
        if (changes) row.change(i, pack.values);
      }
      // A narrower gradient lies over logits that other threads read in this round, or before.
      __syncthreads();
      if (i < classes) give(i, pack.values);
    }
  }
}

// The entries of a row that go by way of shared memory, and the blocks that a multiprocessor holds.
template <class scalar_t>
struct RowPlan {
  int threads = 128, staged = 0;
  int64_t blocks;

  RowPlan(const RowArguments<scalar_t>& a, const DeviceLimits& limits) : blocks(a.chunk) {
    using compute_type = compute_t<scalar_t>;
    constexpr int kCount = 16 / sizeof(compute_type);
    while (threads < kRowThreads<scalar_t> && threads * kCount * kStages < a.size.classes)
      threads *= 2;
    if (!a.need_gradient) return;
    // Beside the kernel's own, and what the system takes.
    constexpr int64_t kReserved = 3 * 1024;
    const int64_t step = threads * kCount;
    const int64_t fits = (limits.block_shared - kReserved) / int64_t(sizeof(compute_type));
    const int64_t row = ceil_div(a.size.classes, step) * step;
    staged = static_cast<int>(row < fits ? row : fits / step * step);
    const int64_t per_multiprocessor = limits.shared / (shared_bytes() + kReserved);
    const int64_t resident =
        limits.multiprocessors * (per_multiprocessor < 1   ? 1
                                  : per_multiprocessor > 4 ? 4
                                                           : per_multiprocessor);
    if (resident < blocks) blocks = resident;
  }

  int64_t shared_bytes() const { return staged * int64_t(sizeof(compute_t<scalar_t>)); }
};

}  // namespace

template <class scalar_t>
cudaError_t launch_mixture_rows(const RowArguments<scalar_t>& a, cudaStream_t stream) {
  const bool gaussian = a.target.classes == nullptr;
  const auto kernel =
      gaussian                         ? &mixture_row_kernel<scalar_t, true, Known::kNone>
      : !a.options.are_of_classes()    ? &mixture_row_kernel<scalar_t, false, Known::kNone>
      : a.options.treat_others_alike() ? &mixture_row_kernel<scalar_t, false, Known::kUniform>
                                       : &mixture_row_kernel<scalar_t, false, Known::kAll>;
  DeviceLimits limits;
  const cudaError_t status = device_limits(limits);
  if (status != cudaSuccess) return status;
  const RowPlan<scalar_t> plan(a, limits);
  return launch(kernel, grid_of(plan.blocks), plan.threads, plan.shared_bytes(), stream, a,
                plan.staged);
}

#define ALRAO_INSTANTIATE(scalar_t) \
  template cudaError_t launch_mixture_rows<scalar_t>(const RowArguments<scalar_t>&, cudaStream_t)

ALRAO_FOR_EVERY_TYPE(ALRAO_INSTANTIATE);

}  // namespace alrao::cuda
