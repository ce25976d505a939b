"""Every op once, in every dtype, over odd sizes, held against the reference: short enough for compute-sanitizer.

`python benchmarks gpu_exercise --backend cuda --out FILE` writes one JSON line for each op and dtype: the worst error
over its cases, and whether all are within the budget of alrao_fast/testing.py, where the feature ops' cases stand too.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alrao_fast import backends, functional, testing
from alrao_fast.reference import switch_update as switch
from benchmarks.results import finite, grouped

Outputs = dict[str, Tensor]
CPU = torch.device("cpu")
# B, D, C, N: ones, tails, more rows than a block has warps, rows longer than a block.
MIXTURES = [
    (1, 1, 2, 1),
    (5, 3, 70, 1),
    (9, 6, 5, 4),
    (33, 70, 40, 2),
    (67, 19, 11, 3),
    (3, 4, 4500, 2),
]
# None is the default memory budget; the other cuts the logits into small chunks.
BUDGETS = (None, 2000)


def feature(states: tuple[str, ...], *where: Any, steps: int = 2, **options: Any) -> Outputs:
    """Steps of Adam, which has two states, or SGD: the parameters and the states after them."""
    impl, dtype, device = where
    problem = testing.feature_problem(torch.float64, device).to(dtype)
    lists = {name: [torch.zeros_like(p) for p in problem.params] for name in states}
    if len(lists) == 2:
        given = (problem.params, problem.grads, *lists.values(), problem.rates)
        step = partial(functional.feature_adam_, *given)
    else:
        buffers = lists.get("momentum_buffers", [])
        given = (problem.params, problem.grads, problem.rates)
        step = partial(functional.feature_sgd_, *given, momentum_buffers=buffers)
    counts = torch.zeros(len(problem.params), dtype=torch.int64, device=device)
    for _ in range(steps):
        step(steps=counts, inners=problem.inners, impl=impl, **options)
    return {
        f"{kind} of {name!r}": value
        for kind, values in {"params": problem.params, **lists}.items()
        for name, value in zip(problem.names, values)
    }


def feature_sgd(impl: str, dtype: torch.dtype, device: torch.device, momentum: float) -> Outputs:
    states = ("momentum_buffers",) if momentum else ()
    lr = torch.full((), 0.1, device=device)
    return feature(states, impl, dtype, device, lr=lr, momentum=momentum, weight_decay=0.01)


def rounded_stochastically(impl: str, dtype: torch.dtype, device: torch.device) -> Outputs:
    seeds = list(range(len(testing.FEATURE_CASES)))
    return feature((), impl, dtype, device, steps=1, seeds=seeds)


def mixture(*where: Any, sizes: tuple[int, ...], budget: int | None, values: bool) -> Outputs:
    """Loss, statistics and gradients of classes, with their log-probabilities, or of Gaussian `values`."""
    impl, dtype, device = where
    inputs = testing.mixture_inputs(*sizes, dtype=torch.float64, device=device)
    leaves = [t.to(dtype).requires_grad_() for t in inputs[:3] if t is not None]
    options = {"memory_budget": budget, "impl": impl}
    log_prob = {}
    if values:
        generator = torch.Generator().manual_seed(1)
        target = torch.randn(sizes[0], sizes[2], generator=generator, dtype=torch.float64)
        rest = (inputs.log_posterior, target.to(device, dtype))
        loss, stats = functional.switch_mixture_gaussian_stats(*leaves, *rest, **options)
    else:
        # A class of probability 1 has nothing to compare with: a posterior that does not sum to 1.
        posterior = inputs.log_posterior - 1
        loss, stats = functional.switch_mixture_stats(*leaves, posterior, inputs.target, **options)
        given = (*leaves, posterior)
        log_prob["log_prob"] = functional.switch_mixture_log_prob(*given, **options)
    gradients = torch.autograd.grad(loss, leaves)
    names = ("dx", "dweight", "dbias")
    return {"loss": loss, "nll": stats[0], **log_prob, **dict(zip(names, gradients))}


def observations(impl: str, dtype: torch.dtype, device: torch.device, clones: int) -> Outputs:
    logw, log_posterior, t = (s.to(device) for s in switch.initial_state(clones, theta=0.999))
    generator = torch.Generator().manual_seed(0)
    for observation in torch.randn(4, clones, generator=generator).to(device, dtype):
        observation[0] = -torch.inf if clones > 1 else observation[0]
        functional.switch_update_(logw, log_posterior, t, observation, impl=impl)
    return {"joint": logw.exp(), "posterior": log_posterior.exp(), "t": t.double()}


def clipped(impl: str, dtype: torch.dtype, device: torch.device, order: float) -> Outputs:
    names, grads, *spans = testing.clip_problem(dtype, device)
    call = partial(functional.gradient_clip_, grads, *spans, norm_type=order, impl=impl)
    norms = call(max_norm=1.0)
    there = {name: grad for name, grad in zip(names, grads) if grad.numel()}
    return {"norms": norms, **there}


Case = tuple[str, str, torch.dtype, Callable[[str, torch.dtype, torch.device], Outputs]]


def cases() -> Iterator[Case]:
    """Op, what it stresses, dtype, and the call."""
    adam = partial(feature, ("exp_avgs", "exp_avg_sqs"), lr=0.1, weight_decay=0.01)
    for dtype in testing.DTYPES:
        for momentum in (0.0, 0.9):
            name = f"momentum {momentum}"
            yield "feature_sgd", name, dtype, partial(feature_sgd, momentum=momentum)
        if dtype in (torch.bfloat16, torch.float16):
            yield "feature_sgd", "stochastic rounding", dtype, rounded_stochastically
        yield "feature_adam", "two steps", dtype, adam
        for order in (2.0, 1.0, torch.inf, 3.0):
            call = partial(clipped, order=order)
            yield "gradient_clip", f"norm of order {order}", dtype, call
        for values in (False, True):
            for sizes in MIXTURES:
                for budget in BUDGETS:
                    name = f"{'values' if values else 'classes'} {sizes}, memory budget {budget}"
                    call = partial(mixture, sizes=sizes, budget=budget, values=values)
                    yield "switch_mixture", name, dtype, call
    for dtype in (torch.float64, torch.float32):
        for clones in (1, 5, 33, 300):
            call = partial(observations, clones=clones)
            yield "switch_update", f"{clones} clones", dtype, call


def compare(case: Case, backend: str) -> tuple[float, str | None]:
    """Worst relative error of the case's outputs, and the complaint where one is over its budget."""
    op, name, dtype, call = case
    actual = call(backend, dtype, backends.device_of(backend))
    own = call("reference", dtype, CPU)
    # Not near the truth but the same bits as the reference's: it draws them from the same counters.
    truth = own if name == "stochastic rounding" else call("reference", torch.float64, CPU)
    complaint = None
    worst = max(testing.relative_error(value, truth[key]) for key, value in actual.items())
    for key, value in actual.items():
        try:
            tensors = ([value.cpu()], [own[key]], [truth[key]])
            if op.startswith("feature"):
                testing.assert_feature_within_budget(*tensors, [key], name)
                continue
            # The statistics are float64 sums of what was computed in float32.
            mixed = value.dtype == torch.float64 and dtype != torch.float64
            slack = 4e-6 if mixed else None
            testing.assert_within_budget(*(t for (t,) in tensors), f"{name}: {key}", slack=slack)
        except AssertionError as error:
            complaint = complaint or str(error)
    return worst, complaint


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks gpu_exercise", description=__doc__)
    parser.add_argument("--backend", choices=backends.BACKENDS, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--op", choices=backends.OPS, help="this op alone")
    options = parser.parse_args(arguments)
    if options.out:
        options.out.touch()
    healthy = True
    # The cases of one op and dtype together: each row is written when it is complete.
    for (op, dtype), group in grouped(cases(), lambda case: (case[0], case[2])).items():
        if options.op not in (None, op):
            continue
        worst, complaint = 0.0, None
        for case in group:
            try:
                error, wrong = compare(case, options.backend)
            except Exception as problem:  # recorded; the other cases still run
                error, wrong = float("inf"), f"{case[1]}: {type(problem).__name__}: {problem}"
            worst, complaint = max(worst, error), complaint or wrong
        healthy = healthy and complaint is None
        row = {"op": op, "backend": options.backend, "dtype": str(dtype).removeprefix("torch.")}
        row |= {"cases": len(group), "error": finite(worst), "complaint": complaint}
        print(json.dumps(row), flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    return 0 if healthy else 1
