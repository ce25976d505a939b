"""What ranks that have some of the clones each make of their results: the formulas, which know of no process.

With `l_r[b] = -log sum_{n on r} exp(a_n + logp[b,n])` the loss of rank r's clones for sample b, the mixture's is

    l[b] = -log sum_r exp(-l_r[b])

and its gradient to x the sum over ranks of `share_r[b] dl_r[b]/dx`, where `share_r = exp(l - l_r)` is the
responsibility that the clones there have together. A rank without a living clone has `l_r = inf`, and the share 0.

Predictions are mixed over the clones that are alive for the sample; `log_mass_r[b]` is the log of the posterior mass
that those of rank r have together, by which the rank has divided.
"""

import math

import torch
from torch import Tensor


def merged_losses(losses: Tensor) -> tuple[Tensor, Tensor]:
    """The mixture's losses `[B]`, and the ranks' shares `[R, B]`, of the losses `[R, B]` of their clones.

    Where no rank has a living clone the loss is inf, and all shares are 0.
    """
    least = losses.amin(0)
    possible = least < math.inf
    least = torch.where(possible, least, 0)
    parts = (least - losses).exp()
    total = torch.where(possible, parts.sum(0), 1)
    return torch.where(possible, least - total.log(), math.inf), parts / total


def shares_of_mass(log_mass: Tensor) -> Tensor:
    """The ranks' shares `[R, B]`, as logarithms, of the living clones' posterior mass; -inf where there is none."""
    peak = log_mass.amax(0)
    possible = peak > -math.inf
    log_mass = torch.where(possible, log_mass, 0)
    return torch.where(possible, log_mass - log_mass.logsumexp(0), -math.inf)
