"""The clones of a head over ranks (paper, appendix D): every rank computes its own, and their results are merged.

The merging costs a gathering of B + 3 N / R numbers in the forward, and the sum of the features' gradient, B x D, in
the backward; nothing of the clones leaves its rank. Formulas: merging.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alrao_fast import backends, compiler
from alrao_fast.nn.merging import merged_losses, shares_of_mass
from alrao_fast.nn.over_ranks import OverRanks, Part, Ranks
from alrao_fast.ops.checks import check_together
from alrao_fast.ops.mixture import checks
from alrao_fast.ops.mixture.likelihood import Likelihood
from alrao_fast.ops.mixture.log_prob import log_prob_and_mass
from alrao_fast.ops.mixture.loss import prepared_stats
from alrao_fast.reference.switch_mixture import mean_and_mass

if TYPE_CHECKING:
    from alrao_fast.nn.clones import LinearClones


class _Rows:
    """Factors `[B]` of rows, known after the function that has them."""

    factors: Tensor


class _ScaledBack(torch.autograd.Function):
    """`x [B, D]`, whose gradient is multiplied row by row by what `rows` has then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: _Rows) -> Tensor:
        ctx.rows = rows
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (ctx.rows.factors.unsqueeze(1) * grad).to(grad.dtype), None


class _InPlaceOf(torch.autograd.Function):
    """`merged [B]`, whose gradient goes to `losses [B]` as it is: what is each clone's own depends on no share."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, merged: Tensor) -> Tensor:
        ctx.dtype = losses.dtype
        return merged.view_as(merged)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


class _MergedLogProb(torch.autograd.Function):
    """Log-probabilities `[B, C]` of the mixture from those of this rank's clones, of which `log_share [B]` is the log
    of their share of the posterior."""

    @staticmethod
    def forward(ctx: Any, log_prob: Tensor, log_share: Tensor, ranks: Ranks) -> Tensor:
        joint = log_prob + log_share.unsqueeze(1).to(log_prob.dtype)
        peak = joint.clone()
        ranks.largest_(peak)
        peak = torch.where(peak > -math.inf, peak, 0)
        total = (joint - peak).exp()
        ranks.sum_(total)
        merged = peak + total.log()
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.where(merged > -math.inf, (joint - merged).exp(), 0))
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (responsibility,) = ctx.saved_tensors
        return grad * responsibility, None, None


class _MergedMean(torch.autograd.Function):
    """The mean `[B, K]` of the mixture from that of this rank's clones, whose share of the posterior is `share [B]`."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, share: Tensor, ranks: Ranks) -> Tensor:
        share = share.unsqueeze(1).to(mean.dtype)
        ctx.save_for_backward(share)
        total = torch.where(share > 0, share * mean, 0)
        ranks.sum_(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (share,) = ctx.saved_tensors
        return share * grad, None, None


class ClonesOverRanks(OverRanks):
    """A head whose clones lie over ranks: `weight [N, C, D]` and `bias [N, C]` are DTensors, Shard(0)."""

    dim = 0
    what = "clones"

    def part(self, head: LinearClones) -> Part:
        """This rank's clones; where it has none, one of no posterior mass, since every rank has a part in the sums."""
        part = super().part(head)
        if part.stop > part.start:
            return part
        weight, bias = part.weight, part.bias
        weight = torch.cat([weight, weight.new_zeros(1, *weight.shape[1:])])
        bias = None if bias is None else torch.cat([bias, bias.new_zeros(1, bias.size(1))])
        return part._replace(weight=weight, bias=bias)

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
        factors: Tensor | None = likelihood.options()["row_weight"]
        rows = _Rows()
        losses, stats = prepared_stats(
            # A factor's multiple is no log-likelihood.
            likelihood.one_by_one(None if factors is None else counted.to(factors.dtype)),
            (_ScaledBack.apply(x, rows), part.weight, part.bias, self._of(part, log_posterior)),
            target,
            False,
            True,
            checks.budget(x, head.memory_budget),
            backends.select(checks.OP, x.device, impl),
        )
        every, stats = self._gathered(part, losses, stats, head.num_clones)
        merged, shares = merged_losses(every)
        rows.factors = shares[part.ranks.here]
        return _InPlaceOf.apply(losses, merged), stats

    @compiler.disable("the clones of the head lie over ranks")
    def log_prob(
        self, head: LinearClones, features: Tensor, log_posterior: Tensor, impl: str
    ) -> Tensor:
        part = self.part(head)
        x = self.entered(head, features)
        log_prob, log_mass = log_prob_and_mass(
            x,
            part.weight,
            part.bias,
            self._of(part, log_posterior),
            logit_softcap=getattr(head, "logit_softcap", None),
            memory_budget=head.memory_budget,
            impl=impl,
        )
        log_share = self._log_shares(part, log_mass)[part.ranks.here]
        merged = _MergedLogProb.apply(log_prob, log_share, part.ranks)
        return merged.view(*x.shape[:-1], merged.size(1))

    @compiler.disable("the clones of the head lie over ranks")
    def mean(
        self, head: LinearClones, features: Tensor, log_posterior: Tensor, impl: str
    ) -> Tensor:
        part = self.part(head)
        x = self.entered(head, features)
        check_together("bias", features=x, weight=part.weight, bias=part.bias)
        rows, weight, bias = checks.flat(x, part.weight, part.bias)
        log_posterior = self._of(part, log_posterior)
        checks.check_inputs(rows, weight, bias, log_posterior, checks.budget(x, None))
        mean, log_mass = mean_and_mass(rows, weight, bias, log_posterior)
        shares = self._log_shares(part, log_mass).exp()
        merged = _MergedMean.apply(mean, shares[part.ranks.here], part.ranks)
        # No value is a mean of none.
        merged = torch.where(shares.any(0).unsqueeze(1), merged, math.nan)
        return merged.view(*x.shape[:-1], merged.size(1))

    @staticmethod
    def _of(part: Part, log_posterior: Tensor) -> Tensor:
        """The log-posterior of this rank's clones."""
        if part.stop > part.start:
            return log_posterior[part.start : part.stop]
        return log_posterior.new_full((1,), -math.inf)

    @staticmethod
    def _gathered(
        part: Part, losses: Tensor, stats: Tensor, num_clones: int
    ) -> tuple[Tensor, Tensor]:
        """The losses `[R, B]` of the ranks' clones, float64, and the statistics `[3, N]` of all clones."""
        most, here = -(-num_clones // part.ranks.size), part.stop - part.start
        padded = stats.new_zeros(3, most)
        padded[:, :here] = stats[:, :here]
        found = part.ranks.gathered(torch.cat([losses.detach().double(), padded.flatten()]))
        every, parts = found.split([losses.numel(), padded.numel()], 1)
        return every, parts.unflatten(1, (3, most)).movedim(0, 1).flatten(1)[:, :num_clones]

    @staticmethod
    def _log_shares(part: Part, log_mass: Tensor) -> Tensor:
        """The logs `[R, B]` of the ranks' shares of the living clones' posterior mass."""
        return shares_of_mass(part.ranks.gathered(log_mass.detach().double()))
