"""What the tests of the feature optimizers share: how an op is called, its states, and comparisons.

An optimizer is described once, by an entry at the end; its test file holds its options, a case by hand and its peer in
torch.optim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from alrao_fast import backends, testing
from alrao_fast.functional import feature_adam_, feature_sgd_

States = dict[str, list[Tensor]]


class State(NamedTuple):
    """A list of states: what it holds before a tensor's first step (NaN: anything) and before a later one.

    `needs` is the option without which there is none.
    """

    first: float
    later: float
    needs: str | None = None


@dataclass(frozen=True)
class FeatureOp:
    """A feature optimizer's public function and its lists of states, in the order of the dispatcher's op.

    `implied` are options that only say which states there are. `scalars` are the dispatcher's op's.
    """

    function: Callable[..., None]
    states: dict[str, State]
    scalars: dict[str, Any]
    updates_before: int
    implied: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.function.__name__

    def start(
        self,
        problem: testing.FeatureProblem,
        options: dict[str, Any],
        *,
        dtype: torch.dtype | None = None,
        mixed: bool = True,
    ) -> tuple[States, Tensor]:
        """States and steps; `mixed`: every second tensor has had updates before."""
        params = problem.params
        had = [t % 2 if mixed else 0 for t in range(len(params))]
        states = {
            name: [
                torch.full_like(p, state.later if h else state.first, dtype=dtype or p.dtype)
                for p, h in zip(params, had)
            ]
            for name, state in self.states.items()
            if state.needs is None or options.get(state.needs)
        }
        if "averaging" in options:
            wide = [torch.promote_types(p.dtype, torch.float32) for p in params]
            states["averages"] = [torch.full_like(p, 0.5, dtype=d) for p, d in zip(params, wide)]
        return states, torch.tensor(had, device=params[0].device) * self.updates_before

    def step(
        self,
        problem: testing.FeatureProblem,
        states: States,
        steps: Tensor,
        impl: str,
        options: dict[str, Any],
    ) -> None:
        device = problem.params[0].device
        options = {k: v for k, v in options.items() if k not in self.implied}
        self.function(
            params=problem.params,
            grads=problem.grads,
            rates=problem.rates,
            inners=problem.inners,
            steps=steps,
            impl=impl,
            **states,
            **{k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()},
        )

    def run(
        self,
        problem: testing.FeatureProblem,
        impl: str,
        options: dict[str, Any],
        *,
        state_dtype: torch.dtype | None = None,
        updates: int = 3,
    ) -> States:
        """Several updates; returns the states."""
        states, steps = self.start(problem, options, dtype=state_dtype)
        before = steps.clone()
        for _ in range(updates):
            self.step(problem, states, steps, impl, options)
        assert torch.equal(steps, before + updates)
        return states

    def overload_arguments(
        self, problem: testing.FeatureProblem, states: States, seeds: list[int], steps: Tensor
    ) -> tuple[Any, ...]:
        """The lists as the dispatcher's op takes them, without masters."""
        lists = [states.get(name, []) for name in self.states]
        return (
            problem.params,
            problem.grads,
            *lists,
            [],
            states.get("averages", []),
            problem.rates,
            problem.inners,
            seeds,
            steps,
        )

    @property
    def overload(self) -> Any:
        return getattr(torch.ops.alrao_fast, self.name).default

    def assert_within_budget(
        self,
        backend: str,
        device: torch.device,
        dtype: torch.dtype,
        options: dict[str, Any],
        *,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        """Parameters and states as near to the float64 truth as the reference's, for all layouts."""
        if backend == "reference":
            pytest.skip("the reference itself")
        actual, expected = testing.feature_problem(dtype, device), testing.feature_problem(dtype)
        truth = expected.to(torch.float64)
        got = self.run(actual, backend, options, state_dtype=state_dtype)
        own = self.run(expected, "reference", options, state_dtype=state_dtype)
        true = self.run(truth, "reference", options)
        names, check = actual.names, testing.assert_feature_within_budget
        check(actual.params, expected.params, truth.params, names, "parameter")
        for name in got:
            check(got[name], own[name], true[name], names, name)

    def assert_follows(
        self,
        peer: Callable[[list[Tensor]], torch.optim.Optimizer],
        backend: str,
        device: torch.device,
        dtype: torch.dtype,
        options: dict[str, Any],
        tolerance: float,
    ) -> None:
        """50 steps along one of torch's optimizers, at equal rates of 1/2 and the double `lr`."""
        names = ["rows of a linear layer", "channels_last"]
        problem = testing.feature_problem(dtype, device, names=names)
        problem = problem._replace(rates=[torch.full_like(r, 0.5) for r in problem.rates])
        theirs = [p.clone().requires_grad_() for p in problem.params]
        optimizer = peer(theirs)
        options = options | {"lr": 2 * optimizer.param_groups[0]["lr"]}
        states, steps = self.start(problem, options, mixed=False)
        for k in range(50):
            grads = [g * (1 + k % 3) + 0.1 * p.detach() for g, p in zip(problem.grads, theirs)]
            for p, grad in zip(theirs, grads):
                p.grad = grad.clone()
            optimizer.step()
            self.step(problem._replace(grads=grads), states, steps, backend, options)
        for ours, p in zip(problem.params, theirs):
            torch.testing.assert_close(ours, p.detach(), rtol=tolerance, atol=tolerance)

    def assert_found_inf_skips_everything(
        self, backend: str, device: torch.device, options: dict[str, Any]
    ) -> None:
        problem = testing.feature_problem(torch.float32, device)
        states, steps = self.start(problem, options)
        tensors = [*problem.params, *(t for state in states.values() for t in state), steps]
        before = [t.clone() for t in tensors]
        found = {"found_inf": torch.ones(1, device=device)}
        self.step(problem, states, steps, backend, options | found)
        torch.testing.assert_close(tensors, before, rtol=0, atol=0, equal_nan=True)

    def assert_reads_gradients_only_and_bumps_versions(
        self, backend: str, device: torch.device, options: dict[str, Any]
    ) -> None:
        problem = testing.feature_problem(torch.float32, device)
        before = problem.to(torch.float32)
        params = [torch.nn.Parameter(p) for p in problem.params]
        states, steps = self.start(problem, options)
        written = [*params, *(t for state in states.values() for t in state), steps]
        versions = [t._version for t in written]
        self.step(problem._replace(params=params), states, steps, backend, options)
        assert all(torch.equal(a, b) for a, b in zip(problem.grads, before.grads))
        assert all(t._version > v for t, v in zip(written, versions))
        assert all(p.is_leaf and p.requires_grad and p.grad is None for p in params)

    def assert_refused(
        self,
        backend: str,
        device: torch.device,
        change: Callable[[dict[str, Any]], object],
        message: str,
    ) -> None:
        """Two small parameters, one of their arguments changed: the message, and nothing is written."""
        if device.type != "cpu":
            pytest.skip("the cases are CPU tensors")
        shapes = ((3, 4), (5,))
        arguments = {
            name: [torch.zeros(shape) for shape in shapes]
            for name, state in self.states.items()
            if state.needs is None
        }
        arguments |= {name: [torch.ones(shape) for shape in shapes] for name in ("params", "grads")}
        arguments |= {"rates": [torch.ones(3), torch.ones(5)], "inners": [4, 1]}
        arguments["steps"] = torch.zeros(2, dtype=torch.int64)
        change(arguments)
        written = [t for name in ("params", *self.states) for t in arguments.get(name, ())]
        if arguments["steps"] is not None:
            written.append(arguments["steps"])
        before = [t.clone() for t in written]
        with pytest.raises(RuntimeError, match=f"{self.name}: .*{message}"):
            self.function(**arguments, impl=backend)
        assert all(torch.equal(a, b) for a, b in zip(written, before))

    def opcheck(self, backend: str, options: dict[str, Any]) -> None:
        device = backends.device_of(backend)
        names = ["rows of a linear layer", "few columns", "channels_last"]
        problem = testing.feature_problem(device=device, names=names)
        problem = problem._replace(params=[p.requires_grad_() for p in problem.params])
        with torch.no_grad():
            states, steps = self.start(problem, options)
            torch.library.opcheck(
                self.overload,
                self.overload_arguments(problem, states, [], steps),
                self.scalars | options,
            )

    def assert_compiles_as_one_graph(
        self, backend: str, device: torch.device, options: dict[str, Any], names: list[str]
    ) -> None:
        problem, expected = (testing.feature_problem(device=device, names=names) for _ in range(2))

        def step(params, grads, rates, states, steps):
            given = problem._replace(params=params, grads=grads, rates=rates)
            self.step(given, states, steps, backend, options)

        for tensors, function in (
            (problem, torch.compile(step, fullgraph=True, backend="aot_eager")),
            (expected, step),
        ):
            params = [torch.nn.Parameter(p) for p in tensors.params]
            states, steps = self.start(tensors, options)
            before, versions = steps.clone(), [p._version for p in params]
            for _ in range(2):
                function(params, tensors.grads, tensors.rates, states, steps)
            assert torch.equal(steps, before + 2)
            assert all(p._version > v for p, v in zip(params, versions))
        for a, b in zip(problem.params, expected.params):
            torch.testing.assert_close(a, b)


SGD = FeatureOp(
    feature_sgd_,
    {"momentum_buffers": State(math.nan, 0.5, needs="momentum")},
    {
        "lr": 1.0,
        "lr_tensor": None,
        "warmup_steps": 0.0,
        "averaging": 0.0,
        "momentum": 0.9,
        "dampening": 0.0,
        "weight_decay": 0.1,
        "nesterov": False,
        "maximize": False,
        "authors_momentum": False,
        "grad_scale": None,
        "found_inf": None,
    },
    updates_before=1,
)
ADAM = FeatureOp(
    feature_adam_,
    {
        "exp_avgs": State(0.0, 0.25),
        "exp_avg_sqs": State(0.0, 0.5),
        "max_exp_avg_sqs": State(0.0, 0.75, needs="amsgrad"),
    },
    {
        "lr": 1.0,
        "lr_tensor": None,
        "warmup_steps": 0.0,
        "averaging": 0.0,
        "beta1": 0.9,
        "beta2": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "amsgrad": False,
        "decoupled": True,
        "maximize": False,
        "authors_eps": False,
        "grad_scale": None,
        "found_inf": None,
    },
    updates_before=3,
    implied=("amsgrad",),
)
