"""Cases of the last layer alone in use: a training step with switch and SGD on the clones, and the evaluation."""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import alrao_fast as alrao
from alrao_fast.functional import switch_mixture_log_prob
from alrao_fast.reference import switch_mixture as reference
from alrao_fast.testing import MixtureInputs
from benchmarks.speed.case import Call, Candidate, Case, Target, compiled, leaving_gradients, ours
from benchmarks.speed.heads import (
    GRADIENTS,
    Head,
    authors_step,
    in_chunks,
    mixture_candidates,
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


def _evaluate_ours(backend: str, given: MixtureInputs) -> Call:
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
            *ours("switch_mixture", _evaluate_ours, claims),
            Candidate("one by one", _evaluate_one_by_one, claims),
            Candidate("torch.compile", _evaluate_compiled, claims, slow=True),
        ),
        bytes=float(read + head.samples * head.classes * 4),
        set_bytes=read,
        targets=targets,
    )
