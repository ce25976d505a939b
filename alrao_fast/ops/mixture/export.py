"""The mixture's prediction where there are only torch's operations: in a graph for ONNX."""

import torch
from torch import Tensor

from alrao_fast.ops.mixture import log_prob  # noqa: F401  defines the op
from alrao_fast.reference import switch_mixture as reference


def _decomposed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_posterior: Tensor,
    memory_budget: int,
    *options: float,
) -> tuple[Tensor, Tensor]:
    """`switch_mixture_log_prob` as the reference has it."""
    inputs = x, weight, bias, log_posterior
    return reference.switch_mixture_log_prob(*inputs, *options), reference.log_mass(*inputs)


# The exporter of torch.export's graphs decomposes what ONNX has no operator for by this table. Others keep the op.
for _name in ("switch_mixture_log_prob", "switch_mixture_log_prob__triton"):
    torch._decomp.register_decomposition(getattr(torch.ops.alrao_fast, _name).default)(_decomposed)
