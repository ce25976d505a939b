"""The command line of `python benchmarks quality`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import machine
import torch
from networks import IMAGE_NETWORKS
from paper.images import DataMissing, load_images
from paper.tasks import ImageTask, Task, TextTask
from paper.text import load_text
from results import Results
from rich.console import Console
from tqdm import tqdm

from quality import plots, tables
from quality.digits import DigitsTask
from quality.methods import METHODS, Method
from quality.summary import Cell, Summary, measured_on, summarise
from quality.training import train

# Epochs of a full and of a quick run.
EPOCHS = {"digits": (30, 8), "text": (10, 2), "cifar": (30, 2)}
FULL_SEEDS, QUICK_TOKENS, QUICK_IMAGES = 3, 30_000, 1000

DESCRIPTION = """A comparison without tuning: Alrao, with and without momentum and a decay schedule, against SGD over a
grid of learning rates, Adam, tuned AdamW, and the methods that promise to need no learning rate. Every run of a grid is
paid for. Runs are kept in RESULTS/TASK.jsonl; an interrupted command goes on with the next run."""


class Plan(NamedTuple):
    """One run that the command wants."""

    method: Method
    lr: float | None
    task: Task
    case: dict[str, Any]


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python benchmarks quality", description=DESCRIPTION)
    add = result.add_argument
    add("--quick", action="store_true", help="digits alone, one seed, few epochs: under a minute")
    add("--tasks", nargs="+", choices=EPOCHS, help="default: digits and text; cifar where given")
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="NAME",
        help=", ".join(METHODS),
    )
    add("--seeds", type=int, help=f"default {FULL_SEEDS}, quick 1")
    add(
        "--epochs", type=int, help="default: " + ", ".join(f"{t} {e[0]}" for t, e in EPOCHS.items())
    )
    add(
        "--text",
        type=Path,
        metavar="PATH",
        help="a text file or folder (default: Python's own help)",
    )
    add("--cifar", type=Path, metavar="PATH", help="cifar-10-batches-py, or a .npz of JPEG files")
    add("--network", choices=IMAGE_NETWORKS, default="mobilenet", help="for cifar (mobilenet)")
    add("--width", type=float, default=1.0, help="factor of all layers' widths (default 1)")
    add("--train-images", type=int, metavar="N", help="fewer images of CIFAR-10")
    add("--train-tokens", type=int, metavar="N", help="fewer characters of the text")
    add("--device", type=torch.device, help="default: a GPU where there is one")
    add(
        "--threads",
        type=int,
        default=1,
        help="of torch on the CPU (default 1: the networks are small)",
    )
    add("--results", type=Path, default=Path("results/quality"))
    return result


def main(arguments: list[str]) -> None:
    cli = parser()
    options = cli.parse_args(arguments)
    for name in ("seeds", "epochs", "threads", "train_images", "train_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            cli.error(f"--{name.replace('_', '-')} is {value}; expected 1 at least")
    if not 0 < options.width < float("inf"):
        cli.error(f"--width is {options.width}; expected a factor > 0")
    torch.set_num_threads(options.threads)
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console()
    wanted = options.tasks or (
        ["digits"] if options.quick else ["digits", "text", *(["cifar"] if options.cifar else [])]
    )
    describe = machine.describe()
    files: dict[str, Results] = {}
    records: list[dict[str, Any]] = []
    for name in dict.fromkeys(wanted):
        stem = name + ("-quick" if options.quick else "")
        files[name] = Results(options.results / f"{stem}.jsonl", describe)
        try:
            plans = list(plan(name, options, device))
        except (DataMissing, ValueError) as problem:
            cli.exit(2, f"{cli.prog}: {problem}\n")
        records += run(name, plans, files[name], options, device)
    report(summarise(records), options, console)


def make_task(name: str, options: argparse.Namespace, device: torch.device) -> Any:
    """A function from the seed to the task; only the digits' split depends on it."""
    if name == "digits":
        return partial(DigitsTask, device=device)
    if name == "text":
        tokens = options.train_tokens or (QUICK_TOKENS if options.quick else None)
        text = load_text(options.text, "chars")
        task: Task = TextTask("lstm-chars", text, tokens, device)
    else:
        if options.cifar is None:
            raise DataMissing("the task cifar needs --cifar PATH")
        images = load_images(options.cifar, options.results / "data")
        count = options.train_images or (QUICK_IMAGES if options.quick else None)
        task = ImageTask(options.network, images, count, device)
    return lambda seed: task


def plan(name: str, options: argparse.Namespace, device: torch.device) -> Iterator[Plan]:
    """The runs of a task, one seed after the other, so that an interruption leaves whole seeds."""
    make = make_task(name, options, device)
    epochs = options.epochs or EPOCHS[name][1 if options.quick else 0]
    for seed in range(options.seeds or (1 if options.quick else FULL_SEEDS)):
        task = make(seed)
        chosen = [METHODS[method] for method in options.methods]
        # Where two methods have the same runs they are done once.
        for method in dict.fromkeys(METHODS[method.run_name(task)] for method in chosen):
            for lr in method.grid(task):
                case = {
                    "task": name if name != "cifar" else f"cifar-{options.network}",
                    "method": method.run_name(task),
                    "lr": lr,
                    "seed": seed,
                    "data": task.data,
                    "sizes": list(task.sizes),
                    "epochs": epochs,
                    "width": options.width,
                }
                yield Plan(method, lr, task, case)


def run(
    name: str,
    plans: list[Plan],
    results: Results,
    options: argparse.Namespace,
    device: torch.device,
) -> list[dict[str, Any]]:
    """The records of all runs; those that have one, from whatever machine, are not run again."""
    records = []
    with tqdm(total=len(plans), unit="run", desc=name) as bar:
        for method, lr, task, case in plans:
            label = f"{method.name}{'' if lr is None else f' {lr:g}'} seed {case['seed']}"
            bar.set_description(f"{name}: {label}")
            record = results.find(case, any_machine=True)
            reason = method.missing() if record is None else None
            if reason is not None:
                short = {"task": case["task"], "method": case["method"]}
                known = results.find(short, any_machine=True)
                if known is None or known["missing"] != reason:
                    known = results.append(short, missing=reason)
                record = known
            elif record is None:
                with tqdm(total=case["epochs"], unit="epoch", desc=label, leave=False) as epochs:
                    values = train(
                        method,
                        lr,
                        task,
                        case["seed"],
                        epochs=case["epochs"],
                        width=options.width,
                        device=device,
                        bar=epochs,
                    )
                values |= {"unit": task.unit, "per_nat": task.per_nat, "classes": task.classes}
                values["lr_range"] = list(method.lr_range or task.lr_range)
                record = results.append(case, **values)
            records.append(record)
            bar.update()
    return records


def report(summary: Summary, options: argparse.Namespace, console: Console) -> None:
    """Print the tables; write them and the plots."""
    written = []
    for table in tables.all_tables(summary):
        console.print(table.rich())
        written.append(table.markdown())
    cells = [own for row in summary.values() for own in row.values()]
    runs = [run for own in cells if isinstance(own, Cell) for run in own.all]
    sources = measured_on(runs)
    for line in sources:
        console.print("measured on " + line, highlight=False)
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / ("quality-quick.md" if options.quick else "quality.md")
    path.write_text("\n".join([*written, *(f"Measured on {line}.\n" for line in sources)]))
    figures = plots.plot(summary, options.results / "quick" if options.quick else options.results)
    console.print("tables, plots: " + ", ".join(map(str, [path, *figures])), highlight=False)
