"""What one call of an op takes from a param group: its tensors with gradients on one device and of one dtype.

Gathering costs Python work per tensor, so it is done once and kept; `Gathered.fits` says whether it still holds, and a
compiled plan notices by itself when a parameter's memory has changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alrao_fast.ops.plan import FeaturePlan
from alrao_fast.optim.layouts import Layout, memory_rates

# The implementations whose calls a compiled plan can shorten.
PLANNED = ("cpu", "cuda")
LOW_PRECISION = (torch.bfloat16, torch.float16)
SUPPORTED = (torch.float32, torch.float64, *LOW_PRECISION)


class Needs(NamedTuple):
    """What decides which tensors a group's update takes: its states, how it rounds, and which implementation runs."""

    states: tuple[str, ...]
    float32_states: bool
    master_weights: bool
    rounding: str | None
    impl: str


@dataclass(eq=False)
class Bucket:
    """The arguments of one op call, in the op's order; `positions` says which of the group's gradients are its own."""

    params: list[Tensor]
    positions: list[int] | None
    states: list[list[Tensor]]
    masters: list[Tensor]
    rates: list[Tensor]
    inners: list[int]
    seeds: list[int]
    steps: Tensor
    impl: str
    plan: FeaturePlan | None = None
    versions: list[int] = field(default_factory=list)
    looks: list[tuple[Any, ...]] = field(default_factory=list)

    def is_stale(self) -> bool:
        """Whether a parameter's shape, strides, dtype or device is no longer that of its states (a plan knows)."""
        return self.looks != [_look(p) for p in self.params]

    # Version counters are Python's business: torch.compile breaks its graph here, with master weights only.
    @torch.compiler.disable
    def follow_changes(self) -> None:
        """Take into the master weights what was written into the parameters since the last step."""
        if self.masters and self.versions != [p._version for p in self.params]:
            for param, master in zip(self.params, self.masters):
                if master.numel():
                    _reconcile(master, param)

    @torch.compiler.disable
    def note_versions(self) -> None:
        """Remember the parameters as this step has left them."""
        if self.masters:
            self.versions = [p._version for p in self.params]


@dataclass(eq=False)
class Gathered:
    """The buckets of one param group and what they were made for."""

    buckets: list[Bucket]
    params: list[Tensor]
    mask: list[bool]
    count: int
    needs: Needs
    state: Any
    state_size: int

    def fits(self, params: list[Tensor], count: int, state: Any, needs: Needs) -> bool:
        """Whether the buckets still serve a step in which `count` of `params` have gradients."""
        return (
            self.count == count
            and self.params is params
            and self.state is state
            and self.state_size == len(state)
            and self.needs == needs
            and (count == len(params) or self.mask == [p.grad is not None for p in params])
        )


def gather(
    params: list[Tensor],
    layouts: dict[Tensor, Layout],
    state: Any,
    needs: Needs,
    seed: int,
    done: frozenset[int] | set[int] = frozenset(),
) -> Gathered:
    """The buckets of those of `params` that have a gradient and whose id is not in `done`; creates or moves their
    states where needed."""
    mask = [p.grad is not None and id(p) not in done for p in params]
    seeds = [(seed + number) % 2**63 for number in range(len(params))]
    with_grad = [(p, s) for p, s, has_grad in zip(params, seeds, mask) if has_grad]
    parts: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for position, (param, _) in enumerate(with_grad):
        check_gradient(param, _name(param, layouts))
        parts.setdefault((param.device, param.dtype), []).append(position)
    buckets = []
    for positions in parts.values():
        bucket = _bucket([with_grad[k] for k in positions], layouts, state, needs)
        bucket.positions = positions if len(parts) > 1 else None
        buckets.append(bucket)
    return Gathered(buckets, params, mask, sum(mask), needs, state, len(state))


def check_gradient(param: Tensor, name: str) -> None:
    """Raises where the ops cannot use a parameter or its gradient."""
    if param.dtype not in SUPPORTED:
        raise TypeError(
            f"parameter {name!r} has dtype {param.dtype}; expected float32, float64, bfloat16 or float16"
        )
    if param.grad is not None and param.grad.layout != torch.strided:
        raise RuntimeError(
            f"parameter {name!r} has a gradient of layout {param.grad.layout}: sparse gradients are not supported; "
            "use sparse=False in nn.Embedding and nn.EmbeddingBag"
        )


def _bucket(
    members: list[tuple[Tensor, int]], layouts: dict[Tensor, Layout], state: Any, needs: Needs
) -> Bucket:
    params = [param for param, _ in members]
    low_precision = params[0].dtype in LOW_PRECISION
    with_masters = needs.master_weights and low_precision
    state_dtype = params[0].dtype
    if with_masters or (needs.float32_states and low_precision):
        state_dtype = torch.float32
    rates, inners = [], []
    for param in params:
        name, own = _name(param, layouts), state[param]
        own["rate"] = own["rate"].to(param.device)
        _check_shape(param, layouts[param], own, needs)
        # Without entries there are no features either; the ops expect at least one rate.
        rate = own["rate"] if own["rate"].numel() else own["rate"].new_ones(1)
        rate, inner = memory_rates(rate, param, layouts[param].dims, name)
        rates.append(rate)
        inners.append(inner)
        for key in needs.states:
            own[key] = _like(own.get(key), param, state_dtype)
        if with_masters:
            own["master"] = _master(own.get("master"), param)
    stochastic = low_precision and not with_masters and needs.rounding != "nearest"
    bucket = Bucket(
        params=params,
        positions=None,
        states=[[state[p][key] for p in params] for key in needs.states],
        masters=[state[p]["master"] for p in params] if with_masters else [],
        rates=rates,
        inners=inners,
        seeds=[seed for _, seed in members] if stochastic else [],
        steps=_steps(params, state),
        impl=needs.impl,
        versions=[p._version for p in params] if with_masters else [],
        looks=[_look(p) for p in params],
    )
    if needs.impl in PLANNED:
        bucket.plan = FeaturePlan(
            params, bucket.states, bucket.masters, rates, inners, bucket.seeds, bucket.steps
        )
    return bucket


def _look(param: Tensor) -> tuple[Any, ...]:
    return param.shape, param.stride(), param.dtype, param.device


def _check_shape(param: Tensor, layout: Layout, own: dict[str, Any], needs: Needs) -> None:
    """Raises where a parameter has another shape than the rates and states were made for."""
    size = math.prod(param.size(d) for d in layout.dims if d < param.dim())
    rates = own["rate"].numel()
    fits = size == rates or (len(layout.dims) == 1 and rates and size % rates == 0)
    kept = [own[key] for key in (*needs.states, "master") if key in own]
    if not fits or any(state.shape != param.shape for state in kept):
        raise RuntimeError(
            f"parameter {layout.name!r} has shape {list(param.shape)}, which its learning rates and states were not "
            "made for: construct a new optimizer after changing a parameter's shape"
        )


def _name(param: Tensor, layouts: dict[Tensor, Layout]) -> str:
    if param not in layouts:
        raise RuntimeError(
            f"a parameter of shape {list(param.shape)} was put into param_groups without a learning rate: use "
            "add_param_group, which draws one"
        )
    return layouts[param].name


def _like(stored: Tensor | None, param: Tensor, dtype: torch.dtype) -> Tensor:
    """A state with the parameter's shape, strides and device: the stored one, moved if it must be, or zeros."""
    if stored is not None and (stored.dtype, stored.device, stored.stride()) == (
        dtype,
        param.device,
        param.stride(),
    ):
        return stored
    state = torch.empty_strided(param.size(), param.stride(), dtype=dtype, device=param.device)
    return state.zero_() if stored is None else state.copy_(stored)


def _master(stored: Tensor | None, param: Tensor) -> Tensor:
    """The parameter's float32 master."""
    if stored is None:
        return _like(param, param, torch.float32)
    master = _like(stored, param, torch.float32)
    _reconcile(master, param)
    return master


def _reconcile(master: Tensor, param: Tensor) -> None:
    """Take the entries that were written into the parameter since its master was rounded into it."""
    with torch.no_grad():
        value = param.detach()
        master.copy_(torch.where(master.to(param.dtype) == value, master, value.float()))


def _steps(params: list[Tensor], state: Any) -> Tensor:
    """The step counts as one int64 vector; each parameter's state has its own entry as a view."""
    device = params[0].device
    steps = torch.zeros(len(params), dtype=torch.int64, device=device)
    counted = [k for k, p in enumerate(params) if "step" in state[p]]
    if counted:
        steps[counted] = torch.stack([state[params[k]]["step"].to(device) for k in counted])
    for param, step in zip(params, steps.unbind()):
        state[param]["step"] = step
    return steps
