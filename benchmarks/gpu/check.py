"""Everything that a GPU can verify, in one command that needs no network: `make gpu-check`.

Builds the kernels for the GPUs present, then runs the doctor, every op under compute-sanitizer, the tests of the
device, tests with more than 2^31 elements, the speed benchmarks, and the rest of the test suite. Each step is a
process of its own with a time limit: one that fails is recorded with the end of its output, and the next one runs.
Written, anew after each step, to benchmarks/gpu_results: <gpu>-<date>-<time>.json and .md; the whole output to .log.
All steps together take some ten minutes. On a GPU that is lent for less, --only names steps or a phase, of about 240
seconds with the build: `make gpu-check ARGS="--only ops"`, then tests, memory, speed, rest.

Nothing is installed: the environment stays as it is. Without a GPU (or with --dry-run) every step that can runs on
the CPU, small; the others are skipped, with the reason.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.gpu import report
from benchmarks.gpu.status import PHASES, STEPS
from benchmarks.results import read

ROOT = machine.ROOT
# What the tests and benchmarks import besides torch; a missing one fails or skips what needs it.
MODULES = "pytest hypothesis numpy expecttest triton sklearn matplotlib rich tqdm ninja setuptools".split()
LARGE = "tests/test_gpu_large.py"
TAIL = 60


@dataclass
class Step:
    """A command with a time limit in seconds; `skip` says why it cannot run here. `env` is added to the environment.

    `after` looks at the output of a command that ran and returns a note, for the table.
    """

    name: str
    command: list[str]
    limit: float
    env: dict[str, str] = field(default_factory=dict)
    skip: str | None = None
    after: Callable[[str], str] | None = None


class Check:
    """The steps, where their results go, and the time that is left."""

    def __init__(
        self, folder: Path, seconds: float, dry_run: bool, only: list[str] | None = None
    ) -> None:
        self.on_gpu = torch.cuda.is_available() and not dry_run
        self.start = time.monotonic()
        self.seconds = seconds
        self.only = only
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        described = machine.describe()
        if not self.on_gpu:
            described["gpu"] = None
        gpu = re.sub(r"[^a-z0-9]+", "-", (described["gpu"] or "dry run").lower()).strip("-")
        self.name = f"{gpu}-{datetime.now():%Y-%m-%d-%H%M}"
        self.work = ROOT / "build" / "gpu_check"
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        self.log = (folder / f"{self.name}.log").open("w", buffering=1)
        count = torch.cuda.device_count() if self.on_gpu else 0
        self.result: dict[str, Any] = {
            "name": self.name,
            "date": datetime.now().isoformat(timespec="seconds"),
            "seconds": 0.0,
            "machine": described,
            "devices": [device_record(number) for number in range(count)],
            "missing_modules": [m for m in MODULES if importlib.util.find_spec(m) is None],
            "source_state": machine.source_state(),
            "source_hashes": machine.source_hashes(),
            "ceilings": {},
            **{kind: [] for kind in ("errors", "speed", "steps")},
        }

    def run(self, step: Step) -> None:
        """Run a step and record it, unless others were asked for."""
        wanted = self.only is None or step.name in self.only or step.name.startswith("build")
        if not wanted:
            return
        begin = time.monotonic()
        # A few seconds to write down what there is.
        limit = min(step.limit, self.seconds - (begin - self.start) - 5)
        output, verdict, notes = "", "skipped", [step.skip or "no time left"]
        if step.skip is None and limit >= 3:
            print(f"{step.name:<22} ...", flush=True)
            self.log.write(f"\n===== {step.name}: {' '.join(step.command)}\n")
            output, status = self._execute(step, limit)
            self.log.write(output)
            verdict = {0: "passed", None: "timeout"}.get(status, "failed")
            notes = [f"stopped after {limit:.0f} seconds"] if status is None else []
            try:
                notes.append(step.after(output) if step.after else "")
            except Exception as error:
                verdict = "failed"
                notes.append(f"its result cannot be read: {type(error).__name__}: {error}")
        seconds, note = time.monotonic() - begin, "; ".join(filter(None, notes))
        record: dict[str, Any] = {"name": step.name, "verdict": verdict}
        command = without_places(" ".join(step.command))
        record |= {"seconds": round(seconds, 1), "note": note, "command": command}
        if verdict in ("failed", "timeout"):
            record["tail"] = without_places(output).splitlines()[-TAIL:]
        self.result["steps"].append(record)
        print(f"{step.name:<22} {verdict:<8} {seconds:5.0f} s  {note}", flush=True)
        self.log.write(f"===== {step.name}: {verdict} after {seconds:.1f} s {note}\n")
        self.write()

    def _execute(self, step: Step, limit: float) -> tuple[str, int | None]:
        """Output and exit status of the command; None where it took longer than `limit`."""
        path = self.work / f"{step.name.replace(' ', '-')}.out"
        # With a view of the package as it would be installed, unless this checkout is already.
        places = (str(self.work / "site"), os.environ.get("PYTHONPATH", ""))
        paths = os.pathsep.join(filter(None, places))
        env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": paths, **step.env}
        with path.open("wb") as out:
            streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.STDOUT}
            try:
                process = subprocess.Popen(
                    step.command, cwd=ROOT, env=env, start_new_session=True, **streams
                )
            except OSError as error:
                return str(error), 127
            try:
                status: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                # The group that this step began, and nothing else.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = None
        return path.read_text(errors="replace"), status

    def lay_out(self) -> None:
        """Links to the sources in the shape of the installed package, the kernels built in place among them."""
        package = self.work / "site" / "alrao_fast"
        package.mkdir(parents=True, exist_ok=True)
        for entry in (*(ROOT / "alrao_fast").iterdir(), ROOT / "kernels"):
            link = package / entry.name
            if entry.name != "__pycache__" and not link.exists():
                link.symlink_to(entry)

    def write(self) -> None:
        self.result["seconds"] = round(time.monotonic() - self.start, 1)
        target = self.folder / f"{self.name}.json"
        target.write_text(json.dumps(self.result, indent=1) + "\n")
        target.with_suffix(".md").write_text(report.markdown(self.result))


def without_places(text: str) -> str:
    """Without where on the machine things lie: results are committed."""
    for place, name in ((sys.executable, "python"), (f"{ROOT}/", ""), (f"{sys.prefix}/", "")):
        text = text.replace(place, name)
    return text


def device_record(number: int) -> dict[str, Any]:
    device = torch.cuda.get_device_properties(number)
    record = {"name": device.name, "capability": f"{device.major}.{device.minor}"}
    return record | {"memory": device.total_memory, "multiprocessors": device.multi_processor_count}


def steps(check: Check) -> None:
    python = sys.executable
    missing = check.result["missing_modules"]
    no_gpu = None if check.on_gpu else "no GPU"
    if missing:
        print(f"not installed, and nothing is installed here: {', '.join(missing)}")

    def run(name: str, command: list[str], limit: float, **options: Any) -> None:
        check.run(Step(name, command, limit, **options))

    build = [python, "setup.py", "build_ext", "--inplace"]
    archs = sorted({device["capability"] for device in check.result["devices"]})
    wanted = {}
    if check.on_gpu:
        wanted = {"ALRAO_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ";".join(archs)}
        # Lines of the sources, for the sanitizer's reports.
        wanted["NVCC_APPEND_FLAGS"] = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} -lineinfo"
    run("build", build, 150, env=wanted, after=_built)
    if check.result["steps"][-1]["verdict"] != "passed":
        # What needs no CUDA kernels can still be seen.
        run("build without CUDA", build, 90, env={"ALRAO_CUDA": "0"}, after=_built)
    check.lay_out()
    # Not -m: it would put this folder, where the package lacks its kernels/, before the laid out one.
    inside = "import sys; sys.path.pop(0); "
    doctor = f"{inside}from alrao_fast.doctor import main; sys.exit(main())"
    run("doctor", [python, "-c", doctor], 60)

    ceilings = check.work / "ceilings.json"
    run("ceilings", [python, "benchmarks", "gpu_ceilings", "--out", str(ceilings)], 40)
    check.result["ceilings"] = _json(ceilings)

    errors = check.work / "errors.jsonl"
    exercise = [python, "benchmarks", "gpu_exercise", "--backend"]
    for backend in ("cuda", "triton") if check.on_gpu else ("cpu",):
        run(f"exercise {backend}", [*exercise, backend, "--out", str(errors)], 90)
    check.result["errors"] = list(read(errors))

    # A test that takes this device for missing is a failure. Threads of torch and of workers would fight for the cores.
    env = {"OMP_NUM_THREADS": "1", **({"ALRAO_REQUIRE": "cuda,triton"} if check.on_gpu else {})}
    pytest = [python, "-c", f"{inside}import pytest; sys.exit(pytest.main(sys.argv[1:]))", "-q"]
    parallel = _workers(check.on_gpu)
    no_pytest = "pytest is not installed" if "pytest" in missing else None
    tests = {"skip": no_pytest, "after": _pytest_line}
    every = ["tests", f"--ignore={LARGE}"]
    device = [*every, "-m", "device and not slow", "--backends", "cuda,triton"]
    if not check.on_gpu:
        device = ["tests/test_gpu.py", "tests/test_graphed_step.py"]
    run("tests on the device", [*pytest, *parallel, *device], 180, env=env, **tests)
    run("more than 2^31", [*pytest, LARGE], 60, env=env, **tests)

    sanitizer = find_sanitizer()
    unchecked = no_gpu or (None if sanitizer else "compute-sanitizer is not installed")
    # One allocation per tensor: only then is a write past its end one past an allocation's.
    apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in ("memcheck", "racecheck"):
        command = [sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "86"]
        command += [*exercise, "cuda"]
        run(tool, command, 75, env=apart, skip=unchecked, after=_sanitizer_line)

    # Its tests of the ops have just run. Finished cases are kept where the time runs out.
    speed = check.work / "speed"
    command = [python, "benchmarks", "speed", "--preset", "gpu", "--no-tests"]
    small = [] if check.on_gpu else ["--dry-run"]
    run("speed", [*command, "--results", str(speed), *small], 300)
    records = read(speed / "speed.jsonl")
    check.result["speed"] = [{k: v for k, v in r.items() if k != "machine"} for r in records]

    rest = [*pytest, *parallel, *every, "-m", "not device and not slow"]
    tests["skip"] = no_pytest or no_gpu
    run("rest of the tests", rest, 600, env={"OMP_NUM_THREADS": "1"}, **tests)


def find_sanitizer() -> str | None:
    places = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    found = [Path(place) / "bin" / "compute-sanitizer" for place in places if place]
    return shutil.which("compute-sanitizer") or next((str(f) for f in found if f.exists()), None)


def _workers(on_gpu: bool) -> list[str]:
    """Options of pytest-xdist, where it is installed and there are cores for it."""
    cores = len(os.sched_getaffinity(0))
    if not on_gpu or importlib.util.find_spec("xdist") is None or cores < 4:
        return []
    return ["-n", str(min(11, cores * 2 // 3 + 1))]


def _built(output: str) -> str:
    info = _json(ROOT / "alrao_fast" / "_build_info.json")
    if info.get("cuda_archs"):
        return f"CUDA {info.get('cuda_toolkit')}, {', '.join(info['cuda_archs'])}"
    return str(info.get("cuda_skipped") or info.get("extension_skipped"))


def _pytest_line(output: str) -> str:
    lines = re.findall(r"^.*\b(?:passed|failed|skipped|errors?)\b.* in [\d.]+s.*$", output, re.M)
    return lines[-1].strip(" =") if lines else "pytest did not finish"


def _sanitizer_line(output: str) -> str:
    lines = re.findall(r"^=+ (.*SUMMARY.*)$", output, re.M)
    return lines[-1] if lines else "no summary"


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks gpu_check", description=__doc__)
    add = parser.add_argument
    out = "folder for the results; default benchmarks/gpu_results, of a dry run build/gpu_dry_run"
    only = "these steps or phases, after the build; gpu_status takes the results of the same sources together. Phases: "
    only += "; ".join(f"{name}: {', '.join(steps)}" for name, steps in PHASES.items())
    add("--out", type=Path, help=out)
    names = [*PHASES, *STEPS]
    add("--only", nargs="+", action="extend", choices=names, metavar="STEP", help=only)
    add("--seconds", type=float, default=570, help="for all steps together")
    add("--dry-run", action="store_true", help="on the CPU, even where there is a GPU")
    options = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available() and not options.dry_run
    default = ROOT / ("benchmarks/gpu_results" if on_gpu else "build/gpu_dry_run")
    only = options.only and [step for name in options.only for step in PHASES.get(name, (name,))]
    check = Check(options.out or default, options.seconds, options.dry_run, only)
    try:
        steps(check)
    finally:
        check.write()
    print(f"\n{report.markdown(check.result)}\n{check.folder / check.name}.json")
    bad = [s["name"] for s in check.result["steps"] if s["verdict"] in ("failed", "timeout")]
    if bad:
        print(f"NOT PASSED: {', '.join(bad)}")
    return 1 if bad else 0
