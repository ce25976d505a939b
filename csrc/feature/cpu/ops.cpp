// The feature optimizers under the CPU key.
#include "common/cpu/isa.h"
#include "feature/cpu/pieces.h"
#include "feature/op.h"

namespace alrao::cpu {
namespace {

template <class Options, class Piece>
void step(MultiTensor& tensors, const Gradients& grads, Options options,
          const ScalarTensors& scalars, const Piece& piece) {
  options.lr *= read_scalar(tensors.op(), "lr", scalars.lr, 1);
  options.grad_factor /= read_scalar(tensors.op(), "grad_scale", scalars.grad_scale, 1);
  const bool skip = read_scalar(tensors.op(), "found_inf", scalars.found_inf, 0) != 0;
  tensors.bind(grads);
  if (!skip) {
    tensors.read_steps(options.averaging);
    tensors.for_each_piece([&](const FeatureRecord& record, int64_t begin, int64_t end) {
      Options own = options;
      own.lr *= warmup_factor(options.warmup_steps, record.step);
      piece(record, own, begin, end);
    });
    tensors.count_steps();
  }
  tensors.release();
}

#define ALRAO_UPDATE(stem) ALRAO_KERNEL(stem##_piece)
ALRAO_DEFINE_FEATURE_OPS

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alrao_fast, CPU, m) { register_feature_ops(m); }

// One sparse gradient sends the call here; the checks say which one it is.
STABLE_TORCH_LIBRARY_IMPL(alrao_fast, SparseCPU, m) { register_feature_ops(m); }

}  // namespace alrao::cpu
