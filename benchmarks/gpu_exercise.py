"""Every op once, in every dtype, over odd sizes, held against the reference: short enough for compute-sanitizer.

`python benchmarks/gpu_exercise.py --backend cuda --out FILE` writes one JSON line for each op and dtype: the worst
error over its cases, and whether all are within the budget of alrao_fast/testing.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from alrao_fast import backends, functional, testing
from alrao_fast.reference import switch_update as switch

Outputs = dict[str, Tensor]
CPU = torch.device("cpu")
# B, D, C, N: ones, tails, more rows than a block has warps, rows longer than a block.
MIXTURES = (
    (1, 1, 2, 1),
    (5, 3, 70, 1),
    (9, 6, 5, 4),
    (33, 70, 40, 2),
    (67, 19, 11, 3),
    (3, 4, 4500, 2),
)
# None is the default memory budget; the other cuts the logits into small chunks.
BUDGETS = (None, 2000)


def feature_sgd(impl: str, dtype: torch.dtype, device: torch.device, momentum: float) -> Outputs:
    return _feature(functional.feature_sgd_, impl, dtype, device, momentum)


def feature_adam(impl: str, dtype: torch.dtype, device: torch.device) -> Outputs:
    problem = testing.feature_problem(torch.float64, device).to(dtype)
    first, second = ([torch.zeros_like(p) for p in problem.params] for _ in range(2))
    steps = torch.zeros(len(first), dtype=torch.int64, device=device)
    for _ in range(2):
        functional.feature_adam_(
            problem.params,
            problem.grads,
            first,
            second,
            problem.rates,
            steps=steps,
            inners=problem.inners,
            lr=0.1,
            weight_decay=0.01,
            impl=impl,
        )
    return _named(problem.names, params=problem.params, exp_avgs=first, exp_avg_sqs=second)


def _feature(
    op: Callable[..., None], impl: str, dtype: torch.dtype, device: torch.device, momentum: float
) -> Outputs:
    problem = testing.feature_problem(torch.float64, device).to(dtype)
    buffers = [torch.zeros_like(p) for p in problem.params] if momentum else []
    steps = torch.zeros(len(problem.params), dtype=torch.int64, device=device)
    for _ in range(2):
        op(
            problem.params,
            problem.grads,
            problem.rates,
            steps=steps,
            inners=problem.inners,
            momentum_buffers=buffers,
            lr=torch.full((), 0.1, device=device),
            momentum=momentum,
            weight_decay=0.01,
            impl=impl,
        )
    return _named(problem.names, params=problem.params, momentum_buffers=buffers)


def rounded_stochastically(impl: str, dtype: torch.dtype, device: torch.device) -> Outputs:
    problem = testing.feature_problem(torch.float64, device).to(dtype)
    steps = torch.zeros(len(problem.params), dtype=torch.int64, device=device)
    functional.feature_sgd_(
        problem.params,
        problem.grads,
        problem.rates,
        steps=steps,
        inners=problem.inners,
        seeds=list(range(len(problem.params))),
        impl=impl,
    )
    return _named(problem.names, params=problem.params)


def mixture(
    impl: str, dtype: torch.dtype, device: torch.device, sizes: tuple[int, ...], budget: int | None
) -> Outputs:
    inputs = testing.mixture_inputs(*sizes, dtype=torch.float64, device=device)
    x, weight, bias = (t.to(dtype).requires_grad_() for t in inputs[:3] if t is not None)
    # A class of probability 1 has nothing to compare with: a posterior that does not sum to 1.
    log_posterior = inputs.log_posterior - 1
    loss, stats = functional.switch_mixture_stats(
        x, weight, bias, log_posterior, inputs.target, memory_budget=budget, impl=impl
    )
    gradients = torch.autograd.grad(loss, (x, weight, bias))
    log_prob = functional.switch_mixture_log_prob(
        x, weight, bias, log_posterior, memory_budget=budget, impl=impl
    )
    names = ("dx", "dweight", "dbias")
    return {"loss": loss, "nll": stats[0], "log_prob": log_prob, **dict(zip(names, gradients))}


def gaussian(
    impl: str, dtype: torch.dtype, device: torch.device, sizes: tuple[int, ...], budget: int | None
) -> Outputs:
    inputs = testing.mixture_inputs(*sizes, dtype=torch.float64, device=device)
    x, weight, bias = (t.to(dtype).requires_grad_() for t in inputs[:3] if t is not None)
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(sizes[0], sizes[2], generator=generator, dtype=torch.float64)
    loss, stats = functional.switch_mixture_gaussian_stats(
        x,
        weight,
        bias,
        inputs.log_posterior,
        target.to(device, dtype),
        memory_budget=budget,
        impl=impl,
    )
    gradients = torch.autograd.grad(loss, (x, weight, bias))
    return {"loss": loss, "nll": stats[0], **dict(zip(("dx", "dweight", "dbias"), gradients))}


def observations(impl: str, dtype: torch.dtype, device: torch.device, clones: int) -> Outputs:
    logw, log_posterior, t = (s.to(device) for s in switch.initial_state(clones, theta=0.999))
    generator = torch.Generator().manual_seed(0)
    for observation in torch.randn(4, clones, generator=generator).to(device, dtype):
        observation[0] = -torch.inf if clones > 1 else observation[0]
        functional.switch_update_(logw, log_posterior, t, observation, impl=impl)
    return {"joint": logw.exp(), "posterior": log_posterior.exp(), "t": t.double()}


def _named(names: list[str], **lists: list[Tensor]) -> Outputs:
    return {
        f"{kind} of {name!r}": value
        for kind, values in lists.items()
        for name, value in zip(names, values)
    }


Case = tuple[str, str, torch.dtype, Callable[[str, torch.dtype, torch.device], Outputs]]


def cases() -> Iterator[Case]:
    """Op, what it stresses, dtype, and the call."""
    for dtype in testing.DTYPES:
        for momentum in (0.0, 0.9):
            yield (
                "feature_sgd",
                f"momentum {momentum}",
                dtype,
                lambda *where, momentum=momentum: feature_sgd(*where, momentum),
            )
        if dtype in (torch.bfloat16, torch.float16):
            yield "feature_sgd", "stochastic rounding", dtype, rounded_stochastically
        yield "feature_adam", "two steps", dtype, feature_adam
        for name, function in (("classes", mixture), ("values", gaussian)):
            for sizes in MIXTURES:
                for budget in BUDGETS:
                    yield (
                        "switch_mixture",
                        f"{name} {sizes}, memory budget {budget}",
                        dtype,
                        lambda *where, f=function, s=sizes, b=budget: f(*where, s, b),
                    )
    for dtype in (torch.float64, torch.float32):
        for clones in (1, 5, 33, 300):
            yield (
                "switch_update",
                f"{clones} clones",
                dtype,
                lambda *where, clones=clones: observations(*where, clones),
            )


def compare(case: Case, backend: str) -> tuple[float, str | None]:
    """Worst relative error of the case's outputs, and the complaint where one is over its budget."""
    op, name, dtype, call = case
    actual = call(backend, dtype, backends.device_of(backend))
    own = call("reference", dtype, CPU)
    truth = call("reference", torch.float64, CPU)
    worst, complaint = 0.0, None
    for key, value in actual.items():
        if name == "stochastic rounding":
            # Not near the truth but the same bits as the reference's: it draws them from the same counters.
            exact, slack = own[key], testing.FEATURE_SLACK[dtype]
        else:
            exact, slack = truth[key], _slack(op, dtype, value, truth[key])
        worst = max(worst, testing.relative_error(value, exact))
        try:
            testing.assert_within_budget(
                value.cpu(), own[key], exact, f"{name}: {key}", slack=slack
            )
        except AssertionError as error:
            complaint = complaint or str(error)
    return worst, complaint


def _slack(op: str, dtype: torch.dtype, value: Tensor, truth: Tensor) -> float | None:
    if op.startswith("feature"):
        largest = float(truth.abs().max()) if truth.numel() else 1.0
        return testing.FEATURE_SLACK[dtype] / min(max(largest, 1e-30), 1.0)
    # The statistics are float64 sums of what was computed in float32.
    return 4e-6 if value.dtype == torch.float64 and dtype != torch.float64 else None


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=backends.BACKENDS, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--op", choices=backends.OPS, help="this op alone")
    options = parser.parse_args(arguments)
    if options.out:
        options.out.touch()
    healthy = True
    # The cases of one op and dtype stand together: each row is written when it is complete.
    for (op, dtype), group in itertools.groupby(cases(), key=lambda case: (case[0], case[2])):
        if options.op not in (None, op):
            continue
        count, worst, complaint = 0, 0.0, None
        for case in group:
            count += 1
            try:
                error, wrong = compare(case, options.backend)
            except Exception as problem:  # recorded; the other cases still run
                error, wrong = float("inf"), f"{case[1]}: {type(problem).__name__}: {problem}"
            worst, complaint = max(worst, error), complaint or wrong
        healthy = healthy and complaint is None
        line = json.dumps(
            {
                "op": op,
                "backend": options.backend,
                "dtype": str(dtype).removeprefix("torch."),
                "cases": count,
                "error": worst if worst < float("inf") else None,
                "complaint": complaint,
            }
        )
        print(line, flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(line + "\n")
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
