"""N calls of a library's fused linear layer and cross-entropy, composed to what switch_mixture computes.

No library mixes, so that three compositions stand beside each other:

- "x N": N plain losses with the gradients of their sum. Does less than switch_mixture: no mixture.
- "two passes": each clone's own loss on detached features, and its loss per sample on a detached weight, through
  logsumexp: what autograd makes of the definition.
- "by rows": one pass per clone; the mixture's gradient to the features is each clone's own, row by row times the
  clone's responsibility. The cheapest correct one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alrao_fast.testing import MixtureInputs
from speed.case import Call, Candidate, Missing, sampled

# (x, weight [C, D], bias [C] or None, target, reduction) -> loss
Loss = Callable[[Tensor, Tensor, Any, Tensor, str], Tensor]


def _torch_chunked() -> Loss:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Missing(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x, w, b, y, reduction: F.linear_cross_entropy(
        x, w, y, linear_bias=b, reduction=reduction, options=options
    )


def _installed(module: str, package: str) -> None:
    if find_spec(module) is None:
        raise Missing(f"{package} is not installed")


def _no_bias(bias: Tensor | None) -> None:
    if bias is not None:
        raise Missing("this library's loss takes no bias")


def _liger() -> Loss:
    _installed("liger_kernel", "liger-kernel")
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused

    return lambda x, w, b, y, reduction: fused(x, w, y, bias=b, reduction=reduction)


def _cce() -> Loss:
    _installed("cut_cross_entropy", "cut-cross-entropy")
    from cut_cross_entropy import linear_cross_entropy

    def loss(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, reduction: str) -> Tensor:
        _no_bias(b)
        # Without its filter, which leaves out small gradients.
        return linear_cross_entropy(x, w, y, reduction=reduction, filter_eps=None)

    return loss


def _quack() -> Loss:
    _installed("quack", "quack-kernels")
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def loss(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, reduction: str) -> Tensor:
        _no_bias(b)
        if reduction == "none":
            raise Missing("quack's chunked loss returns none per sample")
        return chunked_linear_cross_entropy(x, w, y, reduction=reduction)

    return loss


class _Clones:
    """The inputs of a composition: the features, and each clone's weight and bias as leaves of their own."""

    def __init__(self, given: MixtureInputs) -> None:
        self.x = given.x.detach().requires_grad_()
        self.weights = [w.detach().requires_grad_() for w in given.weight]
        none = [None] * len(given.weight)
        self.biases = (
            none if given.bias is None else [b.detach().requires_grad_() for b in given.bias]
        )
        self.results: dict[str, Tensor] = {}

    def drop(self) -> None:
        self.results.clear()
        for leaf in (self.x, *self.weights, *self.biases):
            if leaf is not None:
                leaf.grad = None

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        return iter(zip(self.weights, self.biases))

    def outputs(self) -> Mapping[str, Tensor]:
        found = dict(self.results)
        if self.x.grad is not None:
            found["dx"] = sampled(self.x.grad)
        return {**found, "dweight": sampled(torch.stack([w.grad for w in self.weights]))}


def _usable(load: Callable[[], Loss], device: torch.device, gpu_only: bool) -> Loss:
    loss = load()
    if gpu_only and device.type != "cuda":
        raise Missing("runs on a GPU only")
    return loss


def _plain(load: Callable[[], Loss], gpu_only: bool, given: MixtureInputs) -> Call:
    loss = _usable(load, given.x.device, gpu_only)
    clones = _Clones(given)

    def run() -> None:
        clones.drop()
        own = torch.zeros((), device=given.x.device)
        for weight, bias in clones:
            one = loss(clones.x, weight, bias, given.target, "mean")
            # Each before the next: all their buffers at once would be N times the memory.
            one.backward()
            own += one.detach()
        clones.results["own"] = own

    return Call(run, clones.outputs, clones.drop)


def _two_passes(load: Callable[[], Loss], gpu_only: bool, given: MixtureInputs) -> Call:
    loss = _usable(load, given.x.device, gpu_only)
    clones = _Clones(given)

    def run() -> None:
        clones.drop()
        fixed = clones.x.detach()
        for weight, bias in clones:
            loss(fixed, weight, bias, given.target, "mean").backward()
        nll = torch.stack(
            [
                loss(clones.x, w.detach(), None if b is None else b.detach(), given.target, "none")
                for w, b in clones
            ]
        )
        prior = given.log_posterior.float().unsqueeze(1)
        mixture = -torch.logsumexp(prior - nll.float(), 0).mean()
        mixture.backward()
        clones.results["loss"] = mixture.detach()

    return Call(run, clones.outputs, clones.drop)


def _by_rows(load: Callable[[], Loss], gpu_only: bool, given: MixtureInputs) -> Call:
    loss = _usable(load, given.x.device, gpu_only)
    clones = _Clones(given)

    def run() -> None:
        clones.drop()
        joint, grads = [], []
        for prior, (weight, bias) in zip(given.log_posterior.float().unbind(), clones):
            x = clones.x.detach().requires_grad_()
            nll = loss(x, weight, bias, given.target, "none")
            nll.mean().backward()
            joint.append(prior - nll.detach().float())
            grads.append(x.grad)
        stacked = torch.stack(joint)
        shares = stacked.softmax(0).unsqueeze(2)
        clones.x.grad = sum(grad * share for grad, share in zip(grads, shares.to(given.x.dtype)))
        clones.results["loss"] = -torch.logsumexp(stacked, 0).mean()

    return Call(run, clones.outputs, clones.drop)


LIBRARIES: dict[str, tuple[Callable[[], Loss], bool]] = {
    "linear_cross_entropy": (_torch_chunked, False),
    "liger": (_liger, True),
    "cce": (_cce, True),
    "quack": (_quack, True),
}


def candidates() -> Iterator[Candidate]:
    """Every library in every composition."""
    correct = ("loss", "dx", "dweight")
    for name, (load, gpu_only) in LIBRARIES.items():
        yield Candidate(f"{name} x N", partial(_plain, load, gpu_only), ("own", "dweight"))
        yield Candidate(
            f"{name} two passes", partial(_two_passes, load, gpu_only), correct, slow=True
        )
        yield Candidate(f"{name} by rows", partial(_by_rows, load, gpu_only), correct, slow=True)
