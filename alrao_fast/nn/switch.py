"""The switch: the posterior over clones as a module (mathematics: reference/switch_update.py)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alrao_fast.arguments import COUNT, Device, Instance, Optional, checked
from alrao_fast.nn.recomputation import first_run
from alrao_fast.ops.switch_update import THETA, switch_update_
from alrao_fast.reference.switch_update import initial_state

# The arguments of a switch; those of a head have them, too.
SWITCH_KINDS = {
    "num_clones": COUNT,
    "theta": THETA,
    "process_group": Optional(
        Instance(getattr(dist, "ProcessGroup", object), "a process group of torch.distributed")
    ),
    "device": Optional(Device()),
}

# Its name in later versions of torch, which deprecate the other.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)


def gathered(values: Tensor, group: Any) -> Tensor:
    """`values [...]` of every process of the group, `[R, ...]`, in the order of the ranks: the same bits everywhere."""
    world = dist.get_world_size(group)
    found = values.new_empty(world * values.numel())
    _all_gather(found, values.flatten().contiguous(), group=group)
    return found.view(world, *values.shape)


def normalized(log_posterior: Tensor) -> Tensor:
    """`log_posterior [N]` with probabilities that sum to 1; NaN counts as -inf, and where all are -inf all are NaN."""
    return log_posterior.nan_to_num(-math.inf, math.inf, -math.inf).log_softmax(0)


class FixedDtypeBuffers(nn.Module):
    """A module whose own buffers keep their dtype under `.half()`, `.to(dtype)` and the like, and follow the device.

    For state whose precision is part of its meaning: a float16 posterior over clones would be stuck at its rounding.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        own = {id(buffer) for buffer in self._buffers.values()}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in own and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_dtype, recurse)


class Switch(FixedDtypeBuffers):
    """Posterior over N clones, updated by the switch distribution (van Erven, Grunwald, de Rooij, NIPS 2007).

    Args:
        num_clones: N >= 1.
        theta: share of the redistributed mass that may switch again, in (0, 1).
        process_group: the processes of `torch.distributed` that observe together; None is the default group, a group
            of one process keeps to itself. Without an initialised `torch.distributed` it means nothing.

    Buffers, float64 through every dtype conversion of the module, all in the state_dict: `logw [2, N]`, the log of the
    joint posterior over (may switch, stays) and clone; `log_posterior [N]`, the log posterior over clones; `t`, the
    number of the next observation (int64 scalar, 1 at the start). TypeError or ValueError, naming the argument, for one
    of another type or out of range.

    An average of several models' buffers, as `torch.optim.swa_utils.AveragedModel(use_buffers=True)` keeps one, is the
    geometric mean of their posteriors, whose sum is less than 1: what reads it normalises it, as an update does. On a
    GPU torch's default way of averaging refuses integers, `t` as BatchNorm's counters: pass `avg_fn=get_swa_avg_fn()`.
    """

    logw: Tensor
    log_posterior: Tensor
    t: Tensor
    # Whether this object has observed anything, known without a look at `t`, which may be on a GPU.
    has_observed = False

    def __init__(
        self,
        num_clones: int,
        theta: float = 0.999,
        *,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        values = checked(SWITCH_KINDS, locals())
        self.num_clones: int = values["num_clones"]
        self.theta: float = values["theta"]
        self.process_group = process_group
        logw, log_posterior, t = initial_state(self.num_clones, self.theta, device)
        self.register_buffer("logw", logw)
        self.register_buffer("log_posterior", log_posterior)
        self.register_buffer("t", t)

    def reset_parameters(self) -> None:
        """Forget every observation: the state at the start, in place."""
        start_state = initial_state(self.num_clones, self.theta, self.t.device)
        for buffer, start in zip((self.logw, self.log_posterior, self.t), start_state):
            buffer.copy_(start)
        self.has_observed = False

    @torch.no_grad()
    def keep_clones(self, places: Tensor) -> None:
        """Go on as a switch of the clones at these places `[N']` (int64).

        The posterior becomes that of who knows that the best sequence of clones is among theirs: what the others had of
        the mass goes to those that are left in proportion. From now on mass is redistributed over N' clones.
        """
        logw = self.logw.index_select(1, places.to(self.logw.device))
        self.logw = logw - logw.flatten().logsumexp(0)
        self.log_posterior = normalized(self.log_posterior[places.to(self.logw.device)])
        self.num_clones = places.numel()

    def posterior(self) -> Tensor:
        """Probabilities `[N]` of the clones, float64, a fresh tensor: they sum to 1, or all are NaN."""
        return self.log_probabilities().exp()

    def log_probabilities(self) -> Tensor:
        """Log-probabilities `[N]` of the clones, float64, a fresh tensor: `log_posterior`, normalised.

        NaN counts as -inf: averages of a log-posterior that was -inf are NaN, in some of torch's formulas.
        """
        own: dict[str, Any] = self._buffers
        return normalized(own["log_posterior"])

    def knows_the_best(self) -> bool:
        """Whether an observation has told the clones apart; t, averaged as an integer, may stay at 1."""
        return bool(self.t > 1) or bool(self.log_posterior.min() < self.log_posterior.max())

    def log_posterior_of_means(self) -> Tensor:
        """`log_posterior`, lower by 1000 for clones that have nothing but their share of the redistributed mass.

        That share, about 1 / (N t), never falls to 0. It does no harm to probabilities, but in a mean of outputs a
        clone that has diverged to 1e16 would be all that is seen: it counts only where no other is alive. It shows by
        its logw: they are to each other as theta to 1 - theta. Before the first observation all are, and all count.
        """
        own: dict[str, Any] = self._buffers
        log_odds = math.log(self.theta) - math.log1p(-self.theta)
        informed = (own["logw"][0] - own["logw"][1] - log_odds).abs() > 1e-9
        counts = informed | ~informed.any()
        return torch.where(counts, own["log_posterior"], own["log_posterior"] - 1000)

    def mixing_posterior(self, *, observing: bool, means: bool = False) -> tuple[Tensor, bool, str]:
        """The log-posterior `[N]` by which the present forward mixes, whether this forward observes, and its `impl`.

        One that is to observe gets `log_posterior` itself, the others a fresh tensor, `means` that of
        `log_posterior_of_means`. The second run of a forward inside an activation checkpoint gets what the first one
        had, its backend too, and observes nothing.
        """
        own: dict[str, Any] = self._buffers
        present = self.log_posterior_of_means() if means else own["log_posterior"]
        log_posterior, impl, again = first_run(self, present)
        mixing = log_posterior if observing else normalized(log_posterior)
        return mixing, observing and not again, impl

    def update(self, log_likelihood: Tensor) -> None:
        """Take the clones' log-likelihoods `[N]` (float32 or float64) as one observation.

        NaN and +inf count as -inf; if all are -inf the state stays as it is. Under `torch.distributed` every process
        of the group must call it; the observation is the mean over the processes, and all end with the same state.
        """
        total = self.sum_over_processes(log_likelihood)
        if total is not log_likelihood:
            total = total / dist.get_world_size(self.process_group)
        self.observe(total)

    def observe(self, log_likelihood: Tensor) -> None:
        """`update` for log-likelihoods that already speak for all processes: nothing is communicated."""
        self.note_observation()
        # This runs in every training step: past nn.Module's __getattr__, which costs as much as a small kernel.
        own: dict[str, Any] = self._buffers
        switch_update_(
            own["logw"], own["log_posterior"], own["t"], log_likelihood, theta=self.theta
        )

    def note_observation(self) -> None:
        """Remember that an observation is made."""
        # Past nn.Module's __setattr__, which costs microseconds.
        self.__dict__["has_observed"] = True

    def is_alone(self) -> bool:
        """Whether no other process observes with this one."""
        return (
            not (dist.is_available() and dist.is_initialized())
            or dist.get_world_size(self.process_group) == 1
        )

    def sum_over_processes(self, values: Tensor) -> Tensor:
        """Sum of `values` over the process group, the same bits on every process; `values` itself if there is one.

        The values are gathered and summed in the order of the ranks: an all-reduce may round differently per rank,
        and the posteriors of the ranks would drift apart.
        """
        if self.is_alone():
            return values
        total, *rest = self.gathered(values.detach())
        for value in rest:
            total = total + value
        return total

    def gathered(self, values: Tensor) -> tuple[Tensor, ...]:
        """`values` of every process of the group, in the order of the ranks."""
        return gathered(values, self.process_group).unbind()

    def extra_repr(self) -> str:
        return f"num_clones={self.num_clones}, theta={self.theta}"
