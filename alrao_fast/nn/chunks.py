"""Functions of samples, run on chunks of them: what they need in between never stands for all samples at once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alrao_fast.ops import derivatives


def in_chunks(function: Callable[..., Any], size: int, *rows: Tensor) -> list[Any]:
    """What the function returns for each `size` samples of the tensors `rows [B, ...]`.

    With several chunks and gradients the function runs again in the backward.
    """
    parts = list(zip(*(tensor.split(max(size, 1)) for tensor in rows), strict=True))
    again = len(parts) > 1 and torch.is_grad_enabled() and not derivatives.transformed()
    return [
        checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False)
        if again
        else function(*part)
        for part in parts
    ]
