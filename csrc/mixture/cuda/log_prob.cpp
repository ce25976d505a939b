// Log-probabilities of the mixture, and their gradient: the logits are made again rather than kept,
// and multiplied in float32 at least, since the sums over classes cancel.
#include "mixture/checks.h"
#include "mixture/cuda/problem.h"

namespace alrao::cuda {
namespace {

using torch::stable::Tensor;

template <class T>
LogProbOutputs forward(const MixtureInputs& inputs, const MixtureSizes& size, int64_t memory_budget,
                       double softcap, cudaStream_t stream) {
  using Compute = compute_t<T>;
  const MixtureProblem<T> p(inputs, size, memory_budget, stream);
  const auto out = p.gemm.template empty<Compute>({size.samples, size.classes});
  const auto log_mass = p.gemm.template empty<Compute>({size.samples});
  const bool joint = p.is_joint(softcap != 0);
  const int64_t chunk = p.chunk(p.row_distance(joint) * sizeof(Compute));
  const auto z = p.gemm.template empty<Compute>({chunk, p.row_distance(joint)});
  auto a = p.template chunk_arguments<LogProbArguments<T>>(z, joint);
  a.out = data_of<Compute>(out);
  a.log_mass = data_of<Compute>(log_mass);
  a.softcap = static_cast<Compute>(softcap);
  for (a.first = 0; a.first < size.samples; a.first += chunk) {
    a.chunk = std::min(chunk, size.samples - a.first);
    for (int64_t clone = 0; clone < (joint ? 1 : size.clones); ++clone) {
      a.clone = joint ? -1 : clone;
      p.logits(a.z, a.first, a.chunk, clone, joint);
      check_launch("log_prob", launch_log_prob(a, stream));
    }
  }
  return {out, log_mass};
}

template <class T>
MixtureGradients backward(const LogProbGradient& arguments, const MixtureSizes& size,
                          cudaStream_t stream) {
  using Compute = compute_t<T>;
  const auto& [samples, features, clones, classes] = size;
  const bool need_dx = arguments.need_dx, need_dw = arguments.need_dw;
  const MixtureProblem<T> p(arguments.inputs, size, arguments.memory_budget, stream);
  auto [dx, dweight, dbias] = p.template gradients<Compute>(need_dx, need_dw, need_dw);
  if (samples == 0) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
    return {dx, dweight, dbias};
  }
  const Tensor upstream = dense(arguments.grad), value = dense(arguments.log_prob);
  const Tensor log_mass = dense(arguments.log_mass);
  const bool joint = p.is_joint(arguments.softcap != 0);
  const int64_t columns = p.columns(joint), ld = p.row_distance(joint);
  const bool needs_term = need_dx && !joint;
  const int64_t chunk = p.chunk((ld + (needs_term ? features : 0)) * sizeof(Compute));
  const auto z = p.gemm.template empty<Compute>({chunk, ld});
  const auto term = p.result(needs_term, {chunk, features});
  const auto x = p.template finite_copy<Compute>(p.x_data(), need_dw ? samples : 0, features);
  const StateMemory<Compute> state(p.gemm, joint ? 0 : samples);
  auto a = p.template chunk_arguments<LogProbArguments<T>>(z, joint);
  a.out = data_of<Compute>(value);
  a.log_mass = data_of<Compute>(log_mass);
  a.grad = data_of<const Compute>(upstream);
  a.state = state.get();
  a.softcap = static_cast<Compute>(arguments.softcap);
  for (int64_t clone = 0; clone < (joint ? 1 : clones); ++clone) {
    const auto weight = p.template finite_copy<Compute>(
        p.weight_data() + clone * classes * features, need_dx ? columns : 0, features);
    for (a.first = 0; a.first < samples; a.first += chunk) {
      a.chunk = std::min(chunk, samples - a.first);
      a.clone = joint ? -1 : clone;
      p.logits(a.z, a.first, a.chunk, clone, joint);
      check_launch("log_prob_backward", launch_log_prob(a, stream));
      const auto dz = row_major<const Compute>(a.z, a.chunk, columns, ld);
      CombineArguments<Compute> combine{};
      if (need_dw) {
        p.weight_gradient(data_of<Compute>(dweight), clone, dz, data_of<const Compute>(x), a.first);
        combine.columns = {
            dz.data, a.chunk, columns, ld, data_of<Compute>(dbias) + clone * classes, a.first > 0};
      }
      if (need_dx) {
        Compute* out = joint ? data_of<Compute>(dx) + a.first * features : data_of<Compute>(term);
        p.features_gradient(out, dz, data_of<const Compute>(weight));
        if (!joint) combine.term = out;
      }
      combine.state = a.state;
      combine.first = a.first;
      combine.chunk = a.chunk;
      combine.features = features;
      combine.total = data_of<Compute>(dx);
      combine.is_first = clone == 0;
      combine.is_last = clone + 1 == clones;
      check_launch("mixture_combine", launch_mixture_combine(combine, stream));
    }
  }
  return {dx, dweight, dbias};
}

}  // namespace

LogProbOutputs mixture_log_prob(const MixtureInputs& inputs, int64_t memory_budget, double softcap,
                                cudaStream_t stream) {
  const MixtureSizes size = check_mixture(inputs, memory_budget);
  check_softcap(softcap);
  return in_type_of(inputs, [&](auto zero) {
    return forward<decltype(zero)>(inputs, size, memory_budget, softcap, stream);
  });
}

MixtureGradients mixture_log_prob_backward(const LogProbGradient& arguments, cudaStream_t stream) {
  const MixtureSizes size = check_log_prob_gradient(arguments);
  return in_type_of(arguments.inputs,
                    [&](auto zero) { return backward<decltype(zero)>(arguments, size, stream); });
}

}  // namespace alrao::cuda
