"""Cases of the op switch_update: one observation of the posterior over the clones."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from alrao_fast.functional import switch_update_
from alrao_fast.reference import switch_update as reference
from benchmarks.speed import authors
from benchmarks.speed.case import Call, Candidate, Case, compiled, generator_on, ours

# The authors' value, so that their switch can be compared.
THETA = 0.9999


class Observation(NamedTuple):
    """The switch's state and the clones' log-likelihoods `[N]`."""

    logw: Tensor
    log_posterior: Tensor
    t: Tensor
    log_likelihood: Tensor


def inputs(clones: int, device: torch.device, seed: int) -> Observation:
    """A switch at its start and an observation of unit variance."""
    state = (tensor.to(device) for tensor in reference.initial_state(clones, THETA))
    generator = generator_on(device, seed)
    return Observation(
        *state, torch.randn(clones, generator=generator, dtype=torch.float64, device=device)
    )


def truth(given: Observation) -> Mapping[str, Tensor]:
    """The reference, whose state is float64 as everybody's."""
    copy = Observation(*(tensor.clone() for tensor in given))
    reference.switch_update_(*copy, THETA)
    return {"log_posterior": copy.log_posterior}


def _ours(backend: str, given: Observation) -> Call:
    return Call(
        lambda: switch_update_(*given, theta=THETA, impl=backend),
        lambda: {"log_posterior": given.log_posterior},
    )


def _compiled(given: Observation) -> Call:
    update = compiled(reference.switch_update_)
    return Call(lambda: update(*given, THETA), lambda: {"log_posterior": given.log_posterior})


def _authors(given: Observation) -> Call:
    """Their switch, given outputs that have the log-likelihoods for a batch of one sample."""
    switch = authors.load().switch.Switch(len(given.log_likelihood), theta=THETA)
    switch = switch.to(given.logw.device)
    outputs = [value.float().view(1, 1) for value in given.log_likelihood]
    target = torch.zeros(1, dtype=torch.int64, device=given.logw.device)
    return Call(
        lambda: switch.Supdate(outputs, target),
        lambda: {"log_posterior": switch.logposterior.double()},
    )


def switch_case(clones: int = 10) -> Case:
    """One observation of a switch over N clones."""
    names = ("log_posterior",)
    return Case(
        name="switch_update",
        op="switch_update",
        sizes={"clones": clones},
        # The authors' state is float32.
        dtype="float32",
        inputs=partial(inputs, clones),
        truth=truth,
        candidates=(
            *ours("switch_update", _ours, names),
            Candidate("torch.compile", _compiled, names, slow=True),
            Candidate("authors", _authors, names),
        ),
        # State read and written, observation read.
        bytes=8 * (2 * 3 * clones + 2 + clones),
        flops=None,
        set_bytes=8 * 4 * clones,
    )
