#include "cuda/on_device.h"
#include "cuda/switch_mixture_ops.h"

STABLE_TORCH_LIBRARY_IMPL(alrao_fast, CUDA, m) {
  alrao::cuda::MixtureOps<alrao::cuda::OnDevice>::add_to(m);
}
