"""The ops' cases under pytest-benchmark, for its options and comparisons: `pytest benchmarks/bench_ops.py`.

It comes with the extra `[bench]`. The candidates run one after the other here; `python benchmarks speed` times them in
turns, and is what figures are taken from.
"""

import sys

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
# pytest has put the repository's root first, where the installed alrao_fast belongs.
sys.path.append(sys.path.pop(0))

from benchmarks.speed import presets
from benchmarks.speed.case import Candidate, Case, Missing

OPS = [case for case in presets.quick() if case.op != "training_step"]
CHOICES = [
    pytest.param(case, candidate, id=f"{case.name}-{candidate.name}")
    for case in OPS
    for candidate in case.candidates
    if not candidate.slow
]


@pytest.mark.parametrize(("case", "candidate"), CHOICES)
def test_speed(benchmark, case: Case, candidate: Candidate) -> None:
    benchmark.group = case.name
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        call = candidate.make(case.inputs(device, 0))
        call.run()
    except Missing as reason:
        pytest.skip(str(reason))

    def run() -> None:
        call.run()
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
