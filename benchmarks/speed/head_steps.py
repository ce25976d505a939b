"""Cases of a training step of the last layer alone: forward, backward, switch, and SGD on the clones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

import alrao_fast as alrao
from alrao_fast.testing import MixtureInputs
from benchmarks.speed.case import Call, Candidate, Case, Target, leaving_gradients
from benchmarks.speed.heads import GRADIENTS, Head, authors_step, mixture_candidates, truth


def _head_module(given: MixtureInputs) -> alrao.ClassifierClones:
    clones, classes, features = given.weight.shape
    with torch.device("meta"):
        head = alrao.ClassifierClones(features, classes, clones, bias=given.bias is not None)
    head.to_empty(device=given.x.device)
    head.weight = nn.Parameter(given.weight.clone())
    if given.bias is not None:
        head.bias = nn.Parameter(given.bias.clone())
    for buffer in head.buffers():
        buffer.zero_()
    head.switch.reset_parameters()
    return head


def head_truth(given: MixtureInputs) -> Mapping[str, Tensor]:
    """The loss under the posterior of the first step, which is uniform; the gradients of the clones."""
    return truth(_at_the_start(given))


def _at_the_start(given: MixtureInputs) -> MixtureInputs:
    uniform = torch.full_like(given.log_posterior, -math.log(len(given.weight)))
    return given._replace(log_posterior=uniform)


def _head_step(given: MixtureInputs) -> Call:
    head = _head_module(given)
    optimizer = alrao.AlraoSGD(head, lr_range=(1e-12, 1e-12))
    x = given.x.detach().requires_grad_()

    def compute() -> Mapping[str, Tensor]:
        loss = head(x, given.target)
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}

    return leaving_gradients(compute, x, [head.weight], [head.bias])


def _then_sgd(make: Callable[[MixtureInputs], Call], given: MixtureInputs) -> Call:
    """Another candidate's gradients, and torch's fused SGD on the clones; no switch."""
    given = _at_the_start(given)._replace(weight=given.weight.clone())
    call = make(given)
    weight = nn.Parameter(given.weight)
    weight.grad = torch.zeros_like(weight)
    sgd = torch.optim.SGD([weight], lr=1e-12, fused=True)

    def run() -> None:
        call.run()
        sgd.step()

    return Call(run, call.outputs, call.drop)


def head_case(
    head: Head,
    *,
    keep: tuple[str, ...] = ("torch.func.vmap", "one by one"),
    targets: tuple[Target, ...] = (),
) -> Case:
    """A training step of the head alone. Peers named in `keep` are followed by torch's fused SGD on the clones."""
    peers = [c for c in mixture_candidates() if c.name in keep]
    total = 2 * (head.features_bytes() + head.clones_bytes())
    return head.case(
        "head step",
        flops=6,
        truth=head_truth,
        candidates=(
            Candidate("alrao", _head_step, GRADIENTS),
            *(Candidate(f"{c.name} + SGD", partial(_then_sgd, c.make), c.claims) for c in peers),
            Candidate("authors", authors_step, ("dweight",)),
        ),
        # The update reads weights and gradients and writes the weights.
        bytes=total + 3 * head.clones_bytes(),
        set_bytes=total,
        targets=targets,
    )
