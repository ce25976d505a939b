#include "switch/checks.h"

#include <utility>

#include "common/checks.h"

namespace alrao {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_switch_update(const Tensor& logw, const Tensor& log_posterior, const Tensor& t,
                         const Tensor& log_likelihood, double theta) {
  ALRAO_CHECK(logw.dim() == 2 && logw.size(0) == 2 && logw.size(1) > 0, "logw: got shape ",
              shape_of(logw), ", expected [2, N] with N >= 1");
  const int64_t num_clones = logw.size(1);
  check_dtype("logw", logw, {ScalarType::Double});
  check_shape("log_posterior", log_posterior, {num_clones});
  check_dtype("log_posterior", log_posterior, {ScalarType::Double});
  check_shape("t", t, {});
  check_dtype("t", t, {ScalarType::Long});
  check_shape("log_likelihood", log_likelihood, {num_clones});
  check_dtype("log_likelihood", log_likelihood, {ScalarType::Float, ScalarType::Double});
  check_contiguous("logw", logw);
  check_contiguous("log_posterior", log_posterior);
  check_same_device("log_posterior", log_posterior, "logw", logw);
  check_same_device("t", t, "logw", logw);
  check_same_device("log_likelihood", log_likelihood, "logw", logw);
  ALRAO_CHECK(theta > 0 && theta < 1, "theta: got ", theta, ", expected 0 < theta < 1");
}

void check_switch_observe(const Tensor& logw, const Tensor& log_posterior, const Tensor& t,
                          const Tensor& running, const Tensor& stats, double theta) {
  // The first row of the statistics stands for the log-likelihoods: same size, same type.
  check_switch_update(logw, log_posterior, t, log_posterior, theta);
  for (const auto& [name, tensor] : {std::pair{"running", &running}, std::pair{"stats", &stats}}) {
    check_shape(name, *tensor, {3, logw.size(1)});
    check_dtype(name, *tensor, {ScalarType::Double});
    check_contiguous(name, *tensor);
    check_same_device(name, *tensor, "logw", logw);
  }
}

}  // namespace alrao
