"""`python benchmarks COMMAND`: see what Alrao buys and what it costs, on this machine."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "demo": "Alrao against a grid of learning rates and Adam, on scikit-learn's digits",
    "speed": "what Alrao costs: every op and whole training steps beside everything else that does the same",
    "gpu_check": "everything that a GPU can verify: tests, compute-sanitizer, speed; a result file",
    "gpu_status": "whether the committed results of a GPU are those of the present sources",
    "compat": "a training step of alrao_fast.compat against the loop over the last layers",
    "quality": "Alrao without tuning against tuned and tuning-free rivals, on digits, text and CIFAR-10",
    "ranking": "whether alrao_fast.rank orders networks as a search over SGD's learning rates does",
    "report": "one page of tables and figures from the results of the other commands",
    "paper": "the paper's tables and figures: table1, table2, figure2 to figure8",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python benchmarks",
        description=__doc__,
        epilog="; ".join(f"{name}: {text}" for name, text in COMMANDS.items()),
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="options of the command")
    options = parser.parse_args()
    sys.exit(importlib.import_module(options.command).main(options.arguments))


main()
