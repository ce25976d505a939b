#include "switch/checks.h"

#include <utility>

#include "common/checks.h"

namespace alrao {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// N is that of logw, unless the two others, whose sizes these are, agree on another.
void check_logw(const Tensor& logw, const Tensor& log_posterior, const char* other_name,
                int64_t other_size) {
  ALRAO_CHECK(logw.dim() == 2 && logw.size(0) == 2 && logw.size(1) > 0, "logw: got shape ",
              shape_of(logw), ", expected [2, N] with N >= 1");
  const bool outvoted =
      log_posterior.dim() == 1 && log_posterior.size(0) == other_size && logw.size(1) != other_size;
  ALRAO_CHECK(!outvoted, "logw: got shape ", shape_of(logw), ", expected [2, ", other_size,
              "], as log_posterior and ", other_name, " have it");
}

// The size of the last of `dim` dimensions.
int64_t last_size(const Tensor& tensor, int64_t dim) {
  return tensor.dim() == dim ? tensor.size(dim - 1) : -1;
}

void check_state(const Tensor& logw, const Tensor& log_posterior, const Tensor& t, double theta) {
  check_dtype("logw", logw, {ScalarType::Double});
  check_shape("log_posterior", log_posterior, {logw.size(1)});
  check_dtype("log_posterior", log_posterior, {ScalarType::Double});
  check_shape("t", t, {});
  check_dtype("t", t, {ScalarType::Long});
  check_contiguous("logw", logw);
  check_contiguous("log_posterior", log_posterior);
  check_same_device("log_posterior", log_posterior, "logw", logw);
  check_same_device("t", t, "logw", logw);
  ALRAO_CHECK(theta > 0 && theta < 1, "theta: got ", theta, ", expected 0 < theta < 1");
}

}  // namespace

void check_switch_update(const Tensor& logw, const Tensor& log_posterior, const Tensor& t,
                         const Tensor& log_likelihood, double theta) {
  check_logw(logw, log_posterior, "log_likelihood", last_size(log_likelihood, 1));
  check_state(logw, log_posterior, t, theta);
  check_shape("log_likelihood", log_likelihood, {logw.size(1)});
  check_dtype("log_likelihood", log_likelihood, {ScalarType::Float, ScalarType::Double});
  check_same_device("log_likelihood", log_likelihood, "logw", logw);
}

void check_switch_observe(const Tensor& logw, const Tensor& log_posterior, const Tensor& t,
                          const Tensor& running, const Tensor& stats, double theta) {
  check_logw(logw, log_posterior, "stats", last_size(stats, 2));
  check_state(logw, log_posterior, t, theta);
  for (const auto& [name, tensor] : {std::pair{"running", &running}, std::pair{"stats", &stats}}) {
    check_shape(name, *tensor, {3, logw.size(1)});
    check_dtype(name, *tensor, {ScalarType::Double});
    check_contiguous(name, *tensor);
    check_same_device(name, *tensor, "logw", logw);
  }
}

}  // namespace alrao
