"""N calls of a library's fused linear layer and cross-entropy, composed to what switch_mixture computes.

No library mixes, so that three compositions stand beside each other:

- "x N": N plain losses with the gradients of their sum. Does less than switch_mixture: no mixture.
- "two passes": each clone's own loss on detached features, and its loss per sample on a detached weight, through
  logsumexp: what autograd makes of the definition.
- "by rows": one pass per clone; the mixture's gradient to the features is each clone's own, row by row times the
  clone's responsibility. The cheapest correct one.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alrao_fast.testing import MixtureInputs
from benchmarks.speed.case import Call, Candidate, Missing, leaving_gradients

# (x, weight [C, D], bias [C] or None, target, reduction) -> loss
Loss = Callable[[Tensor, Tensor, Any, Tensor, str], Tensor]


def _torch_chunked() -> Loss:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Missing(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x, w, b, y, reduction: F.linear_cross_entropy(
        x, w, y, linear_bias=b, reduction=reduction, options=options
    )


def _imported(package: str, module: str, name: str) -> Any:
    if find_spec(module.partition(".")[0]) is None:
        raise Missing(f"{package} is not installed")
    return getattr(import_module(module), name)


def _no_bias(bias: Tensor | None) -> None:
    if bias is not None:
        raise Missing("this library's loss takes no bias")


def _liger() -> Loss:
    module = "liger_kernel.transformers.functional"
    fused = _imported("liger-kernel", module, "liger_fused_linear_cross_entropy")
    return lambda x, w, b, y, reduction: fused(x, w, y, bias=b, reduction=reduction)


def _cce() -> Loss:
    fused = _imported("cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy")

    def loss(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, reduction: str) -> Tensor:
        _no_bias(b)
        # Without its filter, which leaves out small gradients.
        return fused(x, w, y, reduction=reduction, filter_eps=None)

    return loss


def _quack() -> Loss:
    name = "chunked_linear_cross_entropy"
    fused = _imported("quack-kernels", "quack.linear_cross_entropy", name)

    def loss(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, reduction: str) -> Tensor:
        _no_bias(b)
        if reduction == "none":
            raise Missing("quack's chunked loss returns none per sample")
        return fused(x, w, y, reduction=reduction)

    return loss


class _Clones:
    """The inputs of a composition: the features, and each clone's weight and bias as leaves of their own."""

    def __init__(self, given: MixtureInputs) -> None:
        self.x = given.x.detach().requires_grad_()
        self.weights = [w.detach().requires_grad_() for w in given.weight]
        self.biases: list[Any] = [None] * len(given.weight)
        if given.bias is not None:
            self.biases = [b.detach().requires_grad_() for b in given.bias]

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        return iter(zip(self.weights, self.biases))

    def call(self, compute: Callable[[], Mapping[str, Tensor]]) -> Call:
        return leaving_gradients(compute, self.x, self.weights, self.biases)


def _plain(loss: Loss, given: MixtureInputs) -> Call:
    clones = _Clones(given)

    def compute() -> Mapping[str, Tensor]:
        own = torch.zeros((), device=given.x.device)
        for weight, bias in clones:
            one = loss(clones.x, weight, bias, given.target, "mean")
            # Each before the next: all their buffers at once would be N times the memory.
            one.backward()
            own += one.detach()
        return {"own": own}

    return clones.call(compute)


def _two_passes(loss: Loss, given: MixtureInputs) -> Call:
    clones = _Clones(given)

    def compute() -> Mapping[str, Tensor]:
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
        return {"loss": mixture.detach()}

    return clones.call(compute)


def _by_rows(loss: Loss, given: MixtureInputs) -> Call:
    clones = _Clones(given)

    def compute() -> Mapping[str, Tensor]:
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
        return {"loss": -torch.logsumexp(stacked, 0).mean()}

    return clones.call(compute)


# By name: what loads a library's loss, and whether that runs on a GPU only.
LIBRARIES: dict[str, tuple[Callable[[], Loss], bool]] = {
    "linear_cross_entropy": (_torch_chunked, False),
    "liger": (_liger, True),
    "cce": (_cce, True),
    "quack": (_quack, True),
}


def loss_of(library: str, device: torch.device) -> Loss:
    """A library's loss; raises `Missing` where it does not run."""
    load, gpu_only = LIBRARIES[library]
    loss = load()
    if gpu_only and device.type != "cuda":
        raise Missing("runs on a GPU only")
    return loss


def candidates() -> Iterator[Candidate]:
    """Every library in every composition."""
    correct = ("loss", "dx", "dweight")
    ways = {"x N": (_plain, ("own", "dweight"), False)}
    ways |= {"two passes": (_two_passes, correct, True), "by rows": (_by_rows, correct, True)}

    def make(library: str, way: Callable[..., Call], given: MixtureInputs) -> Call:
        return way(loss_of(library, given.x.device), given)

    for library in LIBRARIES:
        for name, (way, claims, slow) in ways.items():
            yield Candidate(f"{library} {name}", partial(make, library, way), claims, slow)
