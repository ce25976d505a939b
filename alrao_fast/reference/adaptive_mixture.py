"""The N clones of an adaptive softmax (Grave et al. 2016, arXiv 1609.04309), mixed by one switch posterior.

The classes are cut into a shortlist, those below the first cutoff, and K clusters. Clone n has a head, a softmax over
the S classes of the shortlist and the K clusters, and for each cluster a tail, a softmax over its classes of a product
of two matrices, the first of which makes the features narrower:

    logp_n(c | x) = log_softmax(W_n x + b_n)[c]                                             c in the shortlist
                  = log_softmax(W_n x + b_n)[S + k] + log_softmax(V_nk P_nk x)[c - start_k]   c in cluster k

From there on all is as for N linear softmax classifiers (switch_mixture.py): the loss mixes the log-likelihoods of the
targets by the posterior, x gets the mixture's gradient and each clone, all of its parts, that of its own loss. Of a
sample the loss has the head and the tail of its target's cluster, a prediction has all tails.

A clone is dead for a sample where one of these log-probabilities, of whatever class, is not finite.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from alrao_fast.reference import switch_mixture

# Of each cluster P [N, H, D] and V [N, C_k, H].
Tails = Sequence[tuple[Tensor, Tensor]]


def _outputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Outputs [B, N, C] of linear layers `[N, C, D]`, for features `[B, D]` or those of each clone `[B, N, D]`."""
    out = torch.einsum("bd,ncd->bnc" if x.dim() == 2 else "bnd,ncd->bnc", x, weight)
    return out if bias is None else out + bias


def _finite_rows(tensor: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """`tensor` with zeros for every slice along `dims` that holds an entry that is not finite."""
    return torch.where(tensor.isfinite().all(dims, keepdim=True), tensor, tensor.new_zeros(()))


def _log_softmax(
    x: Tensor, weight: Tensor, bias: Tensor | None, projection: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, N, C] of a head or a tail; they are finite and true where the clone is alive [B, N]."""
    with torch.no_grad():
        inputs = x if projection is None else _outputs(x, projection, None)
        found = _outputs(inputs, weight, bias).log_softmax(2)
        alive = found.isfinite().all(2)
    if not torch.is_grad_enabled():
        return torch.where(alive.unsqueeze(2), found, 0), alive
    # On operands without what is not finite: 0 * inf would be NaN in the backward.
    inputs = _finite_rows(x, 1)
    if projection is not None:
        inputs = _finite_rows(_outputs(inputs, _finite_rows(projection, (1, 2)), None), 2)
    bias = None if bias is None else _finite_rows(bias, 1)
    safe = _outputs(inputs, _finite_rows(weight, (1, 2)), bias)
    return torch.where(alive.unsqueeze(2), safe, 0).log_softmax(2), alive


def log_probabilities(
    x: Tensor, weight: Tensor, bias: Tensor | None, tails: Tails
) -> tuple[Tensor, Tensor]:
    """Log-probabilities `[B, N, C]` of all classes under each clone, and the mask `[B, N]` of where they are true ones.

    `x [B, D]`, `weight [N, S + K, D]`, `bias [N, S + K]` or None.
    """
    head, alive = _log_softmax(x, weight, bias, None)
    shortlist = weight.size(1) - len(tails)
    parts = [head[:, :, :shortlist]]
    for k, (projection, tail) in enumerate(tails):
        within, lives = _log_softmax(x, tail, None, projection)
        parts.append(head[:, :, shortlist + k : shortlist + k + 1] + within)
        alive = alive & lives
    return torch.cat(parts, 2), alive


def log_likelihoods(
    x: Tensor, weight: Tensor, bias: Tensor | None, tails: Tails, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of classes `target [B]`, each `[B, N]`: the log-likelihood, -inf where the clone is dead, the mask of the living,
    and whether the target is the likeliest class of the likeliest cluster, each class of the shortlist being one."""
    head, alive = _log_softmax(x, weight, bias, None)
    shortlist = weight.size(1) - len(tails)
    place, parts, start = target, [], shortlist
    for k, (_, tail) in enumerate(tails):
        inside = (target >= start) & (target < start + tail.size(1))
        place = torch.where(inside, shortlist + k, place)
        parts.append((inside, target - start))
        start += tail.size(1)
    logp, correct = _of(head, place)
    for (projection, tail), (inside, within) in zip(tails, parts, strict=True):
        own, lives = _log_softmax(x, tail, None, projection)
        likelihood, first = _of(own, torch.where(inside, within, 0))
        inside = inside.unsqueeze(1)
        logp = logp + torch.where(inside, likelihood, 0)
        alive = alive & (lives | ~inside)
        correct = correct & (first | ~inside)
    alive = alive & logp.detach().isfinite()
    return torch.where(alive, logp, -math.inf), alive, correct & alive


def _of(logp: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Of `logp [B, N, C]` what stands at `place [B]`, and whether that is the largest; both `[B, N]`."""
    index = place.view(-1, 1, 1).expand(-1, logp.size(1), 1)
    return logp.gather(2, index).squeeze(2), logp.argmax(2) == place.unsqueeze(1)


def adaptive_mixture_nll(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tails: Tails,
    log_posterior: Tensor,
    target: Tensor,
    *,
    ignore_index: int,
    reduction: str,
    row_weight: Tensor | None = None,
    per_sample: bool = False,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the mixture of N adaptive softmax classifiers.

    `x [B, D]`, `weight [N, S + K, D]`, `bias [N, S + K]` or None, `log_posterior [N]`, `target [B]` int64. Options and
    results are those of `switch_mixture_nll`; the second row of the statistics counts the samples whose target is the
    likeliest class of the likeliest cluster.
    """
    x, weight, bias, tails = in_one_dtype(x, weight, bias, tails)
    counted = target != ignore_index
    if row_weight is not None:
        counted = counted & (row_weight != 0)
    # What does not count may be anything, NaN too, and gets a zero gradient.
    x = torch.where(counted.unsqueeze(1), x, 0)
    target = torch.where(counted, target, 0)
    mixture, *_ = log_likelihoods(*fixed(x, weight, bias, tails), target)
    own, alive, correct = log_likelihoods(x.detach(), weight, bias, tails, target)
    return switch_mixture.combine(
        mixture,
        own,
        alive,
        correct.double(),
        counted,
        log_posterior,
        reduction,
        row_weight=row_weight,
        per_sample=per_sample,
    )


def adaptive_mixture_log_prob(
    x: Tensor, weight: Tensor, bias: Tensor | None, tails: Tails, log_posterior: Tensor
) -> Tensor:
    """Log-probabilities `[B, C]` of the mixture over the living clones; -inf everywhere where all are dead."""
    logp, alive = log_probabilities(*in_one_dtype(x, weight, bias, tails))
    return switch_mixture.log_mixture_of_the_living(logp, alive, log_posterior)


def in_one_dtype(
    x: Tensor, weight: Tensor, bias: Tensor | None, tails: Tails
) -> tuple[Tensor, Tensor, Tensor | None, Tails]:
    """All in the dtype of the arithmetic: float64 if x or the weight is float64, else float32."""
    wide = x.dtype == torch.float64 or weight.dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    pairs = [(projection.to(dtype), tail.to(dtype)) for projection, tail in tails]
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), pairs


def fixed(
    x: Tensor, weight: Tensor, bias: Tensor | None, tails: Tails
) -> tuple[Tensor, Tensor, Tensor | None, Tails]:
    """The same with clones that get no gradient."""
    pairs = [(projection.detach(), tail.detach()) for projection, tail in tails]
    return x, weight.detach(), None if bias is None else bias.detach(), pairs
