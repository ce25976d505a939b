"""`python benchmarks COMMAND`: see what Alrao buys and what it costs, on this machine."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path

COMMANDS = {
    "demo": "Alrao against a grid of learning rates and Adam, on scikit-learn's digits",
    "speed": "what Alrao costs: every op and whole training steps beside everything else that does the same",
    "gpu_check": "everything that a GPU can verify: tests, compute-sanitizer, speed; a result file",
    "gpu_status": "whether the committed results of a GPU are those of the present sources",
    "gpu_plots": "the figure of docs/gpu.md from its shares of the limit",
    "gpu_ceilings": "a step of gpu_check: how fast the GPU copies and multiplies",
    "gpu_exercise": "a step of gpu_check: every op against the reference",
    "scaling": "what Alrao adds to a training step on 1, 2 and 4 ranks, and how its step scales",
    "compat": "a training step of alrao_fast.compat against the loop over the last layers",
    "quality": "Alrao without tuning against tuned and tuning-free rivals, on twelve small tasks",
    "ranking": "whether alrao_fast.rank orders networks as a search over SGD's learning rates does",
    "report": "one page of tables and figures from the results of the other commands",
    "paper": "the paper's tables and figures: table1, table2, figure2 to figure8",
}
# The modules that are not named like their command: COMMAND.command.
MODULES = {
    **{name: f"experiments.{name}" for name in ("demo", "ranking")},
    **{name: f"experiments.{name}.command" for name in ("quality", "paper")},
    **{name: name.replace("_", ".") for name in COMMANDS if name.startswith("gpu_")},
    "gpu_ceilings": "roofline",
    "compat": "speed.compat",
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
        epilog="; ".join(f"{name}: {text}" for name, text in COMMANDS.items()),
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="options of the command")
    options = parser.parse_args()
    folder = Path(__file__).resolve().parent
    # Python has put this folder first, where its rooms would hide modules of their names.
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != folder]
    load_package(folder)
    module = MODULES.get(options.command, f"{options.command}.command")
    sys.exit(importlib.import_module(f"benchmarks.{module}").main(options.arguments))


if __name__ == "__main__":
    main()
