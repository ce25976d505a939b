"""The loss of the clones of an adaptive softmax, of which every sample takes the head and one tail.

The samples are sorted by the cluster of their target, so that those of a tail are neighbours. All clones go through a
head or tail together, in blocks of logits that stay in the cache: a product of matrices, and the exponentials in its
place. Those are kept for the backward while all of them fit in the memory budget; otherwise the backward computes them
again. Mathematics: reference/adaptive_mixture.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from alrao_fast import backends, compiler
from alrao_fast.arguments import shown
from alrao_fast.nn.autocast import without_autocast
from alrao_fast.ops import derivatives
from alrao_fast.ops.checks import check_together
from alrao_fast.ops.mixture import checks
from alrao_fast.ops.mixture.likelihood import Classes
from alrao_fast.ops.mixture.loss import NO_OTHER_DERIVATIVE
from alrao_fast.ops.mixture.weighting import Weighting
from alrao_fast.reference import adaptive_mixture as reference
from alrao_fast.reference.switch_mixture import combine

if TYPE_CHECKING:
    from alrao_fast.nn.adaptive import AdaptiveClassifierClones

# Bytes of the logits of a block, on a CPU about its cache; elsewhere a block is as large as the memory budget allows.
_CPU_BLOCK = 1 << 20


def pairs(tails: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The two matrices of each tail, from all of them in order."""
    return list(zip(tails[::2], tails[1::2], strict=True))


class _Samples(NamedTuple):
    """Which samples count, in the order of their clusters: places `order` in the batch, `counts` of each cluster, the
    shortlist being the first, and their classes within the cluster."""

    order: Tensor
    counts: list[int]
    target: Tensor
    within: Tensor

    @classmethod
    def of(cls, target: Tensor, counted: Tensor, cutoffs: list[int]) -> _Samples:
        """Waits once for a GPU; RuntimeError there for a class that does not exist, which a CPU has refused before."""
        cluster = torch.zeros_like(target)
        start = torch.zeros_like(target)
        for previous, cutoff in zip([0, *cutoffs], cutoffs):
            beyond = target >= cutoff
            cluster += beyond
            start += beyond * (cutoff - previous)
        cluster.masked_fill_(target < 0, len(cutoffs))
        cluster.masked_fill_(~counted, -1)
        order = cluster.argsort(stable=True)
        ignored, *counts, wrong = torch.bincount(cluster + 1, minlength=len(cutoffs) + 2).tolist()
        if wrong:
            raise RuntimeError(
                f"target: got {wrong} classes that do not exist, expected those from 0 to {cutoffs[-1] - 1}"
            )
        order = order[ignored:]
        target, start = target.index_select(0, order), start.index_select(0, order)
        return cls(order, counts, target, target - start)

    def places_in_head(self, shortlist: int) -> Tensor:
        """The classes of the head: those of the shortlist, and of each other sample its cluster."""
        places = self.within.clone()
        for cluster, rows in enumerate(self.clusters()):
            places[rows] = shortlist + cluster
        return places

    def clusters(self) -> Iterator[slice]:
        """The samples of each cluster, the shortlist left out."""
        ends = list(accumulate(self.counts))
        return (slice(start, stop) for start, stop in zip(ends, ends[1:]))


class _Softmax:
    """A softmax of every clone, for B samples: the head, or a tail after its projection.

    inputs `[B, H]`, or `[N, B, H]` where each clone has its own; weight `[N, C, H]`; place `[B]` of the targets.
    """

    def __init__(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, place: Tensor, memory: int
    ) -> None:
        self.clones, self.classes, self.rows = weight.size(0), weight.size(1), place.size(0)
        self.inputs, self.weight, self.bias, self.place = inputs, weight, bias, place
        self.wide = checks.accumulator(inputs.dtype)
        self.memory = memory
        self.kept: Tensor | None = None

    def bytes(self) -> int:
        """Of all logits."""
        return self.clones * self.rows * self.classes * self.wide.itemsize

    def run(self, keep: bool) -> None:
        """Find of each clone and sample, `[N, B]`: logp of the target, alive, whether it is the first of the largest;
        and what the backward takes: the largest logit, the sum of exponentials, and what is kept of the logits."""
        like, shape = self.inputs, (self.clones, self.rows)
        self.logp, self.peak, self.total = (like.new_empty(shape, dtype=self.wide) for _ in "123")
        self.alive, self.first = (like.new_empty(shape, dtype=torch.bool) for _ in "12")
        if keep:
            self.kept = like.new_empty((*shape, self.classes), dtype=self.wide)
        block = min(self.memory, _CPU_BLOCK) if like.device.type == "cpu" else self.memory
        for where in self._blocks(block):
            z = self._logits(where, None if self.kept is None else self.kept[where])
            peak, largest = z.max(2)
            least = z.amin(2)
            place = self.place[where[1]].expand(z.shape[:2])
            logp = z.gather(2, place.unsqueeze(2)).squeeze(2).sub_(peak)
            total = z.sub_(peak.unsqueeze(2)).exp_().sum(2)
            self.first[where] = largest == place
            self.logp[where] = logp.sub_(total.log())
            # NaN if a logit is NaN or inf, -inf if one is -inf or too far below the largest.
            self.alive[where] = (least - peak).isfinite()
            self.peak[where], self.total[where] = peak, total
            if keep:
                self._subtract_targets(z, where, total)
        if not _holds(self.alive):
            self.total = torch.where(self.alive, self.total, 1)
            if self.kept is not None:
                self.kept.masked_fill_(~self.alive.unsqueeze(2), 0)

    def saved(self) -> list[Tensor | None]:
        """What `found` takes in the backward."""
        return [self.peak, self.total, self.alive, self.kept]

    def found(self, peak: Tensor, total: Tensor, alive: Tensor, kept: Tensor | None) -> None:
        self.peak, self.total, self.alive, self.kept = peak, total, alive, kept

    def gradients(
        self, factors: Tensor, need_own: bool, need_inputs: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """With g the gradient of -logp by the logits: the sums of `factors [N, B]` times g to weight and bias; and g
        times the weight, `[N, B, H]`, 0 where the clone is dead. What is not needed is None, or empty."""
        own = (factors / self.total).unsqueeze(2)
        dweight = dbias = None
        dinputs = self.weight.new_empty(0, dtype=self.wide)
        if need_inputs:
            shape = self.clones, self.rows, self.weight.size(2)
            dinputs = self.weight.new_empty(shape, dtype=self.wide)
        if need_own and self.kept is None:
            dweight = self.weight.new_zeros(self.weight.shape, dtype=self.wide)
        everything = (slice(0, self.clones), slice(0, self.rows))
        blocks = [everything] if self.kept is not None else self._blocks(self.memory)
        for where in blocks:
            g = self._exponentials(where) if self.kept is None else self.kept
            clones = where[0]
            if need_own:
                inputs = _finite(self._inputs(where)).to(self.wide) * own[where]
                if dweight is None:
                    dweight = torch.bmm(g.mT, inputs)
                else:
                    dweight[clones].baddbmm_(g.mT, inputs)
                if self.bias is not None:
                    if dbias is None:
                        dbias = dweight.new_zeros(self.bias.shape)
                    dbias[clones] += torch.bmm(g.mT, own[where]).squeeze(2)
            if need_inputs:
                torch.bmm(g, self.weight[clones].to(self.wide), out=dinputs[where])
        if need_inputs:
            dinputs.div_(self.total.unsqueeze(2))
            if not _holds(self.alive):
                dinputs.masked_fill_(~self.alive.unsqueeze(2), 0)
        return dweight, dbias, dinputs

    def _blocks(self, block: int) -> Iterator[tuple[slice, slice]]:
        """Clones and samples whose logits have about so many bytes; of several clones all samples."""
        rows = max(block // (self.classes * self.wide.itemsize), 1)
        clones = max(rows // max(self.rows, 1), 1)
        for n in range(0, self.clones, clones):
            for b in range(0, self.rows, rows):
                yield slice(n, min(n + clones, self.clones)), slice(b, min(b + rows, self.rows))

    def _inputs(self, where: tuple[slice, slice]) -> Tensor:
        clones, rows = where
        if self.inputs.dim() == 3:
            return self.inputs[where]
        return self.inputs[rows].expand(clones.stop - clones.start, -1, -1)

    def _logits(self, where: tuple[slice, slice], out: Tensor | None = None) -> Tensor:
        clones = where[0]
        weight = self.weight[clones].to(self.wide)
        z = torch.bmm(self._inputs(where).to(self.wide), weight.mT, out=out)
        return z if self.bias is None else z.add_(self.bias[clones].to(self.wide).unsqueeze(1))

    def _exponentials(self, where: tuple[slice, slice]) -> Tensor:
        z = self._logits(where).sub_(self.peak[where].unsqueeze(2)).exp_()
        self._subtract_targets(z, where, self.total[where])
        alive = self.alive[where]
        return z if _holds(alive) else z.masked_fill_(~alive.unsqueeze(2), 0)

    def _subtract_targets(self, z: Tensor, where: tuple[slice, slice], total: Tensor) -> None:
        """From exponentials to `total` times the gradient of -logp."""
        place = self.place[where[1]].expand(z.shape[:2]).unsqueeze(2)
        z.scatter_add_(2, place, -total.unsqueeze(2))


def _holds(mask: Tensor) -> bool:
    """Whether all are true, as far as that is known without a wait for a device."""
    return mask.device.type == "cpu" and bool(mask.all())


def _finite(x: Tensor, dims: int | tuple[int, ...] = -1) -> Tensor:
    """x with zeros in place of every slice along `dims` that is not finite."""
    finite = x.isfinite().all(dims, keepdim=True)
    return x if _holds(finite) else torch.where(finite, x, 0)


class _LogLikelihoods(torch.autograd.Function):
    """Log-likelihoods `[B, N]` of the targets, twice: the first has the gradient to x, the second those to the clones;
    then the masks of the living clones and of those whose greedy guess the target is."""

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        samples: _Samples,
        memory: int,
        *tails: Tensor,
    ) -> tuple[Tensor, ...]:
        hidden = _hidden(x, samples, tails)
        parts = _parts(x, weight, bias, samples, memory, tails, hidden)
        left = memory if any(ctx.needs_input_grad) else -1
        for part in parts:
            keep = part.bytes() <= left
            part.run(keep)
            left -= part.bytes() if keep else 0
        head, *others = parts
        logp, alive, first = head.logp, head.alive, head.first
        for rows, tail in zip(samples.clusters(), others, strict=True):
            logp[:, rows] += tail.logp
            alive = alive.clone() if alive is head.alive else alive
            alive[:, rows] &= tail.alive
            first[:, rows] &= tail.first
        alive = alive & logp.isfinite()
        logp = torch.where(alive, logp, -math.inf).t()
        state = [tensor for part in parts for tensor in part.saved()]
        ctx.save_for_backward(x, weight, bias, *tails, *hidden, *state)
        ctx.samples, ctx.memory, ctx.num_tails = samples, memory, len(tails)
        alive, first = alive.t(), (alive & first).t()
        ctx.mark_non_differentiable(alive, first)
        return logp, logp.clone(), alive, first

    @staticmethod
    @without_autocast
    def backward(
        ctx: Any, mixture: Tensor, own: Tensor, *unused: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, bias, *others = ctx.saved_tensors
        tails, others = others[: ctx.num_tails], others[ctx.num_tails :]
        inputs = x, weight, bias, *tails
        if torch.is_grad_enabled() or derivatives.transformed() or derivatives.is_batch(own):
            dx, dweight, dbias, *dtails = _plain_gradients(inputs, ctx.samples.target, mixture, own)
            return dx, dweight, dbias, None, None, *dtails
        need_x, *needs = ctx.needs_input_grad
        need_own = any(needs)
        hidden, state = others[: len(tails) // 2], others[len(tails) // 2 :]
        parts = _parts(x, weight, bias, ctx.samples, ctx.memory, tails, hidden)
        for number, part in enumerate(parts):
            part.found(*state[4 * number : 4 * number + 4])
        head, *rest = parts
        # Of -logp.
        mixture, own = -mixture.t(), -own.t()
        dweight, dbias, each = head.gradients(own, need_own, need_x)
        dx = (mixture.unsqueeze(2) * each).sum(0) if need_x else None
        found: list[Tensor | None] = []
        clusters = ctx.samples.clusters()
        for rows, tail, (projection, _) in zip(clusters, rest, pairs(tails), strict=True):
            dtail, _, each = tail.gradients(own[:, rows], need_own, need_own or need_x)
            dprojection = None
            if need_own:
                scaled = own[:, rows].unsqueeze(2) * each
                here = _finite(x[rows]).to(each.dtype).expand(len(projection), -1, -1)
                dprojection = torch.bmm(scaled.mT, here)
            if dx is not None:
                scaled = (mixture[:, rows].unsqueeze(2) * each).movedim(0, 1).flatten(1)
                dx[rows] += scaled @ _finite(projection, (1, 2)).to(each.dtype).flatten(0, 1)
            found += [dprojection, dtail]
        gradients = [dx, dweight, dbias, *found]
        typed = [
            None if g is None or t is None else g.to(t.dtype)
            for g, t in zip(gradients, inputs, strict=True)
        ]
        return *typed[:3], None, None, *typed[3:]


def _hidden(x: Tensor, samples: _Samples, tails: Sequence[Tensor]) -> list[Tensor]:
    """What the tails' projection layers make of the samples of each cluster, `[N, B_k, H_k]`."""
    wide = checks.accumulator(x.dtype)
    return [
        torch.bmm(x[rows].to(wide).expand(len(projection), -1, -1), projection.to(wide).mT)
        for rows, (projection, _) in zip(samples.clusters(), pairs(tails), strict=True)
    ]


def _parts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    samples: _Samples,
    memory: int,
    tails: Sequence[Tensor],
    hidden: Sequence[Tensor],
) -> list[_Softmax]:
    """The head and the tails, each with its samples."""
    shortlist = weight.size(1) - len(hidden)
    head = _Softmax(x, weight, bias, samples.places_in_head(shortlist), memory)
    clusters = zip(samples.clusters(), pairs(tails), hidden, strict=True)
    return [
        head,
        *(_Softmax(h, tail, None, samples.within[rows], memory) for rows, (_, tail), h in clusters),
    ]


def _plain_gradients(
    inputs: Sequence[Tensor | None], target: Tensor, mixture: Tensor, own: Tensor
) -> list[Tensor | None]:
    """The gradients by the reference: these have a derivative by what comes from behind, which may be a batch."""

    def both(inputs: list[Any]) -> Tensor:
        x, weight, bias, *tails = derivatives.once(NO_OTHER_DERIVATIVE, *inputs)
        x, weight, bias, tails = reference.in_one_dtype(x, weight, bias, pairs(tails))
        fixed = [(projection.detach(), tail.detach()) for projection, tail in tails]
        fixed_bias = None if bias is None else bias.detach()
        of_mixture = reference.log_likelihoods(x, weight.detach(), fixed_bias, fixed, target)
        of_clones = reference.log_likelihoods(x.detach(), weight, bias, tails, target)
        return torch.stack([of_mixture[0], of_clones[0]])

    return derivatives.plain_gradients(both, inputs, torch.stack([mixture, own]))


@compiler.disable("the samples of each cluster are looked for")
def adaptive_stats(
    head: AdaptiveClassifierClones,
    features: Tensor,
    targets: Tensor,
    weighting: Weighting,
    log_posterior: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """The mixture's loss, a scalar or one by one, and the statistics `[3, N]`."""
    with torch.autocast(features.device.type, enabled=False):
        return _stats(head, features, targets, weighting, log_posterior, impl)


def _stats(
    head: AdaptiveClassifierClones,
    features: Tensor,
    targets: Tensor,
    weighting: Weighting,
    log_posterior: Tensor,
    impl: str,
) -> tuple[Tensor, Tensor]:
    memory = checks.budget(features, head.memory_budget)
    samples, likelihood = features.shape[:-1], head.likelihood()
    x, weight, bias, tails = in_rows(head, features, log_posterior=log_posterior, target=targets)
    checks.check_inputs(x, weight, bias, log_posterior, memory)
    # The targets are classes of the whole.
    like = weight.new_empty(1, head.num_classes, 0)
    if targets.is_floating_point() and targets.shape != samples:
        raise ValueError(
            f"target: got {shown(targets)}, expected classes of shape {list(samples)}: probabilities would need the "
            "tails of all clusters for every sample, which ClassifierClones is made for"
        )
    target = likelihood.rows(targets, samples, like)
    likelihood, target, mean = likelihood.weighed(target, like, weighting, "reference")
    likelihood.check_target(target, x, like)
    row_weight, reduction = likelihood.row_weight, "mean" if mean else "sum"
    options: dict[str, Any] = {"per_sample": weighting.per_sample}
    if backends.select(checks.OP, x.device, impl) == "reference" or derivatives.transformed():
        x, weight, bias, *tails = derivatives.once(NO_OTHER_DERIVATIVE, x, weight, bias, *tails)
        inputs = x, weight, bias, pairs(tails), log_posterior.detach(), target
        options |= {"ignore_index": likelihood.ignore_index, "row_weight": row_weight}
        loss, stats = reference.adaptive_mixture_nll(*inputs, reduction=reduction, **options)
        return loss.view(samples) if weighting.per_sample else loss, stats
    counted = likelihood.counted(target)
    if row_weight is not None:
        counted = counted & (row_weight != 0)
    which = _Samples.of(target, counted, head.cutoffs)
    x = x.index_select(0, which.order)
    mixture, own, alive, first = _LogLikelihoods.apply(x, weight, bias, which, memory, *tails)
    if row_weight is not None:
        options["row_weight"] = row_weight.index_select(0, which.order)
    every = torch.ones_like(which.order, dtype=torch.bool)
    both = mixture, own, alive, first.double(), every
    loss, stats = combine(*both, log_posterior, reduction, **options)
    if weighting.per_sample:
        loss = loss.new_zeros(target.shape).index_copy(0, which.order, loss).view(samples)
    return loss, stats


def in_rows(
    head: AdaptiveClassifierClones, features: Tensor, **others: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
    """`checks.flat` of the features and all parameters; RuntimeError for tensors, `others` too, on several devices."""
    named = {name.replace(".", "_"): tail for name, tail in head.tail.named_parameters("tail")}
    own = {"weight": head.weight, "bias": head.bias}
    check_together("bias", x=features, **own, **named, **others)
    x, weight, bias = checks.flat(features, head.weight, head.bias)
    return x, weight, bias, [tail.to(x.dtype) for tail in head.tails()]
