"""Heads whose clones, or classes, lie over the ranks of a mesh's dimension; this file has what both share.

All ranks of the dimension have the same features and targets, and all end with the same loss, statistics and
prediction, to the bit. The features' gradient is summed over the ranks by DTensor, on the way back through `entered`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from alrao_fast import compiler
from alrao_fast.arguments import FLOATS
from alrao_fast.nn.switch import gathered
from alrao_fast.ops.checks import check, check_dtype, check_together
from alrao_fast.ops.mixture import checks
from alrao_fast.ops.mixture.likelihood import Likelihood
from alrao_fast.ops.mixture.weighting import Weighting
from alrao_fast.sharding import is_sharded, spans, whole

if TYPE_CHECKING:
    from alrao_fast.nn.clones import LinearClones


class Ranks(NamedTuple):
    """The ranks of a mesh's dimension: their process group, how many they are, and which of them is here."""

    group: Any
    size: int
    here: int

    def gathered(self, values: Tensor) -> Tensor:
        """`values [...]` of every rank, `[R, ...]`, in the order of the ranks: the same bits everywhere."""
        return gathered(values, self.group)

    def largest_(self, values: Tensor) -> None:
        """Replace `values` by the largest over the ranks, entry by entry."""
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)

    def sum_(self, values: Tensor) -> None:
        """Replace `values` by the sum over the ranks."""
        dist.all_reduce(values, group=self.group)


class Part(NamedTuple):
    """What this rank has of a head: its weights and biases, with their graph, `[start, stop)` of the whole."""

    weight: Tensor
    bias: Tensor | None
    start: int
    stop: int
    ranks: Ranks

    def in_rows(self, x: Tensor) -> tuple[Tensor, Part]:
        """`checks.flat`, where a rank may have nothing."""
        check_dtype("x", x, FLOATS)
        features = self.weight.size(-1)
        check(
            x.dim() > 0 and x.size(-1) == features,
            f"x: got shape {list(x.shape)}, expected [..., {features}], D being that of the head",
        )
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        part = self._replace(weight=self.weight.to(dtype), bias=bias)
        return x.reshape(-1, features).to(dtype), part


class OverRanks:
    """How a head computes whose parameters are cut along `dim` of its weight `[N, C, D]`."""

    dim: int
    # In words.
    what: str

    def __init__(self) -> None:
        self._batch_is_known = False

    def __reduce__(self) -> tuple[type[OverRanks], tuple[()]]:
        return type(self), ()

    @compiler.disable("the head lies over ranks")
    def loss(
        self,
        head: LinearClones,
        features: Tensor,
        targets: Tensor,
        weighting: Weighting,
        log_posterior: Tensor,
        impl: str,
    ) -> tuple[Tensor, Tensor]:
        """The mixture's loss and the statistics `[3, N]` of all clones, for features that have entered."""
        part = self.part(head)
        own = {"weight": part.weight, "bias": part.bias}
        check_together("bias", x=features, **own, log_posterior=log_posterior, target=targets)
        self.check_batch(part.ranks, features)
        samples = features.shape[:-1]
        x, part = part.in_rows(features)
        # The targets are those of the whole.
        like = part.weight.new_empty(1, head.weight.size(1), 0)
        likelihood = head.likelihood()
        target = likelihood.rows(targets, samples, like)
        likelihood, target, mean = likelihood.weighed(target, like, weighting, "reference")
        factors: Tensor | None = likelihood.options()["row_weight"]
        counted = likelihood.counted(target)
        if factors is not None:
            counted = counted & (factors != 0)
        options = target, likelihood, counted, log_posterior, impl
        losses, stats = self.losses(head, part, x, *options)
        each = torch.where(counted, losses, 0)
        if factors is not None:
            each = torch.where(counted, factors * each, 0)
        if weighting.per_sample:
            loss = each.view(samples)
        else:
            loss = each.sum() / counted.sum().clamp(min=1) if mean else each.sum()
        return loss.to(checks.accumulator(x.dtype)), stats

    def losses(
        self,
        head: LinearClones,
        part: Part,
        x: Tensor,
        target: Tensor,
        likelihood: Likelihood,
        counted: Tensor,
        log_posterior: Tensor,
        impl: str,
    ) -> tuple[Tensor, Tensor]:
        """The mixture's losses `[B]`, float64, and the statistics `[3, N]`, of samples and targets in rows."""
        raise NotImplementedError

    def log_prob(
        self, head: LinearClones, features: Tensor, log_posterior: Tensor, impl: str
    ) -> Tensor:
        """The log-probabilities `[..., C]` of the mixture of classifiers."""
        raise NotImplementedError

    def mean(
        self, head: LinearClones, features: Tensor, log_posterior: Tensor, impl: str
    ) -> Tensor:
        """The mean `[..., K]` of the mixture of regressors."""
        raise NotImplementedError

    def check(self, head: LinearClones) -> None:
        """Raise RuntimeError unless the parameters lie over one dimension of a mesh as they should."""
        for name in ("weight", "bias"):
            param = getattr(head, name)
            if param is None:
                continue
            placements = getattr(param, "placements", None)
            if placements is None or len(placements) != 1 or not placements[0].is_shard(self.dim):
                raise RuntimeError(
                    f"{name}: got placements {placements}, expected (Shard(dim={self.dim}),), the {self.what} of this "
                    "head over one dimension of a mesh. Under fully_shard that is so within the forward only: "
                    "register other methods by torch.distributed.fsdp.register_fsdp_forward_method(head, <name>)"
                )

    def part(self, head: LinearClones) -> Part:
        """What this rank has of the head."""
        self.check(head)
        weight: Any = head.weight
        start, stop = spans(weight)[self.dim]
        mesh = weight.device_mesh
        ranks = Ranks(mesh.get_group(), mesh.size(), mesh.get_local_rank())
        bias: Any = head.bias
        return Part(
            weight.to_local(), None if bias is None else bias.to_local(), start, stop, ranks
        )

    @compiler.disable("the head lies over ranks")
    def entered(self, head: LinearClones, features: Any) -> Tensor:
        """The features as an ordinary tensor, whose gradient is summed over the ranks on its way back.

        Those of a DTensor may be sharded: they are gathered, and their gradient is scattered.
        """
        from torch.distributed.tensor import DTensor, Partial, Replicate

        self.check(head)
        mesh = head.weight.device_mesh  # type: ignore[attr-defined]
        if not is_sharded(features):
            features = DTensor.from_local(features, mesh, [Replicate()], run_check=False)
        elif features.device_mesh != mesh:
            raise RuntimeError(
                f"features: got a DTensor on {features.device_mesh}, expected one on that of the head, {mesh}"
            )
        x: Tensor = features.redistribute(mesh, [Replicate()]).to_local(grad_placements=[Partial()])
        return x

    def check_batch(self, ranks: Ranks, x: Tensor) -> None:
        """Raise ValueError, on every rank, unless all have the same features; once for every head."""
        if self._batch_is_known:
            return
        size = x.detach().double().abs().nan_to_num(0, 0, 0).sum()
        found = ranks.gathered(torch.stack([size.new_tensor(x.numel()), size])).tolist()
        first = found[0]
        if any(n != first[0] or abs(total - first[1]) > 1e-3 * first[1] for n, total in found):
            raise ValueError(
                f"features: got {[int(n) for n, _ in found]} numbers of absolute sums "
                f"{[float(f'{total:.6g}') for _, total in found]} on the ranks over which the {self.what} lie, "
                "expected the same batch and the same backbone on all of them: batches of data go over another "
                "dimension of the mesh, and plain weights are drawn after torch.manual_seed with one seed for all"
            )
        self._batch_is_known = True


def all_clones(head: LinearClones) -> tuple[Tensor, Tensor | None]:
    """The head's weights and biases; where they lie over ranks they are gathered, for which all ranks have to ask."""
    if head.over_ranks is None:
        return head.weight, head.bias
    head.over_ranks.check(head)
    return whole(head.weight), whole(head.bias)


def copies(head: LinearClones) -> int:
    """How many of the processes that the switch sums over have the statistics that this one has."""
    mesh = head.weight.device_mesh  # type: ignore[attr-defined]
    together = dist.get_process_group_ranks(head.switch.process_group)
    return len({*together}.intersection(dist.get_process_group_ranks(mesh.get_group())))
