#include "feature/adam_op.h"
#include "feature/cuda/adam.h"
#include "feature/cuda/step.h"

namespace alrao::cuda {
namespace {

void step(MultiTensor& tensors, const std::vector<AtenTensorHandle>& grads,
          const AdamOptions& options, const ScalarTensors& scalars) {
  step_on_cuda(tensors, grads, options, scalars, options.amsgrad, launch_feature_adam);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alrao_fast, CUDA, m) {
  m.impl("feature_adam_", TORCH_BOX(&feature_adam_<step>));
  m.impl("_feature_adam_planned_", feature_adam_planned_<step>);
}

// One sparse gradient sends the call here; the checks say which one it is.
STABLE_TORCH_LIBRARY_IMPL(alrao_fast, SparseCUDA, m) {
  m.impl("feature_adam_", TORCH_BOX(&feature_adam_<step>));
  m.impl("_feature_adam_planned_", feature_adam_planned_<step>);
}

}  // namespace alrao::cuda
