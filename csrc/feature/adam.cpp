#include "feature/adam.h"

#include "feature/adam_op.h"

namespace alrao {
namespace {

void step(MultiTensor& tensors, const std::vector<AtenTensorHandle>& grads,
          const AdamOptions& options, const ScalarTensors& scalars) {
  step_on_cpu(tensors, grads, options, scalars, feature_adam_cpu);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alrao_fast, CPU, m) {
  m.impl("feature_adam_", TORCH_BOX(&feature_adam_<step>));
  m.impl("_feature_adam_planned_", feature_adam_planned_<step>);
}

// One sparse gradient sends the call here; the checks say which one it is.
STABLE_TORCH_LIBRARY_IMPL(alrao_fast, SparseCPU, m) {
  m.impl("feature_adam_", TORCH_BOX(&feature_adam_<step>));
  m.impl("_feature_adam_planned_", feature_adam_planned_<step>);
}

}  // namespace alrao
