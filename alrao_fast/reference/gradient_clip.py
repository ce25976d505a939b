"""Clipping by norms of parts: each segment of the gradients has a norm of its own, and is scaled by it alone.

With the gradients of the backbone in segment 0 and those of clone n in segment 1 + n, for each segment s::

    norms[s]  = (sum_i |g_i|^p)^(1/p) over the entries of s          (p = inf: the largest |g_i|)
    factor[s] = min(1, max_norm / (norms[s] + 1e-6))                  g = factor[s] * g

as torch.nn.utils.clip_grad_norm_ has it for all gradients together. A clone's gradient is that of its own loss: in one
norm over all parameters N losses would count, and a clone that explodes would stop the network.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

EPS = 1e-6


@torch.no_grad()
def gradient_norms(
    grads: Sequence[Tensor],
    firsts: Sequence[int],
    counts: Sequence[int],
    segments: int,
    norm_type: float,
) -> Tensor:
    """The norms `[segments]`, float64, 0 where nothing is. `grads[t]` is that of the segments `firsts[t]`, ...,
    `firsts[t] + counts[t] - 1`, one for each index of dim 0, or all of it of one segment."""
    parts: list[list[Tensor]] = [[] for _ in range(segments)]
    for grad, first, count in zip(grads, firsts, counts, strict=True):
        if grad.numel():
            own = torch.linalg.vector_norm(grad.double().reshape(count, -1), norm_type, dim=1)
            for n in range(count):
                parts[first + n].append(own[n])
    norms = grads[0].new_zeros(segments, dtype=torch.float64)
    for segment, own_parts in enumerate(parts):
        if own_parts:
            norms[segment] = torch.linalg.vector_norm(torch.stack(own_parts), norm_type)
    return norms


def joint_norms(norms: Sequence[Tensor], norm_type: float) -> Tensor:
    """The norms `[segments]` of gradients that lie apart, on the first one's device, from those of each part."""
    together = torch.stack([own.to(norms[0].device) for own in norms])
    return torch.linalg.vector_norm(together, norm_type, dim=0)


@torch.no_grad()
def gradient_clip_by_(
    grads: Sequence[Tensor],
    firsts: Sequence[int],
    counts: Sequence[int],
    norms: Tensor,
    max_norm: float,
) -> None:
    """Scale the gradients in place by their segments' norms; `max_norm` inf leaves them alone, whatever the norms.

    A norm of NaN makes its segment NaN, an infinite one makes it 0 and its infinities NaN, as in torch.
    """
    if max_norm == math.inf:
        return
    factors = (max_norm / (norms + EPS)).clamp(max=1)
    for grad, first, count in zip(grads, firsts, counts, strict=True):
        own = factors[first : first + count].to(torch.promote_types(grad.dtype, torch.float32))
        grad.copy_(grad * (own[0] if count == 1 else own.view(count, *[1] * (grad.dim() - 1))))
