"""Cases of a training step of the last layer alone: forward, backward, switch, and SGD on the clones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

import alrao_fast as alrao
from alrao_fast.testing import MixtureInputs
from speed.case import DTYPES, Call, Candidate, Case, Target
from speed.heads import (
    GRADIENTS,
    authors_step,
    checked_inputs,
    head_bytes,
    inputs,
    logits_of,
    mixture_candidates,
    outputs_of,
    sizes_of,
    truth,
)


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
    results: dict[str, Tensor] = {}

    def drop() -> None:
        results.clear()
        x.grad = None
        optimizer.zero_grad()

    def run() -> None:
        drop()
        loss = head(x, given.target)
        loss.backward()
        optimizer.step()
        results.update(loss=loss.detach())

    return Call(run, outputs_of(results, x, head.weight), drop)


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
    label: str,
    samples: int,
    features: int,
    classes: int,
    clones: int,
    dtype: str = "float32",
    *,
    bias: bool = True,
    tiny: bool = False,
    keep: tuple[str, ...] = ("torch.func.vmap", "one by one"),
    targets: tuple[Target, ...] = (),
) -> Case:
    """A training step of the head alone. Peers named in `keep` are followed by torch's fused SGD on the clones."""
    sizes = sizes_of(samples, features, classes, clones, bias, tiny)
    width = DTYPES[dtype].itemsize
    peers = [c for c in mixture_candidates() if c.name in keep]
    update = 3 * width * sizes["clones"] * sizes["classes"] * (sizes["features"] + sizes["bias"])
    total = head_bytes(sizes, width)
    return Case(
        name=f"head step, {label}",
        op="switch_mixture",
        sizes=sizes,
        dtype=dtype,
        inputs=partial(inputs, sizes, DTYPES[dtype]),
        check_inputs=partial(checked_inputs, sizes, DTYPES[dtype]),
        truth=head_truth,
        candidates=(
            Candidate("alrao", _head_step, GRADIENTS),
            *(Candidate(f"{c.name} + SGD", partial(_then_sgd, c.make), c.claims) for c in peers),
            Candidate("authors", authors_step, ("dweight",)),
        ),
        bytes=total + update,
        flops=6 * logits_of(sizes) * sizes["features"],
        set_bytes=total,
        targets=targets,
    )
