"""The loss of the clones of an adaptive softmax, of which every sample takes the head and one tail.

The samples are sorted by the cluster of their target, so that those of a tail are neighbours. Gradients are made along
with the likelihoods; the backward has the responsibilities, for the gradient to the features, and scales the clones'
own. Mathematics: reference/adaptive_mixture.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from alrao_fast import backends, compiler
from alrao_fast.arguments import shown
from alrao_fast.nn.adaptive_softmax import Softmax, clear_, finite
from alrao_fast.nn.autocast import without_autocast
from alrao_fast.ops import derivatives
from alrao_fast.ops.checks import check_together
from alrao_fast.ops.mixture import checks
from alrao_fast.ops.mixture.loss import NO_OTHER_DERIVATIVE
from alrao_fast.ops.mixture.weighting import Weighting
from alrao_fast.reference import adaptive_mixture as reference
from alrao_fast.reference import switch_mixture
from alrao_fast.reference.switch_mixture import combine

if TYPE_CHECKING:
    from alrao_fast.nn.adaptive import AdaptiveClassifierClones


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
        if target.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "targets: got them in the capture of a CUDA graph, expected none there: which samples a tail has is "
                "looked up by the host"
            )
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
        return (slice(start, stop) for start, stop in pairwise(ends))


class _Found(NamedTuple):
    """Of each clone and sample `[N, B]` the target's logp, whether the clone is alive, whether the target is the first
    guess; and gradients: of -logp to the inputs of the head and of the tails, the clones' own by their parameters."""

    logp: Tensor
    alive: Tensor
    first: Tensor
    inputs: list[Tensor]
    own: list[Tensor | None]


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tails: Sequence[Tensor],
    samples: _Samples,
    memory: int,
    factors: Tensor | None,
    need_x: bool,
) -> _Found:
    """All clones on samples in the order of their clusters; `factors [N, B]`: the clones' own gradients are needed."""
    need_own = factors is not None
    shortlist = weight.size(1) - len(tails) // 2
    head = Softmax(x, weight, bias, samples.places_in_head(shortlist), memory)
    found = head.run(factors, need_own, need_x)
    inputs, own = [found.inputs], [found.weight, found.bias]
    wide = head.wide
    for rows, (projection, tail) in zip(samples.clusters(), pairs(tails), strict=True):
        here = x[rows].to(wide).expand(len(projection), -1, -1)
        hidden = torch.bmm(here, projection.to(wide).mT)
        part = Softmax(hidden, tail, None, samples.within[rows], memory)
        scale = None if factors is None else factors[:, rows]
        found = part.run(scale, need_own, need_own or need_x)
        inputs.append(found.inputs)
        dprojection = None
        if scale is not None and found.inputs is not None:
            dprojection = torch.bmm((scale.unsqueeze(2) * found.inputs).mT, finite(here))
        own += [dprojection, found.weight]
        head.logp[:, rows] += part.logp
        head.alive[:, rows] &= part.alive
        head.first[:, rows] &= part.first
    alive = head.alive & head.logp.isfinite()
    logp = torch.where(alive, head.logp, -math.inf)
    return _Found(logp, alive, head.first & alive, [g for g in inputs if g is not None], own)


class _Losses(torch.autograd.Function):
    """Log-likelihoods `[B, N]` of the targets, with a graph to x alone; 0 with a graph to the clones alone, whose
    gradients are those of their own losses; the masks `[B, N]` of the living and of those whose guess the target is.

    The losses have the factors `[B]`, with which the gradients to the clones are made along with the likelihoods. None:
    they are one by one, 0 is `[B]`, and its gradient brings the factors: the backward runs all again.
    """

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        samples: _Samples,
        factors: Tensor | None,
        memory: int,
        *tails: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs = x, weight, bias, tails
        need_x, *needs = ctx.needs_input_grad
        ctx.samples, ctx.memory, ctx.num_tails = samples, memory, len(tails)
        ctx.one_by_one = factors is None
        scale = None
        if factors is not None and any(needs):
            scale = factors.expand(weight.size(0), -1)
        found = _run(*inputs, samples, memory, scale, need_x and factors is not None)
        for gradient in found.own:
            if gradient is not None:
                lives = found.alive.all(1)
                clear_(gradient, lives.view(-1, *[1] * (gradient.dim() - 1)))
        ctx.save_for_backward(x, weight, bias, factors, *tails, *found.inputs, *found.own)
        ctx.num_inputs = len(found.inputs)
        alive, first = found.alive.t(), found.first.t()
        ctx.mark_non_differentiable(alive, first)
        zero = found.logp.new_zeros(x.size(0) if factors is None else ())
        return found.logp.t(), zero, alive, first

    @staticmethod
    @without_autocast
    def backward(ctx: Any, mixture: Tensor, own: Tensor, *unused: Tensor) -> Any:
        x, weight, bias, factors, *saved = ctx.saved_tensors
        tails, saved = saved[: ctx.num_tails], saved[ctx.num_tails :]
        each, gradients = saved[: ctx.num_inputs], saved[ctx.num_inputs :]
        inputs = x, weight, bias, *tails
        need_x, *needs = ctx.needs_input_grad
        if torch.is_grad_enabled() or derivatives.transformed() or derivatives.is_batch(own):
            return _ordered(_plain_gradients(inputs, ctx.samples.target, factors, mixture, own))
        if ctx.one_by_one:
            scale = own.expand(weight.size(0), -1)
            found = _run(x, weight, bias, tails, ctx.samples, ctx.memory, scale, need_x)
            each, gradients = found.inputs, found.own
            # A clone that is dead for a sample whose loss is not asked for has its gradient.
            lives = (found.alive | (scale == 0)).all(1)
            for gradient in gradients:
                if gradient is not None:
                    clear_(gradient, lives.view(-1, *[1] * (gradient.dim() - 1)))
        elif any(needs):
            gradients = _scaled(gradients, own)
        dx = None
        if need_x:
            # Of -logp.
            share = -mixture.t().unsqueeze(2)
            dx = (share * each[0]).sum(0)
            clusters = ctx.samples.clusters()
            for rows, (projection, _), of_tail in zip(
                clusters, pairs(tails), each[1:], strict=True
            ):
                joint = (share[:, rows] * of_tail).movedim(0, 1).flatten(1)
                dx[rows] += joint @ finite(projection, (1, 2)).to(joint.dtype).flatten(0, 1)
        typed = [
            None if g is None or t is None else g.to(t.dtype)
            for g, t in zip([dx, *gradients], inputs, strict=True)
        ]
        return _ordered(typed)


def _ordered(gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Those to x, weight, bias and tails as autograd takes them."""
    return *gradients[:3], None, None, None, *gradients[3:]


def _scaled(gradients: Sequence[Tensor | None], factor: Tensor) -> list[Tensor | None]:
    """The gradients times the factor that comes from behind, in place unless another backward is to come."""
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return [None if g is None else g * factor for g in gradients]
    if factor.device.type != "cpu" or factor.item() != 1:
        for gradient in gradients:
            if gradient is not None:
                gradient *= factor
    return list(gradients)


def _plain_gradients(
    inputs: Sequence[Tensor | None],
    target: Tensor,
    factors: Tensor | None,
    mixture: Tensor,
    own: Tensor,
) -> list[Tensor | None]:
    """The gradients by the reference: these have a derivative by what comes from behind, which may be a batch."""

    def both(inputs: list[Any]) -> list[Tensor]:
        x, weight, bias, *parts = derivatives.once(NO_OTHER_DERIVATIVE, *inputs)
        x, weight, bias, tails = reference.in_one_dtype(x, weight, bias, pairs(parts))
        of_mixture, _, _ = reference.log_likelihoods(
            *reference.fixed(x, weight, bias, tails), target
        )
        logp, alive, _ = reference.log_likelihoods(x.detach(), weight, bias, tails, target)
        each = -switch_mixture.of_the_living(logp, alive).sum(1)
        losses = each if factors is None else (factors * each).sum()
        return [of_mixture, losses]

    return derivatives.plain_gradients(both, inputs, [mixture, own])


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
    order, x = which.order, x.index_select(0, which.order)
    factors = None if row_weight is None else row_weight.index_select(0, order)
    every = torch.ones_like(order, dtype=torch.bool)
    own_factors = None
    if not weighting.per_sample:
        own_factors = x.new_ones(x.size(0), dtype=checks.accumulator(x.dtype))
        own_factors = own_factors / max(x.size(0), 1) if mean else own_factors
        own_factors = own_factors if factors is None else factors
    logp, own, alive, first = _Losses.apply(x, weight, bias, which, own_factors, memory, *tails)
    both = logp, logp.detach(), alive, first.double(), every
    loss, stats = combine(*both, log_posterior, reduction, row_weight=factors, **options)
    if not weighting.per_sample:
        return loss + own, stats
    loss = loss + (own if factors is None else factors * own)
    return loss.new_zeros(target.shape).index_copy(0, order, loss).view(samples), stats


def in_rows(
    head: AdaptiveClassifierClones, features: Tensor, **others: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
    """`checks.flat` of the features and all parameters; RuntimeError for tensors, `others` too, on several devices."""
    named = {name.replace(".", "_"): tail for name, tail in head.tail.named_parameters("tail")}
    own = {"weight": head.weight, "bias": head.bias}
    check_together("bias", x=features, **own, **named, **others)
    x, weight, bias = checks.flat(features, head.weight, head.bias)
    return x, weight, bias, [tail.to(x.dtype) for tail in head.tails()]
