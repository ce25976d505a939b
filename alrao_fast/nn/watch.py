"""Tells when a training has died: one warning for each cause, naming what is not finite and at which observation.

A single clone that diverges is Alrao's everyday business, and only `clone_metrics` shows it (its loss is inf). Where no
clone has a finite likelihood for a sample, be it for the features or for the clones, the loss is not finite: that is
the one number that is looked at.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from alrao_fast.nn.clone_parameters import largest_outputs
from alrao_fast.ops.derivatives import is_traced
from alrao_fast.sharding import is_sharded, local, spans

if TYPE_CHECKING:
    from alrao_fast.nn.clones import LinearClones

# On a GPU the losses of observations 1, 2, 4, ... are looked at, and every so many.
_EVERY = 64


class Watch:
    """Looks at the training losses of a head; a copy of the head gets one that has seen nothing.

    On the CPU a look takes a microsecond, so each loss is looked at in its own step. A loss on a GPU is copied to
    the host now and then, without a wait, and looked at in a later step, when it has arrived. There are no looks while
    a CUDA graph is captured or replayed, nor under torch.compile.
    """

    def __init__(self) -> None:
        # What is dead at the last look, if backbone or clones are.
        self.dead = ""
        self._observations = 0
        self._failures = 0
        self._told: set[str] = set()
        self._host: Tensor | None = None
        self._arrival: torch.cuda.Event | None = None

    def __reduce__(self) -> tuple[type[Watch], tuple[()]]:
        return Watch, ()

    def look(
        self,
        head: LinearClones,
        loss: Tensor,
        features: Tensor,
        targets: Tensor | None,
        sample_weight: Tensor | None = None,
    ) -> None:
        """Take note of an observed loss, or of several, with the features, targets and weights that it is of."""
        if torch.compiler.is_compiling():
            return
        if loss.dim() != 0:
            loss = loss.detach().sum()
        value = self._value(loss, head)
        if value is None or math.isfinite(value):
            self.dead = self.dead if value is None else ""
            return
        self._failures += 1
        # What is wrong takes time to find, and a training may go on in vain.
        if self._failures & (self._failures - 1) == 0:
            cause, what = _diagnose(head, loss, features, targets, sample_weight)
            self.dead = what if cause in ("backbone", "clones") else ""
            if cause not in self._told:
                self._told.add(cause)
                at = "at" if loss.is_cpu else "by"
                event = "nothing is observed" if cause == "elsewhere" else "the loss is not finite"
                message = f"{event} {at} observation {int(head.switch.t)}: {what}"
                warnings.warn(message, RuntimeWarning, stacklevel=2)

    def _value(self, loss: Tensor, head: LinearClones | None = None) -> float | None:
        """This loss, or on a GPU an earlier one that has arrived; None if there is none to be had without a wait.

        NaN where another process that observes with this head has no finite one.
        """
        if loss.is_cpu:
            if is_traced(loss):
                return None
            clear = head is None or head.agreement.is_clear()
            return (loss if clear else _of_all_ranks(loss.detach(), head)).item()
        if not loss.is_cuda:
            return None
        self._observations += 1
        seen = self._observations
        due = self._arrival is None and (seen & (seen - 1) == 0 or seen % _EVERY == 0)
        if not (due or self._arrival) or torch.cuda.is_current_stream_capturing():
            return None
        if self._arrival is not None:
            return self._arrived()
        self._host = torch.empty_like(loss, device="cpu", pin_memory=True, requires_grad=False)
        self._host.copy_(_of_all_ranks(loss.detach(), head), non_blocking=True)
        self._arrival = torch.cuda.Event()
        self._arrival.record(torch.cuda.current_stream(loss.device))
        return None

    def _arrived(self) -> float | None:
        arrival, host = self._arrival, self._host
        if arrival is None or host is None or not arrival.query():
            return None
        self._arrival = None
        return host.item()


def _of_all_ranks(loss: Tensor, head: LinearClones | None) -> Tensor:
    """The loss, or NaN where another process that observed with this one had none that is finite."""
    finite = None if head is None else head.agreement.ranks_have_losses()
    return loss if finite is None else torch.where(finite.all(), loss, math.nan)


@torch.no_grad()
def _diagnose(
    head: LinearClones,
    loss: Tensor,
    features: Tensor,
    targets: Tensor | None,
    sample_weight: Tensor | None,
) -> tuple[str, str]:
    """The cause of a loss that is not finite, and a sentence about it. Waits for the device."""
    if math.isfinite(loss.item()):
        finite = head.agreement.ranks_have_losses()
        if finite is not None and not finite.all():
            ranks = (~finite).nonzero().flatten().tolist()
            return "elsewhere", (
                f"every clone was dead for a sample of ranks {ranks} of the switch's process group, so no rank has "
                "observed this batch; what is not finite there goes into the gradients of all"
            )
        return "passing", (
            "this step's loss is finite again, so backbone and clones live; look for single bad inputs or targets"
        )
    counted = head.counted(features.detach().flatten(0, -2), targets, sample_weight)
    bad = int((~counted.isfinite().all(1)).sum())
    if bad:
        return _diagnose_backbone(features, f"{bad} of {len(counted)} samples have features that")
    return _diagnose_clones(head, counted, targets)


def _diagnose_backbone(features: Tensor, these: str) -> tuple[str, str]:
    behind = _parameters_behind(features)
    broken = sum(not bool(p.isfinite().all()) for p in behind)
    if broken:
        return "backbone", (
            f"the backbone has diverged. {these} are not finite, and neither are {broken} of the {len(behind)} "
            "parameters behind them. Go back to a checkpoint; lower the upper end of lr_range, or clip the gradients"
        )
    if behind:
        largest = max(float(p.abs().max()) for p in behind if p.numel())
        return "inputs", (
            f"{these} are not finite, but the {len(behind)} parameters behind them are, none above {largest:.2g}. "
            "Look for NaN in the inputs, or for where the backbone overflows"
        )
    return "features", (
        f"{these} are not finite. No parameters are known behind them, so the backbone has diverged or the inputs are "
        "not finite"
    )


def _diagnose_clones(
    head: LinearClones, features: Tensor, targets: Tensor | None
) -> tuple[str, str]:
    # Of clones that lie over ranks those that are here: the ranks may not look at the same time.
    params = [None if p is None else local(p.detach()).double() for p in head.parts()]
    finite = torch.stack([p.isfinite().flatten(1).all(1) for p in params if p is not None]).all(0)
    x = features.abs().max().double()
    weight, *others = params
    assert weight is not None
    largest = largest_outputs(x, weight, *others)
    # Outputs whose square is finite have a finite likelihood.
    small = finite & (largest < math.sqrt(torch.finfo(torch.float32).max))
    if small.any():
        return "targets", f"features and clones are finite. {head.describe_targets(targets)}"
    first = spans(head.weight)[0][0] if is_sharded(head.weight) else 0
    dead, overflow = ((mask.nonzero().flatten() + first).tolist() for mask in (~finite, finite))
    parts = []
    if dead:
        parts.append(f"clones {dead} have parameters that are not finite")
    if overflow:
        parts.append(f"clones {overflow} overflow on features up to {float(x):.2g}")
    return "clones", (
        f"every clone is dead for a sample: {' and '.join(parts) or 'none is here'}. Go back to a "
        "checkpoint and lower the upper end of lr_range"
    )


def _parameters_behind(features: Tensor) -> list[nn.Parameter]:
    """The parameters that autograd's graph of the features leads to."""
    found: dict[int, nn.Parameter] = {}
    seen, todo = set(), [features.grad_fn]
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, nn.Parameter):
            found[id(variable)] = variable
        todo.extend(parent for parent, _ in node.next_functions)
    return list(found.values())
