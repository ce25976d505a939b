"""clip_grad_norm_: gradient clipping that knows the clones; and the norms alone."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alrao_fast import flat_shards, live, sharding
from alrao_fast.arguments import FLOATS, Flag, Number, Optional, shown
from alrao_fast.nn.clones import LinearClones
from alrao_fast.ops.checks import check, check_dtype
from alrao_fast.ops.gradient_clip import KINDS, clip
from alrao_fast.reference.gradient_clip import joint_norms

_CLIP = {**KINDS, "error_if_nonfinite": Flag(), "foreach": Optional(Flag())}
_SCALE = Optional(Number(above=0, live=True, words="the loss scale, a finite number > 0"))


class GradNorms(NamedTuple):
    """Norms of gradients, float64: `backbone`, a scalar, and `clones`, one `[N]` for each head that has gradients.

    The heads are in the order of the modules or of the parameters.
    """

    backbone: Tensor
    clones: tuple[Tensor, ...]


def clip_grad_norm_(
    net: nn.Module | Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    grad_scale: float | Tensor | None = None,
) -> Tensor:
    """Clip the gradients of the backbone, and of each clone by itself, to a norm of at most `max_norm`, in place.

        loss.backward()
        norm = alrao.clip_grad_norm_(net, 1.0)
        opt.step()

    Each clone's gradient is that of its own loss. `torch.nn.utils.clip_grad_norm_` takes one norm of all parameters, in
    which N clones count: the backbone is clipped for what they do, and a clone whose learning rate is too high stops
    the network. Here the backbone (all that is in no clone) has one norm, and `weight[n]` and `bias[n]` of a head have
    another for each n; each is scaled by `min(1, max_norm / (norm + 1e-6))`. Without heads it is torch's function.

    Args:
        net: an `AlraoModel`, any module with heads inside (a wrapped one too, as by DistributedDataParallel), a
            parameter or an iterable of parameters, of which those in a head are known by themselves.
        max_norm: >= 0, a float; with inf nothing is written.
        norm_type: the order of the norms, > 0 or inf ("inf", too).
        error_if_nonfinite: raise RuntimeError, before anything is written, if a norm is infinite or NaN. Waits for the
            device.
        foreach: taken for torch's signature; there is one implementation.
        grad_scale: the loss scale, where the gradients still are multiplied by it (`scaler.get_scale()`; a tensor on
            the device spares the wait): `max_norm` and the returned norm are those of the unscaled gradients. Not
            needed after `scaler.unscale_(opt)`.

    Returns the backbone's norm before clipping, a float64 scalar on the device of the gradients, without waiting for
    it; `grad_norms` returns the clones', too. All norms are summed up in float64.

    A norm that is not finite does to its part what it does in torch, and nothing to the others: NaN makes the part's
    gradients NaN, inf makes them 0 and NaN. A clone that is dead for the loss has the gradient 0.

    Norms of DTensors are those of the whole gradients: their ranks exchange one number per segment, and all of them
    have to call this. A gradient that is a partial sum on each rank is summed up first, in `param.grad`.

    Raises TypeError or ValueError, naming it, for an argument of another kind; RuntimeError for gradients that are
    sparse, complex or of 8 bits. Then no gradient has changed.
    """
    # Not by `locals()`, which torch 2.11 cannot compile.
    max_norm = _CLIP["max_norm"].check("max_norm", max_norm)
    norm_type = _CLIP["norm_type"].check("norm_type", norm_type)
    error_if_nonfinite = _CLIP["error_if_nonfinite"].check("error_if_nonfinite", error_if_nonfinite)
    _CLIP["foreach"].check("foreach", foreach)
    parts = _Parts(net, grad_scale)
    if error_if_nonfinite:
        norms = parts.norms(norm_type)
        parts.check_finite(norms)
        parts.clip_by(norms, max_norm)
    else:
        norms = parts.clip(max_norm, norm_type)
    return norms[0]


def grad_norms(
    net: nn.Module | Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    *,
    grad_scale: float | Tensor | None = None,
) -> GradNorms:
    """The norms by which `clip_grad_norm_` clips: of the backbone, and of each clone of each head; nothing is written.

    Arguments and errors are those of `clip_grad_norm_`.
    """
    norm_type = KINDS["norm_type"].check("norm_type", norm_type)
    parts = _Parts(net, grad_scale)
    backbone, *clones = parts.norms(norm_type).split(parts.sizes)
    return GradNorms(backbone[0], tuple(clones))


class _Group(NamedTuple):
    """Gradients of one device, or what is on this rank of DTensors placed alike, and their segments."""

    device: torch.device
    grads: list[Tensor]
    firsts: list[int]
    counts: list[int]
    # The placements of DTensors with their mesh.
    mesh: Any = None
    placements: Any = ()

    def clip(self, segments: int, **options: Any) -> Tensor:
        """The norms `[segments]` of what is here."""
        if not self.grads:
            return torch.zeros(segments, dtype=torch.float64, device=self.device)
        return clip(self.grads, self.firsts, self.counts, segments, **options)

    def norms(self, segments: int, norm_type: float) -> Tensor:
        """The norms of what all ranks have, the same bits on each."""
        norms = self.clip(segments, max_norm=math.inf, norm_type=norm_type)
        for dim, placement in enumerate(self.placements):
            if not placement.is_replicate() and self.mesh.size(dim) > 1:
                # Summed up in the order of the ranks, which an all-reduce may not do.
                gathered = [torch.empty_like(norms) for _ in range(self.mesh.size(dim))]
                dist.all_gather(gathered, norms, group=self.mesh.get_group(dim))
                norms = joint_norms(gathered, norm_type)
        return norms


class _Parts:
    """The gradients of a network by device, each with its segments: 0 for the backbone, then those of each head.

    `sizes` are the numbers of segments of the backbone, which is 1, and of the heads that have gradients.
    """

    def __init__(self, net: object, grad_scale: float | Tensor | None) -> None:
        self._scale = _SCALE.check("grad_scale", grad_scale)
        params = _params_of(net)
        self.sizes = [1]
        clones: dict[int, tuple[int, int]] = {}
        for count, own in _heads_of(net, params):
            clones.update({id(param): (sum(self.sizes), count) for param in own})
            self.sizes.append(count)
        self.segments = sum(self.sizes)
        self._groups: dict[Any, _Group] = {}
        backbone = (0, 1)
        for number, param in enumerate(params):
            grad = param.grad
            if grad is None:
                continue
            name = f"net: the gradient of parameter {number}"
            check(
                not flat_shards.is_cut(param),
                f"{name} is that of a flat shard, whose norm other ranks have a part of, expected whole parameters or "
                "DTensors: use clip_grad_norm_ of the FullyShardedDataParallel wrapper, or of the engine",
            )
            check(
                grad.layout is torch.strided,
                f"{name} is of layout {grad.layout}, expected an ordinary (dense) one: sparse=False in the embedding, "
                "or grad.to_dense()",
            )
            check_dtype(name, grad, FLOATS)
            first, count = clones.get(id(param), backbone)
            key: Any = grad.device
            group = _Group(grad.device, [], [], [])
            if sharding.is_sharded(grad):
                grad = sharding.settled_gradient(param)
                mesh, placements = grad.device_mesh, grad.placements
                key = mesh, placements, grad.device
                group = group._replace(mesh=mesh, placements=placements)
                if count > 1:
                    start, stop = sharding.spans(grad, name)[0]
                    first, count = first + start, stop - start
                grad = sharding.local(grad)
            group = self._groups.setdefault(key, group)
            if count:
                group.grads.append(grad)
                group.firsts.append(first)
                group.counts.append(count)

    def clip(self, max_norm: float, norm_type: float) -> Tensor:
        """Clip; return the norms `[segments]` before that."""
        if len(self._groups) == 1 and self._scale is None:
            (group,) = self._groups.values()
            if group.mesh is None:
                return group.clip(self.segments, max_norm=max_norm, norm_type=norm_type)
        norms = self.norms(norm_type)
        self.clip_by(norms, max_norm)
        return norms

    def norms(self, norm_type: float) -> Tensor:
        found = [group.norms(self.segments, norm_type) for group in self._groups.values()]
        if not found:
            return torch.zeros(self.segments, dtype=torch.float64)
        norms = found[0] if len(found) == 1 else joint_norms(found, norm_type)
        return norms if self._scale is None else norms / self._scale

    def clip_by(self, norms: Tensor, max_norm: float) -> None:
        for group in self._groups.values():
            own = norms.to(group.device)
            group.clip(self.segments, max_norm=max_norm, norm_type=2.0, norms=own)

    def check_finite(self, norms: Tensor) -> None:
        names = ["the backbone"]
        for head, count in enumerate(self.sizes[1:]):
            which = f" of head {head}" if len(self.sizes) > 2 else ""
            names += [f"clone {n}{which}" for n in range(count)]
        found = zip(names, norms.tolist())
        wrong = [f"of {name} is {norm}" for name, norm in found if not math.isfinite(norm)]
        if wrong:
            raise RuntimeError(
                f"net: the norm of the gradients {', '.join(wrong)}, expected finite ones; error_if_nonfinite=False "
                "scales them by it all the same"
            )


def _params_of(net: object) -> list[Tensor]:
    if isinstance(net, nn.Module):
        return list(net.parameters())
    if isinstance(net, Tensor):
        return [net]
    if not isinstance(net, Iterable) or isinstance(net, str | bytes | dict):
        raise TypeError(
            f"net: got {shown(net)}, expected a torch.nn.Module, a parameter or parameters"
        )
    params = list(net)
    for number, param in enumerate(params):
        if not isinstance(param, Tensor):
            raise TypeError(f"net: got {shown(param)} as entry {number}, expected a parameter")
    # By id: torch.compile would compare tensors by their values.
    return list({id(param): param for param in params}.values())


def _heads_of(net: object, params: list[Tensor]) -> list[tuple[int, list[Tensor]]]:
    """Of each head with gradients, in the order of the parameters: the number of its clones, its parameters `[N, ...]`.

    A parameter that two heads share is the first one's.
    """
    modules = net.modules() if isinstance(net, nn.Module) else live.heads
    heads = [module for module in modules if isinstance(module, LinearClones)]
    if not heads:
        return []
    left = {id(param): number for number, param in enumerate(params) if param.grad is not None}
    found = []
    for head in heads:
        count = head.num_clones
        own: list[Tensor] = [
            p for p in head.parameters() if id(p) in left and p.dim() and p.size(0) == count
        ]
        if own:
            found.append((min([left.pop(id(p)) for p in own]), count, own))
    return [(count, own) for _, count, own in sorted(found, key=lambda entry: entry[0])]
