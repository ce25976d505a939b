"""What a step costs: `python benchmarks speed`.

Every figure is a ratio of medians taken interleaved in this run; an absolute time on a shared machine means little.
The peers: torch.optim.SGD(fused=True) on the same tensors, plain SGD training of the same network with a single last
layer, and Alrao with its clones one by one (a loop of N forward and N + 1 backward passes).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from models import ClonesOneByOne, PlainModel, mlp_backbone, vgg19_shapes
from networks import LSTMBackbone
from rich.console import Console
from rich.table import Table
from timing import Timing, interleave
from torch import Tensor, nn
from tqdm import tqdm

import alrao_fast as alrao

Step = Callable[[], object]


def optimizer_pair(tensors: list[Tensor], momentum: float) -> dict[str, Step]:
    """`AlraoSGD.step` and `torch.optim.SGD(fused=True).step` on equal parameters with fixed gradients."""
    steps: dict[str, Step] = {}
    for name in ("alrao", "sgd"):
        params = [nn.Parameter(t.clone()) for t in tensors]
        for param in params:
            param.grad = torch.randn_like(param) * 1e-3
        if name == "sgd":
            steps[name] = torch.optim.SGD(params, lr=1e-4, momentum=momentum, fused=True).step
        else:
            holder = nn.ParameterList(params)
            steps[name] = alrao.AlraoSGD(holder, lr_range=(1e-5, 1e-3), momentum=momentum).step
    return steps


def optimizer_cases() -> dict[str, Callable[[], dict[str, Step]]]:
    """Name -> candidates of each optimizer case, built when its turn comes."""
    vgg = vgg19_shapes()
    lstm = [tuple(p.shape) for p in LSTMBackbone(50).parameters()]
    small = [(64,)] * 256
    named = [
        ("VGG19, 20 M entries, momentum 0", vgg, 0.0),
        ("VGG19, 20 M entries, momentum 0.9", vgg, 0.9),
        (f"LSTM, {len(lstm)} tensors, momentum 0", lstm, 0.0),
        (f"LSTM, {len(lstm)} tensors, momentum 0.9", lstm, 0.9),
        ("256 tensors of 64, momentum 0", small, 0.0),
        ("256 tensors of 64, momentum 0.9", small, 0.9),
    ]
    return {
        name: lambda shapes=shapes, momentum=momentum: optimizer_pair(
            [torch.randn(shape) for shape in shapes], momentum
        )
        for name, shapes, momentum in named
    }


def training_steps(
    backbone: Callable[[], nn.Module],
    features: int,
    classes: int,
    clones: int,
    lr_range: tuple[float, float],
    inputs: Tensor,
    targets: Tensor,
) -> dict[str, Step]:
    """A whole training step with Alrao, with plain SGD, and with the clones one by one."""
    net = alrao.AlraoModel(backbone(), alrao.ClassifierClones(features, classes, clones))
    opt = alrao.AlraoSGD(net, lr_range=lr_range)
    plain = PlainModel(backbone(), features, classes)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.01, fused=True)
    loop = ClonesOneByOne(backbone(), features, classes, clones)
    loop_sgd = torch.optim.SGD(loop.parameters(), lr=0.01, fused=True)

    def alrao_step() -> None:
        opt.zero_grad()
        out = net(inputs, targets=targets)
        (out[0] if isinstance(out, tuple) else out).backward()
        opt.step()

    def plain_step() -> None:
        sgd.zero_grad()
        plain(inputs, targets=targets).backward()
        sgd.step()

    def loop_step() -> None:
        loop_sgd.zero_grad()
        loop.backward(*loop.losses(inputs, targets=targets))
        loop_sgd.step()

    return {"alrao": alrao_step, "sgd": plain_step, "one by one": loop_step}


def language_model(tokens: int, length: int, batch: int = 20) -> dict[str, Step]:
    """The paper's LSTM (2 layers of 100 units, 6 clones over (1e-3, 100)) on `length` x `batch` random tokens."""
    text = torch.randint(tokens, (length + 1, batch))
    return training_steps(
        lambda: LSTMBackbone(tokens), 100, tokens, 6, (1e-3, 100.0), text[:-1], text[1:]
    )


def step_cases() -> dict[str, Callable[[], dict[str, Step]]]:
    """Name -> candidates of each whole training step."""
    return {
        "MLP 64-256-256-10, batch 32, 10 clones": lambda: training_steps(
            mlp_backbone, 256, 10, 10, (1e-5, 10.0), torch.randn(32, 64), torch.randint(10, (32,))
        ),
        "LSTM, 50 characters, 70 x 20, 6 clones": lambda: language_model(50, 70),
        "LSTM, 10,000 words, 35 x 20, 6 clones": lambda: language_model(10_000, 35),
    }


HEAD_MEMORY_CASE = {"tokens": 10_000, "features": 100, "clones": 6, "samples": 700}


def head_memory(kind: str) -> float:
    """Extra peak memory in MB of one forward and backward of the last layer for 10,000 words; kind alrao or loop.

    What is there before counts as given: features, weights and a first small step that loads the libraries. The
    gradients of weights and features count as extra.
    """
    case = HEAD_MEMORY_CASE

    def once(samples: int) -> None:
        features = torch.randn(samples, case["features"], requires_grad=True)
        targets = torch.randint(case["tokens"], (samples,))
        if kind == "alrao":
            head(features, targets).backward()
        else:
            head.backward(*head.losses(features, targets=targets))

    if kind == "alrao":
        head = alrao.ClassifierClones(case["features"], case["tokens"], case["clones"])
    else:
        head = ClonesOneByOne(nn.Identity(), case["features"], case["tokens"], case["clones"])
    once(2)
    head.zero_grad()
    before = resident_memory("VmRSS")
    once(case["samples"])
    return resident_memory("VmHWM") - before


def resident_memory(field: str) -> float:
    """Resident memory of this process in MB: VmRSS now, VmHWM at its peak (getrusage would count the parent's)."""
    line = next(
        row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(field)
    )
    return int(line.split()[1]) / 1024


def measure_head_memory(kind: str) -> float:
    """`head_memory` in a process of its own, because a peak never falls."""
    command = [sys.executable, __file__, "--head-memory", kind]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run_cases(
    title: str, cases: dict[str, Callable[[], dict[str, Step]]], rounds: int, console: Console
) -> dict[str, dict[str, Timing]]:
    """Measure the cases and print their table, times in ms and as ratios to plain SGD."""
    results = {}
    for name, build in cases.items():
        with tqdm(total=rounds, desc=name, leave=False) as bar:
            results[name] = interleave(
                build(), rounds=rounds, seconds_per_block=0.1, on_round=bar.update
            )
    peers = [name for name in next(iter(results.values())) if name != "sgd"]
    table = Table(title=title)
    table.add_column("case")
    table.add_column("plain SGD, ms", justify="right")
    for peer in peers:
        table.add_column(f"{peer} / SGD", justify="right")
    for name, times in results.items():
        base = times["sgd"].median
        ratios = [f"{times[peer].median / base:.2f}" for peer in peers]
        table.add_row(name, f"{base * 1e3:.3f}", *ratios)
    console.print(table)
    return results


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks speed", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds of each case")
    parser.add_argument("--results", type=Path, default=Path("results/speed"))
    parser.add_argument("--head-memory", choices=("alrao", "loop"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.head_memory:
        print(head_memory(options.head_memory))
        return

    console = Console()
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    optimizer = run_cases("Optimizer step", optimizer_cases(), options.rounds, console)
    steps = run_cases("Whole training step", step_cases(), options.rounds, console)
    memory = {kind: measure_head_memory(kind) for kind in ("alrao", "loop")}
    console.print(
        f"Extra peak memory of the head, 10,000 words, 6 clones, 700 tokens: {memory['alrao']:.0f} MB, "
        f"one by one {memory['loop']:.0f} MB ({100 * memory['alrao'] / memory['loop']:.1f} %)"
    )
    options.results.mkdir(parents=True, exist_ok=True)
    record = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds": {
            name: {peer: timing._asdict() for peer, timing in times.items()}
            for name, times in {**optimizer, **steps}.items()
        },
        "head_memory_mb": memory,
    }
    (options.results / "speed.json").write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
