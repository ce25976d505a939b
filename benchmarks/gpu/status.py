"""`make gpu-status`: do the committed results of `make gpu-check` verify the present sources, and what changed since?

Exit status 0 if every step has passed on exactly these sources, in one result or in several together, else 1.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, source_hashes

RESULTS = ROOT / "benchmarks" / "gpu_results"
# What `make gpu-check` runs on a GPU, by phases of about 240 seconds with the build, which comes first in each: all of
# it must have passed, in one call or in several.
PHASES = {
    "ops": ("doctor", "ceilings", "exercise cuda", "exercise triton"),
    "tests": ("tests on the device",),
    "memory": ("more than 2^31", "memcheck", "racecheck"),
    "speed": ("speed",),
    "rest": ("rest of the tests",),
}
STEPS = ("build", *(step for steps in PHASES.values() for step in steps))


def changes(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """The files that differ, each with how."""
    differ = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    how = {n: "new" if n not in then else "removed" if n not in now else "changed" for n in differ}
    return [f"{how[name]:<8} {name}" for name in differ]


def describe(result: dict[str, Any], now: dict[str, str]) -> tuple[set[str], list[str]]:
    """The steps that a result says have passed on the sources `now`, and the lines that tell of it."""
    steps, gpu = result["steps"], result["machine"]["gpu"]
    failed = [f"{s['name']} ({s['verdict']})" for s in steps if s["verdict"] != "passed"]
    changed = changes(result["source_hashes"], now)
    lines = [f"{result['name']}: {gpu or 'no GPU: a dry run'}, torch {result['machine']['torch']}"]
    if not gpu:
        lines.append("  verifies nothing: it was not taken on a GPU")
    if failed:
        lines.append(f"  not passed: {', '.join(failed)}")
    if changed:
        lines.append(f"  {len(changed)} files changed since:")
        lines += [f"    {line}" for line in changed]
    else:
        lines.append("  taken of exactly these sources")
    passed = {s["name"] for s in steps if s["verdict"] == "passed"}
    return (passed if gpu and not changed else set()), lines


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks gpu_status", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args(arguments)
    files = sorted(options.results.glob("*.json"))
    if not files:
        print("No result of a GPU yet: run `make gpu-check` on a machine with one.")
        return 1
    now, passed = source_hashes(), set()
    for file in files:
        steps, lines = describe(json.loads(file.read_text()), now)
        passed |= steps
        print("\n".join(lines))
    missing = [step for step in STEPS if step not in passed]
    if not missing:
        print("The present sources are verified: every step has passed.")
        return 0
    print(f"The present sources are not verified: run `make gpu-check` for {', '.join(missing)}.")
    return 1
