#include "feature/cuda/sgd.h"
#include "feature/cuda/step.h"
#include "feature/sgd_op.h"

namespace alrao::cuda {
namespace {

void step(MultiTensor& tensors, const std::vector<AtenTensorHandle>& grads,
          const SgdOptions& options, const ScalarTensors& scalars) {
  step_on_cuda(tensors, grads, options, scalars, false, launch_feature_sgd);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alrao_fast, CUDA, m) {
  m.impl("feature_sgd_", TORCH_BOX(&feature_sgd_<step>));
  m.impl("_feature_sgd_planned_", feature_sgd_planned_<step>);
}

// One sparse gradient sends the call here; the checks say which one it is.
STABLE_TORCH_LIBRARY_IMPL(alrao_fast, SparseCUDA, m) {
  m.impl("feature_sgd_", TORCH_BOX(&feature_sgd_<step>));
  m.impl("_feature_sgd_planned_", feature_sgd_planned_<step>);
}

}  // namespace alrao::cuda
