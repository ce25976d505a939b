#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "switch_update.h"
#include "switch_update_math.h"

namespace alrao {
namespace {

using torch::stable::Tensor;

void switch_update_cpu(const Tensor& logw, const Tensor& log_posterior, const Tensor& t,
                       const Tensor& log_likelihood, double theta) {
  check_switch_update(logw, log_posterior, t, log_likelihood, theta);
  const int64_t n = logw.size(1);
  const int64_t stride = log_likelihood.stride(0);
  const bool is_double = log_likelihood.scalar_type() == torch::headeronly::ScalarType::Double;
  const void* likelihood = log_likelihood.const_data_ptr();

  double* unstable_logw = static_cast<double*>(logw.mutable_data_ptr());
  double* stable_logw = unstable_logw + n;
  double* posterior = static_cast<double*>(log_posterior.mutable_data_ptr());
  int64_t* step = static_cast<int64_t*>(t.mutable_data_ptr());

  std::vector<double> evidence(n);
  double reference = -INFINITY;
  for (int64_t i = 0; i < n; ++i) {
    const double value = is_double ? static_cast<const double*>(likelihood)[i * stride]
                                   : static_cast<const float*>(likelihood)[i * stride];
    evidence[i] = switch_evidence(value);
    reference = std::max(reference, evidence[i] + std::max(unstable_logw[i], stable_logw[i]));
  }
  // Every clone is at -inf: the observation says nothing.
  if (reference == -INFINITY) return;

  std::vector<SwitchMass> mass(n);
  double unstable = 0;
  for (int64_t i = 0; i < n; ++i) {
    mass[i] = {switch_mass(unstable_logw[i], evidence[i], reference),
               switch_mass(stable_logw[i], evidence[i], reference)};
    unstable += mass[i].unstable;
  }
  const double share = switch_share(unstable, *step, n);
  double total = 0;
  for (SwitchMass& m : mass) {
    m = switch_redistribute(m, share, *step, theta);
    total += m.unstable + m.stable;
  }
  for (int64_t i = 0; i < n; ++i) {
    unstable_logw[i] = std::log(mass[i].unstable / total);
    stable_logw[i] = std::log(mass[i].stable / total);
    posterior[i] = std::log((mass[i].unstable + mass[i].stable) / total);
  }
  *step += 1;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alrao_fast, CPU, m) {
  m.impl("switch_update_", TORCH_BOX(&switch_update_cpu));
}

}  // namespace alrao
