"""Measuring a case: every candidate is compared with the truth first, then all are timed in turns."""

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from alrao_fast.testing import relative_error
from benchmarks import timing
from benchmarks.roofline import precision
from benchmarks.speed import authors
from benchmarks.speed.case import TOLERANCE, Call, Candidate, Case, Missing

Values = dict[str, Any]
MAIN = Path(__file__).resolve().parent.parent / "__main__.py"


class Effort(NamedTuple):
    """How much is measured: at most `rounds` interleaved rounds and about `seconds` of them per case."""

    rounds: int
    seconds: float
    memory: bool


def worst_error(case: Case, candidate: Candidate, call: Call, truth: Any) -> float:
    """The largest relative error of what the candidate claims; raises `Missing` where it is not a rounding error."""
    outputs = call.outputs()
    worst = 0.0
    for name in candidate.claims:
        # Where outputs differ in name, as the plain loss of a plain network does, the truth has both.
        error = relative_error(outputs[name], truth[name])
        if not error <= TOLERANCE[case.dtype]:
            raise Missing(f"wrong: {name} is off by {error:.1e} of its largest entry")
        worst = max(worst, error)
    return worst


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _reason(error: Exception) -> str:
    if isinstance(error, Missing):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".strip()


def check(case: Case, device: torch.device) -> tuple[dict[str, Values], list[Candidate]]:
    """(values by candidate: its error, or why it is missing; the candidates that can be timed).

    Whatever it is that a candidate fails of becomes a row that says so.
    """
    make_inputs = case.check_inputs or case.inputs
    truth = dict(case.truth(make_inputs(device, 0)))
    values: dict[str, Values] = {}
    able = []
    for candidate in case.candidates:
        try:
            call = candidate.make(make_inputs(device, 0))
            for _ in range(case.check_runs):
                call.run()
            values[candidate.name] = {"error": worst_error(case, candidate, call, truth)}
            able.append(candidate)
        except Exception as error:
            values[candidate.name] = {"missing": _reason(error)}
        call = None  # type: ignore[assignment]
        _free(device)
    return values, able


def measure(
    case: Case, device: torch.device, effort: Effort, on_round: Callable[[], None] | None = None
) -> dict[str, Values]:
    """Values by candidate: error, seconds by clock, peak memory; or why there is nothing. `speed` tells the fields."""
    torch._dynamo.reset()
    with precision(case.dtype):
        values, able = check(case, device)
        on_gpu = device.type == "cuda"
        sets = timing.input_sets(case.set_bytes) if on_gpu else 1
        given = [case.inputs(device, seed) for seed in range(sets)]
        runs: dict[str, list[Callable[[], object]]] = {}
        for candidate in able:
            try:
                calls, memory = _ready(candidate, given, on_gpu)
            except torch.OutOfMemoryError as error:
                values[candidate.name] = {"missing": _reason(error)}
                _free(device)
                continue
            runs[candidate.name] = [call.run for call in calls]
            if memory is not None:
                values[candidate.name]["peak_memory"] = memory
        limits = {"rounds": effort.rounds, "seconds": effort.seconds, "on_round": on_round}
        if on_gpu:
            # The launches of a whole network may take longer than its kernels.
            captured = 0.05 if case.op == "training_step" else 0.005
            for name, result in timing.gpu_interleave(runs, captured=captured, **limits).items():
                values[name]["seconds"] = {clock: t._asdict() for clock, t in result.times.items()}
                if result.missing:
                    values[name]["no_clock"] = result.missing
        elif runs:
            block = min(0.1, effort.seconds / effort.rounds / len(runs))
            first = {name: calls[0] for name, calls in runs.items()}
            for name, time in timing.interleave(first, seconds_per_block=block, **limits).items():
                values[name]["seconds"] = {"wall": time._asdict()}
    del given, runs
    _free(device)
    if case.memory and effort.memory and not on_gpu:
        for candidate in able:
            values[candidate.name]["peak_memory"] = memory_in_new_process(case, candidate)
    return values


def _ready(candidate: Candidate, given: list[Any], on_gpu: bool) -> tuple[list[Call], int | None]:
    """The candidate's calls, one per set, and on a GPU the bytes that its first one and its run take at most."""
    calls: list[Call] = []

    def first() -> None:
        calls.append(candidate.make(given[0]))
        calls[0].run()

    memory = timing.peak_memory(first) if on_gpu else first()
    calls += [candidate.make(one) for one in given[1:]]
    return calls, memory


# Peak memory on a CPU: resident memory of a process of its own, because what was freed there may not be given back.


def memory_in_new_process(case: Case, candidate: Candidate) -> int:
    """Peak extra bytes of one run of the candidate, see `memory_here`."""
    question = {"name": case.name, "sizes": dict(case.sizes), "dtype": case.dtype}
    command = [sys.executable, str(MAIN), "speed", "--memory-of", json.dumps(question)]
    command += ["--candidate", candidate.name, "--threads", str(torch.get_num_threads())]
    if authors.path is not None:
        command += ["--authors", str(authors.path)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(answer.stdout.splitlines()[-1])


def memory_here(case: Case, name: str) -> int:
    """Bytes that this process's resident memory grows by at most in a first run of the candidate.

    What is there before counts as given: inputs, and the libraries, which a tiny run loads. Gradients and everything
    else that the candidate makes count.
    """
    device = torch.device("cpu")
    for size in (case.small, case):
        assert size is not None, f"{case.name}: memory is not measured"
        given = size.inputs(device, 0)
        candidate = next(c for c in size.candidates if c.name == name)
        # The peak begins anew at what is resident now (man proc, clear_refs).
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        candidate.make(given).run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    """Resident memory of this process in bytes: VmRSS now, VmHWM at its peak (getrusage would count the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])
