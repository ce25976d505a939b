"""`python benchmarks COMMAND`: see what Alrao buys and what it costs, on this machine."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path

# Command: its module within the package, and what it shows.
COMMANDS = {
    "demo": (
        "experiments.demo",
        "Alrao against a grid of learning rates and Adam, on scikit-learn's digits",
    ),
    "speed": (
        "speed.command",
        "what Alrao costs: every op and whole training steps beside everything else that does the same",
    ),
    "gpu_check": (
        "gpu.check",
        "everything that a GPU can verify: tests, compute-sanitizer, speed; a result file",
    ),
    "gpu_status": (
        "gpu.status",
        "whether the committed results of a GPU are those of the present sources",
    ),
    "gpu_ceilings": ("gpu.ceilings", "a step of gpu_check: how fast the GPU copies and multiplies"),
    "gpu_exercise": ("gpu.exercise", "a step of gpu_check: every op against the reference"),
    "compat": (
        "speed.compat",
        "a training step of alrao_fast.compat against the loop over the last layers",
    ),
    "quality": (
        "experiments.quality.command",
        "Alrao without tuning against tuned and tuning-free rivals, on digits, text and CIFAR-10",
    ),
    "ranking": (
        "experiments.ranking",
        "whether alrao_fast.rank orders networks as a search over SGD's learning rates does",
    ),
    "report": (
        "report.command",
        "one page of tables and figures from the results of the other commands",
    ),
    "paper": (
        "experiments.paper.command",
        "the paper's tables and figures: table1, table2, figure2 to figure8",
    ),
}


def load_package(folder: Path) -> None:
    """Make this folder importable as `benchmarks`, from wherever it is run.

    The repository's root stays off sys.path: from there Python would import the sources in place of the installed
    alrao_fast, and the folder kernels/ as a package of that name.
    """
    init = folder / "__init__.py"
    spec = importlib.util.spec_from_file_location("benchmarks", init)
    assert spec is not None and spec.loader is not None
    sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["benchmarks"])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python benchmarks",
        description=__doc__,
        epilog="; ".join(f"{name}: {text}" for name, (_, text) in COMMANDS.items()),
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="options of the command")
    options = parser.parse_args()
    folder = Path(__file__).resolve().parent
    # Python has put this folder first, where its rooms would hide modules of their names.
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != folder]
    load_package(folder)
    command = importlib.import_module(f"benchmarks.{COMMANDS[options.command][0]}")
    sys.exit(command.main(options.arguments))


if __name__ == "__main__":
    main()
