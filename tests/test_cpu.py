"""Protects what is the CPU kernels' own: the same bits for any number of threads, and instruction sets that agree."""

import os
import subprocess
import sys

import pytest
import torch
from feature_harness import SGD
from mixture_harness import gradients, log_prob_gradients

from alrao_fast import _extension, testing


@pytest.fixture(autouse=True)
def cpu():
    for op in ("feature_sgd", "feature_adam", "switch_mixture"):
        reason = testing.require(op, "cpu")
        if reason is not None:
            pytest.skip(f"cpu: {reason}")


def for_numbers_of_threads(numbers, compute):
    """What `compute` returns, a list of tensors, is the same for every number of threads."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in numbers:
            torch.set_num_threads(threads)
            results.append(compute())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_feature_sgd_has_the_same_bits_for_any_number_of_threads():
    def compute():
        problem = testing.feature_problem(torch.float32)
        for t in range(len(problem.params)):  # enough work for all of them
            if problem.names[t].startswith("long rows"):
                problem.params[t], problem.grads[t] = torch.ones(3, 50021), torch.ones(3, 50021)
                problem.inners[t] = 50021
        states = SGD.run(problem, "cpu", {"momentum": 0.9, "weight_decay": 0.1})
        return [*problem.params, *states["momentum_buffers"]]

    for_numbers_of_threads((1, 2, 3, 7), compute)


@pytest.mark.parametrize(
    "shape",
    [(32, 64, 10, 10), (700, 100, 50, 6), (64, 1024, 30, 4), (260, 100, 2600, 3)],
    ids=str,
)
def test_mixture_has_the_same_bits_for_any_number_of_threads(shape):
    inputs = testing.mixture_inputs(*shape)
    upstream = torch.randn(shape[0], shape[2])
    for_numbers_of_threads(
        (1, 2, 3), lambda: gradients(inputs, "cpu") + log_prob_gradients(inputs, "cpu", upstream)
    )


ISA_SCRIPT = """
import sys, torch
from alrao_fast import _C, testing
from alrao_fast.functional import (
    feature_adam_, feature_sgd_, switch_mixture_log_prob, switch_mixture_stats
)

features = []
for dtype in testing.DTYPES:
    problem = testing.feature_problem(dtype)
    states = [[torch.zeros_like(p) for p in problem.params] for _ in range(3)]
    steps = torch.zeros(len(problem.params), dtype=torch.int64)
    common = dict(inners=problem.inners, steps=steps, weight_decay=0.1)
    for rule in ("torch", "authors"):
        feature_sgd_(problem.params, problem.grads, problem.rates, momentum=0.9, momentum_rule=rule,
                     momentum_buffers=states[0], impl="cpu", **common)
    feature_adam_(problem.params, problem.grads, states[1], states[2], problem.rates, impl="cpu", **common)
    features.append([t.double() for tensors in (problem.params, *states) for t in tensors])
mixtures = []
for shape in [(33, 20, 7, 5), (19, 6, 2500, 2)]:
    for dtype in (torch.float32, torch.float64):
        inputs = testing.mixture_inputs(*shape, dtype=dtype, scale=3.0)
        leaves = [t.requires_grad_() for t in inputs[:3]]
        loss, stats = switch_mixture_stats(*leaves, *inputs[3:], impl="cpu")
        loss.backward()
        mixtures += [loss.detach(), stats, *(t.grad.clone() for t in leaves)]
        value = switch_mixture_log_prob(*leaves, inputs.log_posterior, impl="cpu")
        value.square().mean().backward()
        mixtures += [value.detach(), *(t.grad for t in leaves)]
torch.save((_C.cpu_isa(), features, mixtures), sys.argv[1])
"""


def test_instruction_sets_agree(tmp_path):
    isas = _extension.build_info().get("isas") or []
    if len(isas) < 2:
        pytest.skip(f"built for one instruction set only: {isas}")
    results = {}
    for isa in isas:
        path = tmp_path / isa
        done = subprocess.run(
            [sys.executable, "-c", ISA_SCRIPT, str(path)],
            env={**os.environ, "ALRAO_CPU_ISA": isa},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0 and "takes one of" in done.stderr:
            continue  # this machine is older
        assert done.returncode == 0, done.stderr
        used, *results[isa] = torch.load(path)
        assert used == isa
    if len(results) < 2:
        pytest.skip(f"this machine runs {list(results)} only")
    features, mixtures = results.pop(isas[0])
    for isa, (other_features, other_mixtures) in results.items():
        for dtype, expected, actual in zip(testing.DTYPES, features, other_features):
            slack = 2 * testing.FEATURE_SLACK[dtype]
            for a, b in zip(expected, actual):
                torch.testing.assert_close(a, b, rtol=slack, atol=slack)
        for i, (one, two) in enumerate(zip(mixtures, other_mixtures)):
            slack = 1e-13 if one.dtype == torch.float64 and i % 18 >= 9 else 4e-6
            testing.assert_within_budget(two, one, one, f"{isa} result {i}", slack=slack)
