"""Edits by hand of a running optimizer, done to torch.optim's twin too: what stands in the optimizer is what runs.

Ours has Constant rates and torch's one param group for each parameter, so that a changed rate has a counterpart.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor, nn

import alrao_fast as alrao
from campaign.edits import EDITS, NO_MASTERS, ONLY_SGD, RATE
from campaign.engine import Trial, area
from campaign.oracles import assert_near

# What only ours has, or counts in another dtype.
NOT_TORCHS = ("rate", "step", "master")


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(11)
    net = nn.Sequential(nn.Linear(3, 2), nn.ConvTranspose2d(2, 3, 2), nn.LayerNorm(2))
    return net.to(dtype)


class Twin:
    """A network and an optimizer, ours or torch's."""

    def __init__(self, kind: str, options: dict[str, Any], dtype: torch.dtype, ours: bool) -> None:
        self.ours, self.kind, self.options = ours, kind, options
        self.net = network(dtype)
        self.opt = self.make()

    def make(self) -> Any:
        groups = [{"params": [p]} for p in self.net.parameters()]
        if self.ours:
            sampler = alrao.Constant(RATE)
            own = alrao.AlraoSGD if self.kind == "SGD" else alrao.AlraoAdam
            return own(groups, sampler=sampler, model=self.net, **self.options)
        other = torch.optim.SGD if self.kind == "SGD" else torch.optim.Adam
        return other(groups, lr=RATE, **self.options)

    @property
    def params(self) -> list[Tensor]:
        return [group["params"][0] for group in self.opt.param_groups]

    def set_lr(self, number: int, factor: float) -> None:
        group = self.opt.param_groups[number]
        group["lr"] = factor if self.ours else RATE * factor

    def states(self, number: int) -> dict[str, Any]:
        """The state of a parameter without the rates, which torch does not have."""
        return self.opt.state[self.params[number]]

    def keys(self, number: int) -> list[str]:
        """The states that torch's twin has, too: before a parameter's first step it has none."""
        own = self.opt.state.get(self.params[number], {})
        if self.ours and not int(own.get("step", 0)):
            return []
        return sorted(k for k, v in own.items() if isinstance(v, Tensor) and k not in NOT_TORCHS)

    def gradients(self, step: int, without: tuple[int, ...] = ()) -> None:
        generator = torch.Generator().manual_seed(step)
        for number, p in enumerate(self.params):
            grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
            p.grad = None if number in without or not p.requires_grad else grad


class Program:
    """A twin pair, and the edits that are done to both; the text says which.

    With master weights ours has parameters of low precision, torch's float32 ones.
    """

    def __init__(self, rng: Random) -> None:
        self.kind = rng.choice(["SGD", "SGD", "Adam"])
        self.masters = rng.random() < 0.25
        low = [torch.bfloat16, torch.float16]
        self.dtype = rng.choice(low if self.masters else [torch.float32, torch.float64])
        if self.kind == "SGD":
            momentum = rng.choice([0.0, 0.9, 0.9, 0.9])
            self.options = {"momentum": momentum, "weight_decay": rng.choice([0.0, 0.1])}
            if momentum:
                self.options |= rng.choice([{}, {"dampening": 0.5}, {"nesterov": True}])
        else:
            self.options = {"amsgrad": rng.random() < 0.5, "weight_decay": rng.choice([0.0, 0.1])}
        theirs = Twin(self.kind, self.options, torch.float32 if self.masters else self.dtype, False)
        if self.masters:
            self.options["master_weights"] = True
        self.twins = [theirs, Twin(self.kind, self.options, self.dtype, True)]
        self.step_number = 0
        self.count = len(self.twins[0].params)

    def step(self, twin: Twin, number: int, without: tuple[int, ...] = ()) -> None:
        twin.gradients(1000 + number, without)
        twin.opt.step()


@area("state", weight=7)
def edits(rng: Random) -> Trial:
    program = Program(rng)
    names = [rng.choice(list(EDITS)) for _ in range(rng.choice([1, 1, 1, 2]))]
    excluded = (ONLY_SGD if program.kind != "SGD" else ()) + (NO_MASTERS if program.masters else ())
    names = [name if name not in excluded else "load its own state_dict" for name in names]
    actions = [(name, EDITS[name](rng, program)) for name in names]
    steps_before = rng.choice([0, 1, 2, 2])

    def run_twin(twin: Twin) -> list[Any]:
        results = []
        for number in range(steps_before):
            program.step(twin, number)
        for number, (_name, action) in enumerate(actions):
            returned = action(twin)
            results.append(returned if isinstance(returned, list) else [])
            program.step(twin, 10 + number)
        program.step(twin, 20)
        return results

    theirs, ours = program.twins
    try:
        expected = run_twin(theirs)
    except Exception as problem:
        # Torch cannot do it: then neither need we, so long as it is said.
        text = f"{' and '.join(names)} (torch.optim raises {type(problem).__name__})"
        return Trial(text, lambda: None, "right")

    # A float32 state stays so under net.double(), for torch's as for ours.
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-9}.get(program.dtype, 3e-2)

    def right(results: list[Any]) -> None:
        for name, own, other in zip(names, results, expected):
            for a, b in zip(own, other):
                if isinstance(b, Tensor):
                    assert_near(a, b, f"what {name!r} returned", tolerance)
        for number, (a, b) in enumerate(zip(ours.params, theirs.params, strict=True)):
            assert_near(a, b, f"parameter {number}", tolerance)
            _same_states(ours, theirs, number, max(tolerance, 2e-5))

    options = ", ".join(f"{k}={v}" for k, v in program.options.items())
    text = f"{program.kind}({options}), {str(program.dtype)[6:]}, {steps_before} steps, then: "
    return Trial(text + " and ".join(names), lambda: run_twin(ours), "right", right)


def _same_states(ours: Twin, theirs: Twin, number: int, tolerance: float) -> None:
    """State and state_dict hold what torch's do."""
    own, other = ours.states(number), theirs.states(number)
    saved = ours.opt.state_dict()["state"][number]
    for key in theirs.keys(number):
        assert isinstance(own.get(key), Tensor), f"state {key!r} of parameter {number} is missing"
        assert_near(own[key], other[key], f"state {key!r} of parameter {number}", tolerance)
        assert_near(
            saved[key], other[key], f"{key!r} in state_dict of parameter {number}", tolerance
        )
    if "step" in other:
        assert int(own["step"]) == int(other["step"]), f"step {own['step']}, right {other['step']}"
