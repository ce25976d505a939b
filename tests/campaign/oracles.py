"""What is right, in float64 by the plainest means: the mixture's loss and gradients, predictions, the switch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Mixture(NamedTuple):
    """Loss, statistics [3, N], and gradients to x, weight and bias."""

    loss: Tensor
    stats: Tensor
    dx: Tensor
    dweight: Tensor
    dbias: Tensor | None


def double(tensor: Any) -> Any:
    return None if tensor is None else tensor.detach().double().clone()


def log_likelihoods(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """`logp [B, N]` of the classes."""
    rows = []
    for n in range(len(weight)):
        logits = F.linear(x, weight[n], None if bias is None else bias[n])
        rows.append(F.log_softmax(logits, 1)[torch.arange(len(x)), target])
    return torch.stack(rows, 1)


def log_densities(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, sigma2: float
) -> Tensor:
    rows = []
    for n in range(len(weight)):
        mean = F.linear(x, weight[n], None if bias is None else bias[n])
        square = (target - mean).square().sum(1)
        constant = 0.5 * target.size(1) * math.log(2 * math.pi * sigma2)
        rows.append(-square / (2 * sigma2) - constant)
    return torch.stack(rows, 1)


def mixture(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_posterior: Tensor,
    target: Tensor,
    *,
    sigma2: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Mixture:
    """The loss of finite clones: the mixture's gradient to x, to each clone that of its own loss."""
    shape = x.shape
    x, weight, bias, a = (double(t) for t in (x, weight, bias, log_posterior))
    x = x.reshape(-1, shape[-1])
    if sigma2 is None:
        target = target.detach().reshape(-1).long()
        counted = target != ignore_index
    else:
        target = target.detach().double().reshape(len(x), -1)
        counted = torch.ones(len(x), dtype=torch.bool)
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]

    def logp(*operands: Any) -> Tensor:
        own_x, w, b = operands
        if sigma2 is None:
            return log_likelihoods(own_x[counted], w, b, target[counted])
        return log_densities(own_x, w, b, target, sigma2)

    norm = max(int(counted.sum()), 1) if reduction == "mean" else 1
    plain_bias = None if bias is None else bias.detach()
    loss = -torch.logsumexp(a + logp(x, weight.detach(), plain_bias), 1).sum() / norm
    own = logp(x.detach(), weight, bias)
    (loss + (-own.sum() / norm)).backward()
    grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
    with torch.no_grad():
        if sigma2 is None:
            score = correct(x[counted], weight, bias, target[counted])
        else:
            score = torch.stack(
                [
                    (target - F.linear(x, weight[n], None if bias is None else bias[n]))
                    .square()
                    .sum()
                    for n in range(len(weight))
                ]
            )
    count = counted.sum().double().expand(len(weight))
    stats = torch.stack([-own.detach().sum(0), score, count])
    dbias = None if bias is None else grads[2]
    return Mixture(loss.detach(), stats, grads[0].reshape(shape), grads[1], dbias)


def correct(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    rows = []
    for n in range(len(weight)):
        logits = F.linear(x, weight[n], None if bias is None else bias[n])
        rows.append((logits.argmax(1) == target).double().sum())
    return torch.stack(rows)


def log_prob(x: Tensor, weight: Tensor, bias: Tensor | None, log_posterior: Tensor) -> Tensor:
    """Log-probabilities [..., C] of the mixture of the clones that are finite, the posterior renormalised to them."""
    x, weight, bias, a = (double(t) for t in (x, weight, bias, log_posterior))
    outputs = _outputs(x, weight, bias)
    alive = outputs.isfinite().all(-1)
    logp = F.log_softmax(torch.where(alive.unsqueeze(-1), outputs, 0), -1)
    own = torch.where(alive, a, -math.inf).log_softmax(-1).unsqueeze(-1)
    return torch.logsumexp(own + logp, -2)


def mean(x: Tensor, weight: Tensor, bias: Tensor | None, log_posterior: Tensor) -> Tensor:
    x, weight, bias, a = (double(t) for t in (x, weight, bias, log_posterior))
    outputs = _outputs(x, weight, bias)
    alive = outputs.isfinite().all(-1)
    p = torch.where(alive, a, -math.inf).softmax(-1).unsqueeze(-1)
    return (p * torch.where(alive.unsqueeze(-1), outputs, 0)).sum(-2)


def _outputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Outputs [..., N, C]."""
    outputs = torch.einsum("...d,ncd->...nc", x, weight)
    return outputs if bias is None else outputs + bias


class SwitchState:
    """The switch in Python floats: a list of probabilities of (may switch, stays) and clone, by the definition."""

    def __init__(self, num_clones: int, theta: float = 0.999) -> None:
        self.theta, self.t, self.n = theta, 1, num_clones
        start = [math.log(theta), math.log1p(-theta)]
        self.logw = [[s - math.log(num_clones)] * num_clones for s in start]

    @classmethod
    def of(cls, logw: Tensor, t: Tensor, theta: float) -> SwitchState:
        state = cls(logw.size(1), theta)
        state.logw, state.t = logw.double().tolist(), int(t)
        return state

    def update(self, log_likelihood: list[float]) -> None:
        evidence = [v if v < math.inf else -math.inf for v in log_likelihood]
        if all(v == -math.inf for v in evidence):
            return
        # What is common to all clones says nothing, and may be large.
        top = max(evidence)
        new = [[w + (v - top) for w, v in zip(row, evidence)] for row in self.logw]
        log_pi, log_stay = math.log(1 / (self.t + 1)), math.log1p(-1 / (self.t + 1))
        pool = _logsumexp(new[0]) + log_pi - math.log(self.n)
        shares = math.log(self.theta) + pool, math.log1p(-self.theta) + pool
        unstable = [_logsumexp([w + log_stay, shares[0]]) for w in new[0]]
        stable = [_logsumexp([w, shares[1]]) for w in new[1]]
        total = _logsumexp(unstable + stable)
        self.logw = [[w - total for w in row] for row in (unstable, stable)]
        self.t += 1

    @property
    def log_posterior(self) -> Tensor:
        pairs = zip(*self.logw)
        return torch.tensor([_logsumexp(list(pair)) for pair in pairs], dtype=torch.float64)


def _logsumexp(values: list[float]) -> float:
    top = max(values)
    if top == -math.inf:
        return top
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


def assert_near(actual: Any, expected: Any, what: str = "", tolerance: float | None = None) -> None:
    """Assert the same shape, and values within the accuracy of `actual`'s dtype."""
    actual = torch.as_tensor(actual).detach()
    expected = torch.as_tensor(expected).detach()
    usual = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
    limit = usual.get(actual.dtype, 0) if tolerance is None else tolerance
    assert actual.shape == expected.shape, (
        f"{what} has shape {list(actual.shape)}, right is {list(expected.shape)}"
    )
    scale = (
        max(1.0, float(expected.double().nan_to_num(0, 0, 0).abs().max()))
        if expected.numel()
        else 1.0
    )
    near = torch.isclose(
        actual.double(), expected.double(), rtol=limit, atol=limit * min(scale, 1e6), equal_nan=True
    )
    assert near.all(), f"{what} is {_show(actual)}, right is {_show(expected)}"


def _show(tensor: Tensor) -> str:
    return " ".join(str(tensor.flatten()[:6].tolist()).split())
