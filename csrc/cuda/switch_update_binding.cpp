#include "cuda/on_device.h"
#include "cuda/switch_update_ops.h"

STABLE_TORCH_LIBRARY_IMPL(alrao_fast, CUDA, m) {
  alrao::cuda::SwitchOps<alrao::cuda::OnDevice>::add_to(m);
}
