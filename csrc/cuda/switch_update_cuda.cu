#include "cuda/switch_update_cuda.h"

#include "cuda/block.cuh"
#include "cuda/runtime.cuh"
#include "switch_update_math.h"

namespace alrao::cuda {
namespace {

constexpr int kMaxThreads = 256;

// One block; a thread takes clones threadIdx.x, threadIdx.x + blockDim.x, ... Masses are computed
// twice, so that no number of clones needs storage.
template <typename scalar_t>
__global__ void switch_update_kernel(double* logw, double* log_posterior, int64_t* t,
                                     const scalar_t* log_likelihood, int64_t num_clones,
                                     int64_t stride, double theta) {
  __shared__ double scratch[kMaxThreads / kWarp];
  double* unstable_logw = logw;
  double* stable_logw = logw + num_clones;
  const int64_t step = *t;

  double reference = -INFINITY;
  for (int64_t i = threadIdx.x; i < num_clones; i += blockDim.x) {
    const double evidence = switch_evidence(log_likelihood[i * stride]);
    reference = fmax(reference, evidence + fmax(unstable_logw[i], stable_logw[i]));
  }
  reference = block_reduce(reference, Max(), -INFINITY, scratch);
  // Every clone is at -inf: the observation says nothing.
  if (reference == -INFINITY) return;

  double unstable = 0, stable = 0;
  for (int64_t i = threadIdx.x; i < num_clones; i += blockDim.x) {
    const double evidence = switch_evidence(log_likelihood[i * stride]);
    unstable += switch_mass(unstable_logw[i], evidence, reference);
    stable += switch_mass(stable_logw[i], evidence, reference);
  }
  unstable = block_reduce(unstable, Sum(), 0.0, scratch);
  stable = block_reduce(stable, Sum(), 0.0, scratch);
  const double share = switch_share(unstable, step, num_clones);
  // Redistribution is linear and its shares add up to one: the total follows from the sums.
  const SwitchMass sums = switch_redistribute({unstable, stable}, share * num_clones, step, theta);
  const double total = sums.unstable + sums.stable;

  for (int64_t i = threadIdx.x; i < num_clones; i += blockDim.x) {
    const double evidence = switch_evidence(log_likelihood[i * stride]);
    const SwitchMass mass = switch_redistribute({switch_mass(unstable_logw[i], evidence, reference),
                                                 switch_mass(stable_logw[i], evidence, reference)},
                                                share, step, theta);
    unstable_logw[i] = log(mass.unstable / total);
    stable_logw[i] = log(mass.stable / total);
    log_posterior[i] = log((mass.unstable + mass.stable) / total);
  }
  // After the barriers above every thread has read the old value.
  if (threadIdx.x == 0) *t = step + 1;
}

}  // namespace

template <typename scalar_t>
cudaError_t launch_switch_update(double* logw, double* log_posterior, int64_t* t,
                                 const scalar_t* log_likelihood, int64_t num_clones, int64_t stride,
                                 double theta, cudaStream_t stream) {
  const int threads = num_clones <= kWarp ? kWarp : kMaxThreads;
  return launch(switch_update_kernel<scalar_t>, 1, threads, 0, stream, logw, log_posterior, t,
                log_likelihood, num_clones, stride, theta);
}

template cudaError_t launch_switch_update<float>(double*, double*, int64_t*, const float*, int64_t,
                                                 int64_t, double, cudaStream_t);
template cudaError_t launch_switch_update<double>(double*, double*, int64_t*, const double*,
                                                  int64_t, int64_t, double, cudaStream_t);

}  // namespace alrao::cuda
