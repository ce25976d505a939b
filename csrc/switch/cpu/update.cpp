#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "switch/checks.h"
#include "switch/math.h"

namespace alrao {
namespace {

using torch::stable::Tensor;

// `evidence` holds the log-likelihoods and is overwritten.
void update(double* logw, double* log_posterior, int64_t* t, std::vector<double>& evidence,
            double theta) {
  const int64_t n = static_cast<int64_t>(evidence.size());
  double* unstable_logw = logw;
  double* stable_logw = logw + n;
  double largest = -INFINITY, reference = -INFINITY;
  for (double& l : evidence) {
    l = switch_evidence(l);
    largest = std::max(largest, l);
  }
  for (int64_t i = 0; i < n; ++i) {
    evidence[i] = switch_lag(evidence[i], largest);
    reference = std::max(reference, evidence[i] + std::max(unstable_logw[i], stable_logw[i]));
  }
  // Every clone with mass is at -inf: the observation says nothing.
  if (reference == -INFINITY) return;

  std::vector<SwitchMass> mass(n);
  double unstable = 0;
  for (int64_t i = 0; i < n; ++i) {
    mass[i] = {switch_mass(unstable_logw[i], evidence[i], reference),
               switch_mass(stable_logw[i], evidence[i], reference)};
    unstable += mass[i].unstable;
  }
  const double share = switch_share(unstable, *t, n);
  double total = 0;
  for (SwitchMass& m : mass) {
    m = switch_redistribute(m, share, *t, theta);
    total += m.unstable + m.stable;
  }
  for (int64_t i = 0; i < n; ++i) {
    unstable_logw[i] = std::log(mass[i].unstable / total);
    stable_logw[i] = std::log(mass[i].stable / total);
    log_posterior[i] = std::log((mass[i].unstable + mass[i].stable) / total);
  }
  *t += 1;
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

void switch_update(const Tensor& logw, const Tensor& log_posterior, const Tensor& t,
                   const Tensor& log_likelihood, double theta) {
  check_switch_update(logw, log_posterior, t, log_likelihood, theta);
  const int64_t stride = log_likelihood.stride(0);
  const bool is_double = log_likelihood.scalar_type() == torch::headeronly::ScalarType::Double;
  const void* likelihood = log_likelihood.const_data_ptr();
  std::vector<double> evidence(logw.size(1));
  for (size_t i = 0; i < evidence.size(); ++i) {
    evidence[i] = is_double ? static_cast<const double*>(likelihood)[i * stride]
                            : static_cast<const float*>(likelihood)[i * stride];
  }
  update(data<double>(logw), data<double>(log_posterior), data<int64_t>(t), evidence, theta);
}

void switch_observe(const Tensor& logw, const Tensor& log_posterior, const Tensor& t,
                    const Tensor& running, const Tensor& stats, bool mean, double theta) {
  check_switch_observe(logw, log_posterior, t, running, stats, theta);
  const int64_t n = logw.size(1);
  const double* observed = static_cast<const double*>(stats.const_data_ptr());
  double* sums = data<double>(running);
  for (int64_t i = 0; i < 3 * n; ++i) sums[i] += observed[i];
  std::vector<double> evidence(n);
  for (int64_t i = 0; i < n; ++i) {
    evidence[i] = switch_observed(observed[i], observed[2 * n + i], mean);
  }
  update(data<double>(logw), data<double>(log_posterior), data<int64_t>(t), evidence, theta);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alrao_fast, CPU, m) {
  m.impl("switch_update_", TORCH_BOX(&switch_update));
  m.impl("switch_observe_", TORCH_BOX(&switch_observe));
}

}  // namespace alrao
