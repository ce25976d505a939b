"""The command line: which cases, the tests before them, the records and the tables after."""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm import tqdm

from benchmarks import machine, roofline
from benchmarks.results import Results
from benchmarks.speed import authors, case, judging, presets, sweeps
from benchmarks.speed.case import Case, Target
from benchmarks.speed.measure import Effort, Values, measure, memory_here

# Interleaved rounds, and about how many seconds of them per case.
EFFORTS = {"quick": (7, 2.0), "cpu": (15, 12.0), "full": (15, 30.0), "gpu": (11, 1.5)}
OPS = ("feature_sgd", "feature_adam", "gradient_clip", "switch_mixture", "switch_update")
# Its absence is a failure; any other candidate may be missing.
OURS = ("alrao",)
PEERS = ("apex", "liger-kernel", "cut-cross-entropy", "quack-kernels")
Judged = list[tuple[Case, Target, Values]]


def peers() -> dict[str, str | None]:
    """The versions of the optional peers, and where the authors' repository is."""
    place = None if authors.path is None else str(authors.path)
    return {"authors": place, **{package: machine.version_of(package) for package in PEERS}}


class Session:
    """A run of the benchmark: where it measures, what it knows of the machine, and where the records go."""

    def __init__(self, options: argparse.Namespace, device: torch.device, effort: Effort) -> None:
        self.device = device
        self.effort = effort
        self.again = options.again
        self.dry_run = options.dry_run
        self.console = Console()
        if not self.console.is_terminal:
            # Of a file or a pipe rich does not know the width.
            self.console.width = 160
        # With the peers, so that what was missing is measured once it is there.
        found = {**machine.describe(), "peers": peers()}
        self.results = Results(options.results / "speed.jsonl", found)
        self.rates: dict[str, float] = {}
        self.failed: list[str] = []

    def measure_rates(self, dtypes: Iterable[str]) -> None:
        """The machine's copy and matrix rates; a dry run makes do with small ones."""
        size, side = (2**20, 64) if self.dry_run else (None, None)
        self.rates = {"copy": roofline.copy_rate(self.device, size=size)}
        for dtype in sorted(set(dtypes)):
            self.rates[dtype] = roofline.matrix_rate(dtype, self.device, side=side)
        self.results.append(self._key({"kind": "rates", "device": self.device.type}), **self.rates)
        found = ", ".join(
            f"{name} {rate / (1e9 if name == 'copy' else 1e12):.2f} {'GB/s' if name == 'copy' else 'TFLOP/s'}"
            for name, rate in self.rates.items()
        )
        self.console.print(f"this machine: {found}")

    def _key(self, case: dict[str, Any]) -> dict[str, Any]:
        key = {"benchmark": "speed", **case}
        return {**key, "dry_run": True} if self.dry_run else key

    def run(self, case: Case) -> dict[str, Values]:
        """The values of a case by candidate, measured now or found among the results."""
        identity = {**case.identity(self.device), "kind": "candidate"}
        keys = {c.name: self._key({**identity, "candidate": c.name}) for c in case.candidates}
        found = {name: self.results.find(key) for name, key in keys.items()}
        done = all(
            record is not None
            and record["rounds"] >= self.effort.rounds
            and not ("missing" in record and name in OURS)
            for name, record in found.items()
        )
        if done and not self.again:
            return found
        with tqdm(total=self.effort.rounds, desc=case.name, leave=False, disable=None) as bar:
            values = measure(case, self.device, self.effort, bar.update)
        self.failed += [
            f"{case.name} ({case.dtype}): {values[name]['missing']}"
            for name in OURS
            if "missing" in values.get(name, {})
        ]
        whole = {c.name for c in case.candidates if c.whole}
        for name, row in values.items():
            if "missing" not in row and name in whole:
                row |= {"bytes": case.bytes, "flops": case.flops}
                row |= judging.shares(case, row, self.rates)
            self.results.append(keys[name], rounds=self.effort.rounds, **row)
        return values

    def verdict(self) -> int:
        """The exit status: 1 where Alrao itself could not be measured or was wrong, which is printed."""
        for line in self.failed:
            self.console.print(f"[red]failed:[/red] {line}", highlight=False)
        return 1 if self.failed else 0

    def judge(self, case: Case, values: dict[str, Values]) -> Judged:
        """The case's targets with what came of them, recorded."""
        judged = []
        for target in case.targets:
            result = judging.judge(case, target, values, self.rates)
            key = {**case.identity(self.device), "kind": "target", "row": target.row}
            key |= {"metric": target.metric, "ours": target.ours, "peer": target.peer}
            self.results.append(self._key(key), **result)
            judged.append((case, target, result))
        return judged

    def sweep(self, name: str, folder: Path) -> None:
        """One sweep: its cases, the exponents, and the plot."""
        points = []
        for size, one in sweeps.SWEEPS[name](self.device):
            values = self.run(one)
            judging.show_case(self.console, one, values)
            points.append((size, values))
        found = sweeps.summaries(points)
        for candidate, row in found.items():
            key = {"kind": "sweep", "sweep": name, "candidate": candidate}
            self.results.append(self._key({**key, "device": self.device.type}), **row)
            powers = [row["time_exponent"], row["memory_exponent"]]
            text = ["-" if p is None else f"{p:.2f}" for p in powers]
            self.console.print(f"{candidate}: time ~ {name}^{text[0]}, memory ~ {name}^{text[1]}")
        path = folder / f"sweep_{name}.png"
        sweeps.plot(name, found, path)
        self.console.print(f"plot: {path}")


def run_tests(ops: set[str], quick: bool) -> None:
    """The tests of the ops; exits where one fails. Quick: of the backends that `auto` can take, without long ones."""
    if find_spec("pytest") is None:
        raise SystemExit(
            "the ops' tests run first, and pytest is not installed: pip install -e '.[bench]' (--no-tests measures "
            "without them)"
        )
    folder = machine.ROOT / "tests"
    files = [path for op in OPS if op in ops for path in sorted(folder.glob(f"test_{op}*.py"))]
    command = [sys.executable, "-c", "import sys, pytest; sys.path.pop(0); sys.exit(pytest.main())"]
    command += ["-x", "-q", "-p", "no:cacheprovider", *map(str, files)]
    if quick:
        command += ["-k", "hand or budget or example"]
    if subprocess.run(command, cwd=machine.ROOT).returncode != 0:
        raise SystemExit(
            "the ops' tests fail: nothing is measured (--no-tests measures all the same)"
        )


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python benchmarks speed", description=__doc__)
    add: Callable[..., Any] = parser.add_argument
    add("--preset", choices=presets.PRESETS, help="which cases (default: gpu on a GPU, else cpu)")
    add("--sweep", choices=sweeps.SWEEPS, help="instead of a preset: how cost grows with a size")
    add("--only", metavar="TEXT", help="only cases whose name contains this")
    add("--list", action="store_true", help="name the cases and candidates, measure nothing")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    add("--rounds", type=int, help="interleaved rounds of each case")
    add("--seconds", type=float, help="about how long the rounds of a case may take")
    add("--threads", type=int, help="torch threads")
    add("--authors", type=Path, metavar="PATH", help="a clone of the authors' repository")
    add("--again", action="store_true", help="measure finished cases anew")
    add("--no-tests", action="store_true", help="do not run the ops' tests first")
    memory = "no peak memory on a CPU (a process per candidate)"
    add("--no-memory", action="store_true", help=memory)
    add("--dry-run", action="store_true", help="the gpu preset's code at tiny sizes, on a CPU")
    add("--results", type=Path, default=Path("results/speed"))
    add("--memory-of", help=argparse.SUPPRESS)
    add("--candidate", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def find(question: dict[str, Any]) -> Case:
    """The case of the CPU presets and sweeps with this name, sizes and dtype, made no earlier than needed."""
    cpu = torch.device("cpu")
    swept = (one for sweep in ("clones", "classes") for _, one in sweeps.SWEEPS[sweep](cpu))
    for one in itertools.chain(swept, presets.full()):
        if (one.name, dict(one.sizes), one.dtype) == tuple(
            question[key] for key in ("name", "sizes", "dtype")
        ):
            return one
    raise ValueError(f"no case {question['name']} {question['sizes']} {question['dtype']}")


def _cases(options: argparse.Namespace, preset: str) -> list[Case]:
    cases = presets.gpu(tiny=True) if options.dry_run else presets.PRESETS[preset]()
    chosen = [one for one in cases if not options.only or options.only in one.name]
    if options.dry_run:
        # Of tiny cases some are the same; the first has the figures to reach.
        unique: dict[str, Case] = {}
        for one in chosen:
            unique.setdefault(repr(one.identity(torch.device("cpu"))), one)
        return list(unique.values())
    if preset == "quick":
        return [replace(c, candidates=tuple(k for k in c.candidates if not k.slow)) for c in chosen]
    return chosen


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    authors.path = options.authors
    if options.dry_run:
        case.compiler = "aot_eager"
    if options.threads or options.dry_run:
        torch.set_num_threads(options.threads or 1)
    if options.memory_of:
        question = json.loads(options.memory_of)
        print(memory_here(find(question), options.candidate))
        return 0
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device("cpu" if options.dry_run else name)
    preset = options.preset or ("gpu" if options.dry_run else presets.default(device))
    rounds, seconds = (1, 0.0) if options.dry_run else EFFORTS[preset]
    effort = Effort(
        options.rounds or rounds,
        seconds if options.seconds is None else options.seconds,
        not (options.no_memory or options.dry_run),
    )
    cases = _cases(options, preset)
    if options.list:
        for one in cases:
            print(f"{one.name} ({one.dtype}): {', '.join(c.name for c in one.candidates)}")
        return 0
    if not (options.no_tests or options.dry_run):
        ops = {"switch_mixture", "feature_sgd", "switch_update"} | {one.op for one in cases}
        run_tests(ops, preset == "quick")
    session = Session(options, device, effort)
    if options.sweep:
        session.measure_rates(["float32"])
        session.sweep(options.sweep, options.results)
        return session.verdict()
    session.measure_rates(one.dtype for one in cases)
    judged: Judged = []
    for one in tqdm(cases, desc="cases", disable=None):
        values = session.run(one)
        judging.show_case(session.console, one, values)
        judged += session.judge(one, values)
    judging.show_targets(session.console, judged, options.dry_run)
    return session.verdict()
