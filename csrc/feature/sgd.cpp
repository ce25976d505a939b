#include "feature/sgd.h"

#include "feature/sgd_op.h"

namespace alrao {
namespace {

void step(MultiTensor& tensors, const std::vector<AtenTensorHandle>& grads,
          const SgdOptions& options, const ScalarTensors& scalars) {
  step_on_cpu(tensors, grads, options, scalars, feature_sgd_cpu);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alrao_fast, CPU, m) {
  m.impl("feature_sgd_", TORCH_BOX(&feature_sgd_<step>));
  m.impl("_feature_sgd_planned_", feature_sgd_planned_<step>);
}

// One sparse gradient sends the call here; the checks say which one it is.
STABLE_TORCH_LIBRARY_IMPL(alrao_fast, SparseCPU, m) {
  m.impl("feature_sgd_", TORCH_BOX(&feature_sgd_<step>));
  m.impl("_feature_sgd_planned_", feature_sgd_planned_<step>);
}

}  // namespace alrao
