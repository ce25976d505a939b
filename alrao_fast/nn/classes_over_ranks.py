"""The classes of a head over ranks: every rank computes some of each clone's logits.

For each sample and clone the ranks exchange the largest logit, then three or four sums: of the exponentials, of the
target's logit (or what smoothing and class weights make of it), and who has predicted it. In the backward the
features' gradient, B x D, is summed; nothing of the classes leaves its rank. Plain PyTorch, clone by clone in chunks of
samples, so that no more logits stand at a time than the memory budget says; the backward computes them again.
Mathematics: reference/switch_mixture.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from alrao_fast import compiler
from alrao_fast.nn.autocast import without_autocast
from alrao_fast.nn.chunks import in_chunks
from alrao_fast.nn.over_ranks import OverRanks, Part, Ranks
from alrao_fast.ops.checks import check_together
from alrao_fast.ops.mixture import checks
from alrao_fast.ops.mixture.likelihood import Likelihood
from alrao_fast.reference.switch_mixture import soft_capped

if TYPE_CHECKING:
    from alrao_fast.nn.clones import LinearClones

# Tensors of the size of a chunk's logits that stand at a time.
_TENSORS = 4


class _Targets(NamedTuple):
    """Targets of all classes, of which `[start, stop)` are here, and what of a sample's logits makes its loss.

    `classes [B]` int64, or `probabilities [B, C]`; `weight [C]` of the classes; `norm [B]` what the factors of a
    sample's logits would sum to.
    """

    dtype: torch.dtype
    classes: Tensor
    probabilities: Tensor | None
    weight: Tensor | None
    norm: Tensor | None
    finite: Tensor
    counted: Tensor
    smoothing: float
    z_loss: float
    softcap: float
    num_classes: int
    start: int
    stop: int
    memory: int

    @classmethod
    def of(
        cls,
        likelihood: Likelihood,
        target: Tensor,
        counted: Tensor,
        num_classes: int,
        part: Part,
        memory: int,
    ) -> _Targets:
        options = likelihood.options()
        weight, smoothing = options["class_weight"], options["label_smoothing"]
        finite, probabilities = torch.ones_like(counted), None
        if target.dim() == 2:
            finite = target.isfinite().all(1)
            probabilities = torch.where((finite & counted).unsqueeze(1), target, 0)
            target = probabilities.argmax(1)
        target = torch.where(counted, target, 0)
        norm = None
        if weight is not None:
            of_target = weight[target] if probabilities is None else probabilities @ weight
            norm = (1 - smoothing) * of_target + smoothing * weight.mean()
            norm = torch.where(norm == 0, 1, norm)
        own = options["z_loss"], options["softcap"], num_classes, part.start, part.stop, memory
        wide = checks.accumulator(part.weight.dtype)
        return cls(wide, target, probabilities, weight, norm, finite, counted, smoothing, *own)

    def chunks(self) -> Iterator[slice]:
        """Samples whose logits of one clone fit in the memory."""
        bytes_each = _TENSORS * max(self.stop - self.start, 1) * self.dtype.itemsize
        size = max(self.memory // bytes_each, 1)
        for first in range(0, len(self.classes), size):
            yield slice(first, first + size)

    def is_plain(self) -> bool:
        """Whether the loss is minus the log-probability of a class."""
        return self.probabilities is None and self.weight is None and self.smoothing == 0

    def likely(self, rows: slice) -> Tensor:
        """The probabilities of the classes here, `[b, C']`."""
        if self.probabilities is not None:
            return self.probabilities[rows, self.start : self.stop]
        own = torch.arange(self.start, self.stop, device=self.classes.device)
        return (own == self.classes[rows].unsqueeze(1)).to(self.dtype)

    def factors(self, rows: slice) -> Tensor:
        """What the logits here have in the loss, `[b, C']`: over all classes they sum to 1."""
        t = (1 - self.smoothing) * self.likely(rows) + self.smoothing / self.num_classes
        if self.weight is None or self.norm is None:
            return t
        return self.weight[self.start : self.stop] * t / self.norm[rows].unsqueeze(1)

    def logits(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Those of one clone, not capped, in the dtype of the arithmetic."""
        bias = None if bias is None else bias.to(self.dtype)
        return F.linear(x.to(self.dtype), weight.to(self.dtype), bias)


class _Losses(torch.autograd.Function):
    """The mixture's losses `[B]` and the statistics, float64; the gradients are the mixture's to x, its own to each
    clone. Those to x are this rank's part of the sum."""

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        log_posterior: Tensor,
        targets: _Targets,
        ranks: Ranks,
    ) -> tuple[Tensor, Tensor]:
        x = torch.where(targets.counted.unsqueeze(1), x, 0)
        peak, first, sums = _here(x, weight, bias, targets)
        own_peak = peak.clone()
        ranks.largest_(peak)
        # A logit that is not finite has made it inf, on whatever rank.
        alive = peak < math.inf
        shift = torch.where(alive & (own_peak > -math.inf), own_peak - peak, 0)
        total, objective, share, likelihood, likely = sums
        y = targets.classes.unsqueeze(1)
        ahead = own_peak == peak
        # The first of the largest logits: another one ahead of the target's counts against it.
        guess = (ahead & (first == y)).to(peak.dtype) - (ahead & (first < y)).to(peak.dtype)
        exchanged = [total * shift.exp(), objective + share * shift, guess]
        if not targets.is_plain():
            exchanged.append(likelihood + likely * shift)
        packed = torch.where(alive, torch.stack(exchanged), 0)
        ranks.sum_(packed)
        log_total = torch.where(alive, packed[0], 1).log()
        objective, likelihood = packed[1] - log_total, packed[-1] - log_total
        if targets.is_plain():
            likelihood = objective
        if targets.z_loss != 0:
            objective = objective - targets.z_loss * (peak + log_total).square()
        alive = alive & objective.isfinite() & targets.finite.unsqueeze(1)
        joint = torch.where(alive, log_posterior.to(peak.dtype) + objective, -math.inf)
        losses = -joint.double().logsumexp(1)
        responsibility = torch.where(alive, joint.softmax(1), 0).nan_to_num(0)
        ctx.save_for_backward(x, weight, bias, peak, log_total, alive, responsibility)
        ctx.targets = targets

        count = targets.counted.unsqueeze(1)
        likelihood = torch.where(alive, likelihood.double(), -math.inf)
        stats = torch.stack(
            [
                -torch.where(count, likelihood, 0).sum(0),
                (count & alive & (packed[2] == 1)).sum(0).double(),
                count.sum().double().expand(weight.size(0)),
            ]
        )
        ctx.mark_non_differentiable(stats)
        return losses, stats

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, peak, log_total, alive, responsibility = ctx.saved_tensors
        targets: _Targets = ctx.targets
        wide = peak.dtype
        grad = torch.where(targets.counted, grad, 0).to(wide)
        # A clone that is dead for a sample that counts gets no gradient.
        lives = (alive | (grad == 0).unsqueeze(1)).all(0).to(wide)
        dx = x.new_zeros(x.shape, dtype=wide)
        dweight, dbias = torch.empty_like(weight), weight.new_empty(weight.shape[:2])
        finite_x = torch.where(x.isfinite().all(1, keepdim=True), x, 0).to(wide)
        for n, own in enumerate(weight):
            own_bias = None if bias is None else bias[n]
            finite = torch.where(own.isfinite().all(1, keepdim=True), own, 0).to(wide)
            own_dweight, own_dbias = torch.zeros_like(finite), finite.new_zeros(len(finite))
            for rows in targets.chunks():
                z = soft_capped(targets.logits(x[rows], own, own_bias), targets.softcap)
                of = (rows, slice(n, n + 1))
                g = ((z - peak[of]) - log_total[of]).exp()
                if targets.z_loss != 0:
                    g = g * (1 + 2 * targets.z_loss * (peak[of] + log_total[of]))
                g = g - targets.factors(rows)
                if targets.softcap:
                    g = g * (1 - (z / targets.softcap).square())
                g = torch.where(alive[of], g, 0) * grad[rows].unsqueeze(1)
                dx[rows] += (responsibility[of] * g) @ finite
                g = g * lives[n]
                own_dweight += g.t() @ finite_x[rows]
                own_dbias += g.sum(0)
            dweight[n], dbias[n] = own_dweight, own_dbias
        return dx.to(x.dtype), dweight, None if bias is None else dbias, None, None, None


def _here(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: _Targets
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the logits here: the largest `[B, N]` (inf where one is not finite, -inf where there is none) and its class;
    and, relative to it, `[5, B, N]`: the sum of the exponentials, what the loss has of the logits and the sum of its
    factors, and the same of the likelihood."""
    wide, shape = targets.dtype, (x.size(0), weight.size(0))
    peak = x.new_full(shape, -math.inf, dtype=wide)
    first = torch.full(shape, targets.num_classes, device=x.device)
    sums = x.new_zeros(5, *shape, dtype=wide)
    if targets.stop == targets.start:
        return peak, first, sums
    for n, own in enumerate(weight):
        for rows in targets.chunks():
            z = targets.logits(x[rows], own, None if bias is None else bias[n])
            finite = z.isfinite().all(1)
            z = torch.where(finite.unsqueeze(1), soft_capped(z, targets.softcap), 0)
            largest, place = z.max(1)
            peak[rows, n] = torch.where(finite, largest, math.inf)
            first[rows, n] = place + targets.start
            z = z - largest.unsqueeze(1)
            sums[0, rows, n] = z.exp().sum(1)
            for k, factors in ((1, targets.factors), (3, targets.likely)):
                t = factors(rows)
                sums[k, rows, n] = (t * z).sum(1)
                sums[k + 1, rows, n] = t.sum(1)
                if targets.is_plain():
                    break
    return peak, first, sums


class _LogSum(torch.autograd.Function):
    """The log of the sum over ranks of the exponentials; its gradient comes from all of them."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: Ranks) -> Tensor:
        peak = values.clone()
        ranks.largest_(peak)
        total = (values - peak).exp()
        ranks.sum_(total)
        merged = peak + total.log()
        ctx.save_for_backward((values - merged).exp())
        ctx.ranks = ranks
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (share,) = ctx.saved_tensors
        grad = grad.clone()
        ctx.ranks.sum_(grad)
        return grad * share, None


class _AllClasses(torch.autograd.Function):
    """`[b, C]` from the columns `[b, C']` of every rank."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, part: Part, num_classes: int) -> Tensor:
        ctx.part = part
        most = -(-num_classes // part.ranks.size)
        padded = F.pad(own, (0, most - own.size(1)))
        return part.ranks.gathered(padded).movedim(0, 1).flatten(1)[:, :num_classes].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[:, ctx.part.start : ctx.part.stop], None, None


class ClassesOverRanks(OverRanks):
    """A head whose classes lie over ranks: `weight [N, C, D]` and `bias [N, C]` are DTensors, Shard(1)."""

    dim = 1
    what = "classes"

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
        weight: Any = head.weight
        like = part.weight.new_empty(1, weight.size(1), 0)
        likelihood.check_target(target, x, like)
        memory = checks.budget(x, head.memory_budget)
        targets = _Targets.of(likelihood, target, counted, weight.size(1), part, memory)
        inputs = x, part.weight, part.bias, log_posterior.clone()
        losses, stats = _Losses.apply(*inputs, targets, part.ranks)
        # Of sums over ranks that may be rounded otherwise on each: the first one's.
        return losses, part.ranks.gathered(stats)[0]

    @compiler.disable("the classes of the head lie over ranks")
    def log_prob(
        self, head: LinearClones, features: Tensor, log_posterior: Tensor, impl: str
    ) -> Tensor:
        part = self.part(head)
        x = self.entered(head, features)
        check_together("bias", features=x, weight=part.weight, bias=part.bias)
        samples, classes = x.shape[:-1], head.weight.size(1)
        x, part = part.in_rows(x)
        softcap = getattr(head, "logit_softcap", None)
        wide = checks.accumulator(x.dtype)
        most = head.num_clones * -(-classes // part.ranks.size)
        size = checks.budget(x, head.memory_budget) // (_TENSORS * most * wide.itemsize)

        def chunk(x: Tensor) -> Tensor:
            own = _log_prob(x.to(wide), part, log_posterior, softcap)
            return _AllClasses.apply(own, part, classes)

        found = in_chunks(chunk, size, x)
        return torch.cat(found).view(*samples, classes)


@without_autocast
def _log_prob(x: Tensor, part: Part, log_posterior: Tensor, softcap: float | None) -> Tensor:
    """The mixture's log-probabilities `[b, C']` of the classes here, in the dtype of x."""
    weight, ranks = part.weight.to(x.dtype), part.ranks
    bias = None if part.bias is None else part.bias.to(x.dtype)
    with torch.no_grad():
        outputs = _outputs(x, weight, bias)
        dead = (~outputs.isfinite().all(2)).to(x.dtype)
        ranks.largest_(dead)
    alive = dead == 0
    x = torch.where(x.isfinite().all(1, keepdim=True), x, 0)
    weight = torch.where(weight.isfinite().all(2, keepdim=True), weight, 0)
    bias = None if bias is None else torch.where(bias.isfinite(), bias, 0)
    z = soft_capped(torch.where(alive.unsqueeze(2), _outputs(x, weight, bias), 0), softcap)
    # A rank without classes has the least number, with a graph: every rank has a part in the sums of the backward.
    own = z.logsumexp(2) if z.size(2) else z.sum(2) + torch.finfo(z.dtype).min
    logp = z - _LogSum.apply(own, ranks).unsqueeze(2)
    mass = torch.where(alive, log_posterior.double(), -math.inf)
    possible = (mass > -math.inf).any(1)
    mass = torch.where(possible.unsqueeze(1), mass, 0).log_softmax(1).to(x.dtype)
    mixed = (logp + mass.unsqueeze(2)).logsumexp(1)
    return torch.where(possible.unsqueeze(1), mixed, -math.inf)


def _outputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`[b, N, C']`."""
    out = torch.einsum("bd,ncd->bnc", x, weight)
    return out if bias is None else out + bias
