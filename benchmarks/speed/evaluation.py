"""Cases of the last layer's evaluation: the mixture's negative log-likelihood and accuracy, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from alrao_fast import backends
from alrao_fast.functional import switch_mixture_log_prob
from alrao_fast.reference import switch_mixture as reference
from alrao_fast.testing import MixtureInputs
from speed.case import DTYPES, Call, Candidate, Case, Target, compiled
from speed.heads import (
    available,
    checked_inputs,
    head_bytes,
    inputs,
    logits_of,
    rows_at_once,
    sizes_of,
)


def evaluation_truth(given: MixtureInputs) -> Mapping[str, Tensor]:
    """The reference in float64, chunk by chunk."""
    weight = given.weight.double()
    bias = None if given.bias is None else given.bias.double()
    nll, correct = 0.0, 0.0
    with torch.no_grad():
        for x, target in zip(*(t.split(rows_at_once(given)) for t in (given.x, given.target))):
            log_prob = reference.switch_mixture_log_prob(
                x.double(), weight, bias, given.log_posterior
            )
            nll = nll + F.nll_loss(log_prob, target, reduction="sum")
            correct = correct + (log_prob.argmax(1) == target).sum()
    return {"nll": nll / len(given.x), "accuracy": (correct / len(given.x)).double()}


def _evaluated(given: MixtureInputs, log_prob_of: Callable[[], Tensor]) -> Call:
    results: dict[str, Tensor] = {}

    @torch.no_grad()
    def run() -> None:
        results.clear()
        log_prob = log_prob_of()
        results["nll"] = F.nll_loss(log_prob, given.target)
        results["accuracy"] = (log_prob.argmax(1) == given.target).double().mean()

    return Call(run, lambda: results, results.clear)


def _evaluate_ours(backend: str, given: MixtureInputs) -> Call:
    if backend != "auto":
        available("switch_mixture", backend, given.x.device)
    return _evaluated(given, lambda: switch_mixture_log_prob(*given[:4], impl=backend))


def _log_prob_one_by_one(
    x: Tensor, weight: Tensor, bias: Tensor | None, log_posterior: Tensor
) -> Tensor:
    biases = [None] * len(weight) if bias is None else list(bias)
    each = [F.linear(x, w, b).float().log_softmax(1) for w, b in zip(weight, biases)]
    return torch.logsumexp(torch.stack(each, 2) + log_posterior.float(), 2)


def _evaluate_one_by_one(given: MixtureInputs) -> Call:
    return _evaluated(given, lambda: _log_prob_one_by_one(*given[:4]))


def _evaluate_compiled(given: MixtureInputs) -> Call:
    log_prob = compiled(_log_prob_one_by_one)
    return _evaluated(given, lambda: log_prob(*given[:4]))


def evaluation_case(
    label: str,
    samples: int,
    features: int,
    classes: int,
    clones: int,
    dtype: str = "float32",
    *,
    bias: bool = True,
    tiny: bool = False,
    targets: tuple[Target, ...] = (),
) -> Case:
    """Negative log-likelihood and accuracy of the mixture from `switch_mixture_log_prob`."""
    sizes = sizes_of(samples, features, classes, clones, bias, tiny)
    # Which class is largest turns on rounding: at few samples one of them is more than the tolerance.
    claims = ("nll", "accuracy") if dtype == "float32" else ("nll",)
    total = head_bytes(sizes, DTYPES[dtype].itemsize) / 2
    return Case(
        name=f"log_prob, {label}",
        op="switch_mixture",
        sizes=sizes,
        dtype=dtype,
        inputs=partial(inputs, sizes, DTYPES[dtype]),
        check_inputs=partial(checked_inputs, sizes, DTYPES[dtype]),
        truth=evaluation_truth,
        candidates=(
            Candidate("alrao", partial(_evaluate_ours, "auto"), claims),
            *(
                Candidate(f"alrao {name}", partial(_evaluate_ours, name), claims)
                for name in backends.BACKENDS
            ),
            Candidate("one by one", _evaluate_one_by_one, claims),
            Candidate("torch.compile", _evaluate_compiled, claims, slow=True),
        ),
        bytes=total + sizes["samples"] * sizes["classes"] * 4,
        flops=2 * logits_of(sizes) * sizes["features"],
        set_bytes=total,
        targets=targets,
    )
