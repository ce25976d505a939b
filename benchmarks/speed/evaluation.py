"""Cases of the last layer's evaluation: the mixture's negative log-likelihood and accuracy, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from alrao_fast.functional import switch_mixture_log_prob
from alrao_fast.reference import switch_mixture as reference
from alrao_fast.testing import MixtureInputs
from benchmarks.speed.case import Call, Candidate, Case, Target, compiled, ours
from benchmarks.speed.heads import Head, in_chunks


def evaluation_truth(given: MixtureInputs) -> Mapping[str, Tensor]:
    """The reference in float64, chunk by chunk."""
    weight, bias = (None if t is None else t.double() for t in given[1:3])
    nll, correct = 0.0, 0.0
    with torch.no_grad():
        for x, target in in_chunks(given):
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


def _ours(backend: str, given: MixtureInputs) -> Call:
    return _evaluated(given, lambda: switch_mixture_log_prob(*given[:4], impl=backend))


def _log_prob_one_by_one(
    x: Tensor, weight: Tensor, bias: Tensor | None, log_posterior: Tensor
) -> Tensor:
    biases = [None] * len(weight) if bias is None else list(bias)
    each = [F.linear(x, w, b).float().log_softmax(1) for w, b in zip(weight, biases)]
    return torch.logsumexp(torch.stack(each, 2) + log_posterior.float(), 2)


def _one_by_one(given: MixtureInputs) -> Call:
    return _evaluated(given, lambda: _log_prob_one_by_one(*given[:4]))


def _compiled(given: MixtureInputs) -> Call:
    log_prob = compiled(_log_prob_one_by_one)
    return _evaluated(given, lambda: log_prob(*given[:4]))


def evaluation_case(head: Head, *, targets: tuple[Target, ...] = ()) -> Case:
    """Negative log-likelihood and accuracy of the mixture from `switch_mixture_log_prob`."""
    # Which class is largest turns on rounding: at few samples one of them is more than the tolerance.
    claims = ("nll", "accuracy") if head.dtype == "float32" else ("nll",)
    read = head.features_bytes() + head.clones_bytes()
    return head.case(
        "log_prob",
        flops=2,
        truth=evaluation_truth,
        candidates=(
            *ours("switch_mixture", _ours, claims),
            Candidate("one by one", _one_by_one, claims),
            Candidate("torch.compile", _compiled, claims, slow=True),
        ),
        bytes=read + head.samples * head.classes * 4,
        set_bytes=read,
        targets=targets,
    )
