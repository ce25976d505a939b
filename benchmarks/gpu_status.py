"""`make gpu-status`: do the committed results of `make gpu-check` verify the present sources, and what changed since?

Exit status 0 if a result with every step passed was taken of exactly these sources, else 1.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from machine import ROOT, source_hashes

RESULTS = ROOT / "benchmarks" / "gpu_results"


def changes(then: dict[str, str], now: dict[str, str]) -> list[str]:
    """The files that differ, each with how."""
    lines = []
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            how = "new" if name not in then else "removed" if name not in now else "changed"
            lines.append(f"{how:<8} {name}")
    return lines


def describe(result: dict[str, Any], now: dict[str, str]) -> tuple[bool, list[str]]:
    """Whether a result verifies the sources `now`, and the lines that say so."""
    failed = [s["name"] for s in result["steps"] if s["verdict"] != "passed"]
    changed = changes(result["source_hashes"], now)
    gpu = result["machine"]["gpu"] or "no GPU: a dry run"
    head = f"{result['name']}: {gpu}, torch {result['machine']['torch']}"
    lines = [head]
    if not result["machine"]["gpu"]:
        lines.append("  verifies nothing: it was not taken on a GPU")
    if failed:
        lines.append(f"  not passed: {', '.join(failed)}")
    if changed:
        lines.append(f"  {len(changed)} files changed since:")
        lines += [f"    {line}" for line in changed]
    else:
        lines.append("  taken of exactly these sources")
    return bool(result["machine"]["gpu"]) and not failed and not changed, lines


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks gpu_status", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args(arguments)
    files = sorted(options.results.glob("*.json"))
    if not files:
        print("No result of a GPU yet: run `make gpu-check` on a machine with one.")
        return 1
    now = source_hashes()
    verified = []
    for file in files:
        good, lines = describe(json.loads(file.read_text()), now)
        print("\n".join(lines))
        if good:
            verified.append(file.stem)
    if verified:
        print(f"The present sources are verified by {', '.join(verified)}.")
        return 0
    print("No result verifies the present sources: run `make gpu-check` on a machine with a GPU.")
    return 1
