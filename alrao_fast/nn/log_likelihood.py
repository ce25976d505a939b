"""Log-likelihoods and entropies of a classifier's predictions, one pair for each sample, in chunks of samples.

Every chunk's log-probabilities `[b, C]` are dropped, and computed again in the backward: all `[B, C]` of them at once
would be the largest tensor of a language model's step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from alrao_fast import backends
from alrao_fast.nn.chunks import in_chunks
from alrao_fast.ops.checks import check_together
from alrao_fast.ops.mixture import checks, switch_mixture_log_prob
from alrao_fast.ops.mixture.likelihood import Classes

# Tensors of the size of a chunk's log-probabilities that stand at a time.
_TENSORS = 4


def log_likelihood(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_posterior: Tensor,
    targets: Tensor,
    likelihood: Classes,
    memory_budget: int | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """See `ClassifierClones.log_likelihood`; the posterior is the normalised one of predictions."""
    check_together("bias", features=features, weight=weight, bias=bias, targets=targets)
    samples = features.shape[:-1]
    x, weight, bias = checks.flat(features, weight, bias)
    target = likelihood.rows(targets, samples, weight)
    likelihood.check_target(target, x, weight)
    memory = checks.budget(x, memory_budget)
    # By its name: on a GPU the backward runs the chunks in a thread that may have another one in use.
    impl = backends.select(checks.OP, x.device, impl)
    wide = checks.accumulator(x.dtype)
    size = memory // (_TENSORS * weight.size(1) * wide.itemsize)

    def log_prob(x: Tensor) -> Tensor:
        return switch_mixture_log_prob(
            x,
            weight,
            bias,
            log_posterior,
            logit_softcap=likelihood.softcap or None,
            memory_budget=memory,
            impl=impl,
        )

    results = of_predictions(log_prob, x, target, likelihood, size)
    return results[0].view(samples), results[1].view(samples)


def of_predictions(
    log_prob: Callable[[Tensor], Tensor], x: Tensor, target: Tensor, likelihood: Classes, size: int
) -> tuple[Tensor, Tensor]:
    """The same of samples and checked targets in rows, `size` at a time, with predictions `log_prob(x) [b, C]`."""

    def chunk(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        counted = likelihood.counted(target)
        # What does not count may be anything, NaN too.
        x = torch.where(counted.unsqueeze(1), x, 0)
        return _of_log_prob(log_prob(x), target, counted)

    results = in_chunks(chunk, size, x, target)
    found, entropy = (torch.cat(list(of_parts)) for of_parts in zip(*results, strict=True))
    return found, entropy


def _of_log_prob(logp: Tensor, target: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets and entropies, of predictions `[B, C]`."""
    # An impossible class has no part in a sum over classes, nor in its gradient.
    possible = torch.where(logp > -math.inf, logp, 0)
    terms = torch.where(logp > -math.inf, possible.exp() * possible, 0)
    entropy = torch.where(counted, -terms.sum(1), 0)
    if target.dim() == 1:
        classes = logp.size(1)
        index = target.clamp(0, classes - 1).unsqueeze(1)
        # On a GPU a class that does not exist is impossible, as in the loss.
        exists = (target >= 0) & (target < classes)
        log_prob = torch.where(exists, logp.gather(1, index).squeeze(1), -math.inf)
    else:
        log_prob = torch.where(target == 0, 0, target * logp).sum(1)
    return torch.where(counted, log_prob, 0), entropy
