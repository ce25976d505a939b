"""Gradient clipping for networks with clones: the backbone and each clone by a norm of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from alrao_fast import live
from alrao_fast.arguments import Flag, Kind, Optional, checked, shown
from alrao_fast.nn.clones import LinearClones

# Added to a norm before dividing by it, as torch.nn.utils.clip_grad_norm_ does.
_EPS = 1e-6


class _NormType(Kind):
    """A real number, infinity included."""

    expected = "a number, or math.inf for the largest entry"

    def check(self, name: str, value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise self.refuse(TypeError, name, value) from None
        if math.isnan(number) or isinstance(value, bool):
            raise self.refuse(ValueError, name, value)
        return number


class _MaxNorm(_NormType):
    expected = "a number >= 0, or math.inf to clip nothing"

    def check(self, name: str, value: Any) -> float:
        number = super().check(name, value)
        if number < 0:
            raise self.refuse(ValueError, name, value)
        return number


_KINDS: dict[str, Kind] = {
    "max_norm": _MaxNorm(),
    "norm_type": _NormType(),
    "error_if_nonfinite": Flag(),
    "foreach": Optional(Flag()),
}


class GradNorms(NamedTuple):
    """Norms of gradients: `backbone`, a scalar, and `clones`, one `[N]` per head, in the order of the heads."""

    backbone: Tensor
    clones: tuple[Tensor, ...]


class _Split(NamedTuple):
    # Parameters with gradients, and of each head its gradients [N, ...].
    backbone: list[Tensor]
    clones: list[list[Tensor]]


def _split(net: nn.Module | Iterable[Tensor] | Tensor) -> _Split:
    """The parameters with gradients, those of heads apart."""
    if isinstance(net, nn.Module):
        params: list[Any] = list(net.parameters())
        heads: Iterator[Any] = (m for m in net.modules() if isinstance(m, LinearClones))
    else:
        try:
            params = [net] if isinstance(net, Tensor) else list(net)
        except TypeError:
            params = [None]
        if not all(isinstance(p, Tensor) for p in params):
            raise TypeError(f"net: got {shown(net)}, expected a torch.nn.Module or parameters")
        heads = iter(live.heads)
    left = {id(p): p for p in params}
    clones = []
    for head in heads:
        own = [left.pop(id(p)) for p in head.parameters(recurse=False) if id(p) in left]
        grads = [p.grad for p in own if p.grad is not None]
        if grads:
            clones.append(grads)
    backbone = [p for p in left.values() if p.grad is not None]
    for param in backbone:
        if param.grad is not None and param.grad.layout is not torch.strided:
            raise RuntimeError(
                f"net: got a gradient of layout {param.grad.layout}: sparse gradients are not supported"
            )
    return _Split(backbone, clones)


def _norms_of_clones(grads: list[Tensor], norm_type: float) -> Tensor:
    """`[N]`, of all gradients `[N, ...]` of a head together; float32 at least."""
    wide = torch.promote_types(grads[0].dtype, torch.float32)
    parts = [torch.linalg.vector_norm(g.flatten(1), norm_type, 1, dtype=wide) for g in grads]
    return (
        parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts), norm_type, 0)
    )


def _norms(split: _Split, norm_type: float, foreach: bool | None) -> GradNorms:
    grads = [p.grad for p in split.backbone if p.grad is not None]
    backbone = get_total_norm(grads, norm_type, foreach=foreach)
    return GradNorms(backbone, tuple(_norms_of_clones(grads, norm_type) for grads in split.clones))


@torch.no_grad()
def grad_norms(
    net: nn.Module | Iterable[Tensor], norm_type: float = 2.0, *, foreach: bool | None = None
) -> GradNorms:
    """The norms by which `clip_grad_norm_` clips: of the backbone's gradients together, and of each clone's.

    A scalar and one `[N]` per head, on the gradients' devices; 0 without gradients. Errors as there.
    """
    norm_type = _KINDS["norm_type"].check("norm_type", norm_type)
    return _norms(_split(net), norm_type, _KINDS["foreach"].check("foreach", foreach))


@torch.no_grad()
def clip_grad_norm_(
    net: nn.Module | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Clip the backbone's gradients by their norm, and each clone's by its own, all to `max_norm`, in place.

    Each clone has the gradient of its own loss. In one norm over all parameters, as torch.nn.utils.clip_grad_norm_
    takes it, the N clones count N times, and one that diverges takes the step of the whole network away. A network
    without clones is clipped as torch's function clips it.

    Args:
        net: an `AlraoModel` or any module with clones in it (in DistributedDataParallel, too), or parameters, whose
            heads are found; several devices and dtypes are taken as torch takes them.
        max_norm: the largest norm that each part keeps; math.inf reads the norm alone.
        norm_type: 2, math.inf or any other p.
        error_if_nonfinite: raise RuntimeError, with nothing written, if the norm of any part is not finite. Reading it
            waits for the device. Otherwise such a part becomes NaN or 0, as torch's function makes it, and the others
            are clipped as ever.
        foreach: of the backbone's gradients, as in torch's function.

    Returns:
        The norm of the backbone's gradients before clipping, a scalar; `grad_norms` gives those of the clones, too.

    Under a GradScaler call `scaler.unscale_(optimizer)` before, as with torch's function. Nothing waits for the device,
    so it may be captured in a CUDA graph (`GraphedStep(..., before_step=)`). TypeError or ValueError, naming the
    argument, for one of another kind; RuntimeError for sparse gradients.
    """
    # Not locals(): torch.compile of 2.11 does not trace it.
    given = checked(
        _KINDS,
        {
            "max_norm": max_norm,
            "norm_type": norm_type,
            "error_if_nonfinite": error_if_nonfinite,
            "foreach": foreach,
        },
    )
    split = _split(net)
    norms = _norms(split, given["norm_type"], given["foreach"])
    if given["error_if_nonfinite"]:
        for name, norm in (("backbone", norms.backbone), *(("clones", n) for n in norms.clones)):
            if not norm.isfinite().all():
                raise RuntimeError(
                    f"the norm of the gradients of the {name} is {norm.tolist()}, expected finite numbers; "
                    "error_if_nonfinite=False scales them all the same"
                )
    max_norm = given["max_norm"]
    if not _keeps_all(max_norm, norms.backbone):
        clip_grads_with_norm_(split.backbone, max_norm, norms.backbone, given["foreach"])
    for grads, own in zip(split.clones, norms.clones):
        if _keeps_all(max_norm, own):
            continue
        factor = (max_norm / (own + _EPS)).clamp(max=1)
        for grad in grads:
            grad.mul_(factor.to(grad.dtype).view(-1, *[1] * (grad.dim() - 1)))
    return norms.backbone


def _keeps_all(max_norm: float, norm: Tensor) -> bool:
    """Whether no gradient would change, as far as that can be known without waiting for a device.

    A product with 1 reads and writes every gradient.
    """
    if norm.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bool((norm + _EPS <= max_norm).all())
