"""What is measured: a case is one computation on one size of inputs, and the candidates that can do it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alrao_fast import backends
from benchmarks.roofline import DTYPES as DTYPES

# Largest error that a candidate's outputs may have, relative to the largest entry of the truth. Generous: this finds
# a candidate that computes something else; how exact ours are is the tests' business.
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "tf32": 2e-2, "bfloat16": 8e-2, "float16": 2e-2}


class Missing(Exception):
    """A candidate cannot run here; the message says why."""


class Call(NamedTuple):
    """A candidate made ready for one set of inputs.

    `run` is what is timed; it drops what the previous run returned before it computes. `outputs` returns what the last
    run computed, by name. `drop` releases that, so that peak memory can be measured.
    """

    run: Callable[[], object]
    outputs: Callable[[], Mapping[str, Tensor]]
    drop: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Candidate:
    """Something that does a case's computation.

    `make(inputs)` returns its `Call`, or raises `Missing`. `claims` are the outputs that it must get right, by their
    names in the case's truth. `slow` ones, which compile for seconds or run for long, are left out of quick presets.
    Those that do not do the `whole` of the case's work have no shares of the machine's rates.
    """

    name: str
    make: Callable[[Any], Call]
    claims: tuple[str, ...]
    slow: bool = False
    whole: bool = True


@dataclass(frozen=True)
class Target:
    """A figure to reach: `metric` of candidate `ours` over that of `peer` is at most `limit`.

    row: the target's name, such as A1. metric: "gpu" (time on the device: by graph replay where both can be captured),
    "graph", "wall", "host" or "memory". peer "best": the fastest of all that are not ours. peer None: `ours` over the
    floor, the time that the case's bytes at the machine's copy rate and its flops at its matrix rate must take (memory:
    over `Case.allowed_memory`).
    """

    row: str
    metric: str
    ours: str
    peer: str | None
    limit: float


@dataclass(frozen=True)
class Case:
    """One computation on one size of inputs.

    name, op, sizes, dtype: what identifies it in the results.
    inputs: (device, seed) -> a set of inputs, of the case's own type. check_inputs: the same, smaller, for the
        comparison with the truth, where the case's own size would take too long in float64 on this device.
    truth: inputs -> every output by name, float64. check_runs: after how many runs.
    bytes: what must be read and written at least; flops: 2 per multiplication and addition; None where not counted.
    set_bytes: memory that a set of inputs takes, by which the number of sets is chosen.
    memory: whether peak memory is measured on the CPU too, in a process of its own per candidate.
    small: the same case at a tiny size, which loads the libraries before memory is measured.
    allowed_memory: bytes that a frugal candidate may take, outputs and buffers.
    """

    name: str
    op: str
    sizes: Mapping[str, int | float | str]
    dtype: str
    inputs: Callable[[torch.device, int], Any]
    truth: Callable[[Any], Mapping[str, Tensor]]
    candidates: tuple[Candidate, ...]
    bytes: float | None
    flops: float | None
    set_bytes: float
    check_inputs: Callable[[torch.device, int], Any] | None = None
    check_runs: int = 1
    memory: bool = False
    small: Case | None = None
    allowed_memory: float | None = None
    targets: tuple[Target, ...] = ()

    def identity(self, device: torch.device) -> dict[str, Any]:
        """What stands under "case" in the records of this case, but for the candidate."""
        case = {"benchmark": "speed", "name": self.name, "op": self.op, "sizes": dict(self.sizes)}
        return {**case, "dtype": self.dtype, "device": device.type}


# What torch.compile compiles with; a dry run, where seconds of compilation show nothing, traces only.
compiler = "inductor"


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for fixed shapes."""
    return torch.compile(function, dynamic=False, backend=compiler)


def generator_on(device: torch.device, seed: int) -> torch.Generator:
    """A seeded generator that draws on the device: large inputs need not cross from the CPU."""
    return torch.Generator(device).manual_seed(seed)


def sampled(tensor: Tensor, limit: int = 2**18) -> Tensor:
    """At most about `limit` entries of a tensor, evenly spread over it: enough to compare large results by."""
    flat = tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // limit)]


def ours(
    op: str,
    make: Callable[[str, Any], Call],
    claims: tuple[str, ...],
    *,
    slow: tuple[str, ...] = (),
    device_of: Callable[[Any], torch.device] = lambda given: given[0].device,
) -> Iterator[Candidate]:
    """Alrao's op as it chooses its backend, "auto", and on each by name, where that runs on the inputs' device."""

    def on(backend: str, given: Any) -> Call:
        state = backends.status(op, backend)
        if not state.available:
            raise Missing(state.reason)
        device = device_of(given)
        if backend not in backends.available(op, device):
            raise Missing(f"it does not run on {device.type} tensors")
        return make(backend, given)

    yield Candidate("alrao", partial(make, "auto"), claims)
    for name in backends.BACKENDS:
        yield Candidate(f"alrao {name}", partial(on, name), claims, name in slow)


def leaving_gradients(
    compute: Callable[[], Mapping[str, Tensor]],
    x: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] = (),
) -> Call:
    """The call of `compute`, which returns outputs by name and leaves gradients in the leaves `x`, `weights`, `biases`.

    The outputs "dx" and "dweight" are read from there; several weights are the clones'.
    """
    results: dict[str, Tensor] = {}
    leaves = [leaf for leaf in (x, *weights, *biases) if leaf is not None]

    def drop() -> None:
        results.clear()
        for leaf in leaves:
            leaf.grad = None

    def run() -> None:
        drop()
        results.update(compute())

    def outputs() -> Mapping[str, Tensor]:
        found = dict(results)
        if x is not None and x.grad is not None:
            found["dx"] = sampled(x.grad)
        grads = [weight.grad for weight in weights]
        return {**found, "dweight": sampled(grads[0] if len(grads) == 1 else torch.stack(grads))}

    return Call(run, outputs, drop)
