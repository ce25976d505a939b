"""The switch posterior over clones: one Bayesian update (van Erven, Grunwald, de Rooij, NIPS 2007; paper, section 3.2).

The state is a joint posterior over (row, clone). Row 0, "unstable": the sequence of best clones may still switch at
the next observation; row 1, "stable": it stays with this clone for ever. `logw [2, N]` holds its logarithm. At
observation t an unstable hypothesis switches with probability pi = 1 / (t + 1): that mass is pooled over the clones
and handed out again uniformly, a share theta of it unstable and 1 - theta stable.
"""

import math
from typing import Any

import torch
from torch import Tensor


def initial_state(
    num_clones: int, theta: float, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`(logw [2, N] float64, log_posterior [N] float64, t int64 scalar)` before any observation."""
    options: dict[str, Any] = {"dtype": torch.float64, "device": device}
    logw = torch.empty(2, num_clones, **options)
    logw[0] = math.log(theta) - math.log(num_clones)
    logw[1] = math.log(1 - theta) - math.log(num_clones)
    log_posterior = torch.full((num_clones,), -math.log(num_clones), **options)
    return logw, log_posterior, torch.ones((), dtype=torch.int64, device=device)


@torch.no_grad()
def switch_update_(
    logw: Tensor, log_posterior: Tensor, t: Tensor, log_likelihood: Tensor, theta: float
) -> None:
    """Update `logw [2, N]`, `log_posterior [N]` and `t` in place by one observation, `log_likelihood [N]`.

    A log-likelihood that is NaN or +inf counts as -inf (a clone that diverged). If all clones with mass are at -inf the
    observation says nothing and the state stays as it was.
    """
    num_clones = logw.size(1)
    evidence = log_likelihood.to(logw.dtype)
    evidence = torch.where(evidence < math.inf, evidence, -math.inf)

    # What all clones have in common cancels; beside 1e12 of it the weights would lose their digits.
    largest = evidence.max()
    evidence = evidence - torch.where(largest > -math.inf, largest, 0)

    new = logw + evidence
    informative = (new > -math.inf).any()
    pi = 1 / (t.to(logw.dtype) + 1)
    pool = torch.logsumexp(new[0], dim=0) + pi.log() - math.log(num_clones)
    unstable = torch.logaddexp(new[0] + torch.log1p(-pi), math.log(theta) + pool)
    stable = torch.logaddexp(new[1], math.log(1 - theta) + pool)
    new = torch.stack([unstable, stable])
    new = new - torch.logsumexp(new.flatten(), dim=0)

    logw.copy_(torch.where(informative, new, logw))
    log_posterior.copy_(
        torch.where(informative, torch.logsumexp(new, dim=0), log_posterior.to(new.dtype))
    )
    t.add_(informative.to(t.dtype))
