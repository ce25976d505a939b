"""The command line of `python benchmarks quality`."""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import machine
from benchmarks.experiments.data import DataMissing, load_images, load_text
from benchmarks.experiments.methods import COMPARED, METHODS
from benchmarks.experiments.quality import plots
from benchmarks.experiments.quality.summary import Summary, all_tables, measured_on, ran, summarise
from benchmarks.experiments.quality.train import train
from benchmarks.experiments.runs import Run, check, device_of, run_all
from benchmarks.experiments.tasks import DigitsTask, ImageTask, Task, TextTask
from benchmarks.networks import IMAGE_NETWORKS
from benchmarks.results import Record, Results

# Epochs of a full and of a quick run.
EPOCHS = {"digits": (30, 8), "text": (10, 2), "cifar": (30, 2)}
FULL_SEEDS, QUICK_TOKENS, QUICK_IMAGES = 3, 30_000, 1000

DESCRIPTION = """A comparison without tuning: Alrao, with and without momentum and a decay schedule, against SGD over a
grid of learning rates, Adam, tuned AdamW, and the methods that promise to need no learning rate. Every run of a grid is
paid for. Runs are kept in RESULTS/TASK.jsonl; an interrupted command goes on with the next run."""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python benchmarks quality", description=DESCRIPTION)
    add = result.add_argument
    add("--quick", action="store_true", help="digits alone, one seed, few epochs: under a minute")
    add("--tasks", nargs="+", choices=EPOCHS, help="default: digits and text; cifar where given")
    methods = {"choices": COMPARED, "default": list(COMPARED), "help": ", ".join(COMPARED)}
    add("--methods", nargs="+", metavar="NAME", **methods)
    add("--seeds", type=int, help=f"default {FULL_SEEDS}, quick 1")
    epochs = ", ".join(f"{task} {full}" for task, (full, _) in EPOCHS.items())
    add("--epochs", type=int, help=f"default: {epochs}")
    text = "a text file or folder (default: Python's own help)"
    add("--text", type=Path, metavar="PATH", help=text)
    add("--cifar", type=Path, metavar="PATH", help="cifar-10-batches-py, or a .npz of JPEG files")
    add("--network", choices=IMAGE_NETWORKS, default="mobilenet", help="for cifar (mobilenet)")
    add("--width", type=float, default=1.0, help="factor of all layers' widths (default 1)")
    add("--train-images", type=int, metavar="N", help="fewer images of CIFAR-10")
    add("--train-tokens", type=int, metavar="N", help="fewer characters of the text")
    add("--device", type=torch.device, help="default: a GPU where there is one")
    threads = "of torch on the CPU (default 1: the networks are small)"
    add("--threads", type=int, default=1, help=threads)
    add("--results", type=Path, default=Path("results/quality"))
    return result


def main(arguments: list[str]) -> None:
    cli = parser()
    options = cli.parse_args(arguments)
    counts = ("seeds", "epochs", "threads", "train_images", "train_tokens")
    check(cli, options, counts, factors=("width",))
    torch.set_num_threads(options.threads)
    device = device_of(options)
    wanted = options.tasks or (
        ["digits"] if options.quick else ["digits", "text", *(["cifar"] if options.cifar else [])]
    )
    describe = machine.describe()
    records: list[Record] = []
    for name in dict.fromkeys(wanted):
        stem = name + ("-quick" if options.quick else "")
        results = Results(options.results / f"{stem}.jsonl", describe)
        try:
            runs = list(plan(name, options, device))
        except (DataMissing, ValueError) as problem:
            cli.exit(2, f"{cli.prog}: {problem}\n")
        records += run_all(runs, results, desc=name, labels=True)
    report(summarise(records), options, Console())


def make_task(
    name: str, options: argparse.Namespace, device: torch.device
) -> Callable[[int], Task]:
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


def plan(name: str, options: argparse.Namespace, device: torch.device) -> Iterator[Run]:
    """The runs of a task, one seed after the other, so that an interruption leaves whole seeds."""
    make = make_task(name, options, device)
    epochs = options.epochs or EPOCHS[name][1 if options.quick else 0]
    title = name if name != "cifar" else f"cifar-{options.network}"
    for seed in range(options.seeds or (1 if options.quick else FULL_SEEDS)):
        task = make(seed)
        # Where two methods have the same runs they are done once.
        names = dict.fromkeys(METHODS[method].run_name(task) for method in options.methods)
        for method in map(METHODS.__getitem__, names):
            for lr in method.grid(task):
                named = {"task": title, "method": method.name}
                case = {**named, "lr": lr, "seed": seed, "data": task.data}
                case |= {"sizes": list(task.sizes), "epochs": epochs, "width": options.width}

                start = partial(
                    train, method, lr, task, seed, epochs=epochs, width=options.width, device=device
                )
                label = f"{method.name}{'' if lr is None else f' {lr:g}'} seed {seed}"
                yield Run(label, case, epochs, start, method.missing(), named)


def report(summary: Summary, options: argparse.Namespace, console: Console) -> None:
    """Print the tables; write them and the plots."""
    written = []
    for table in all_tables(summary):
        console.print(table.rich(bold=METHODS["alrao"].label))
        written.append(table.markdown() + "\n")
    cells = [own for row in summary.values() for own in ran(row).values()]
    sources = measured_on(run for own in cells for run in own.all)
    for line in sources:
        console.print("measured on " + line, highlight=False)
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / ("quality-quick.md" if options.quick else "quality.md")
    path.write_text("\n".join([*written, *(f"Measured on {line}.\n" for line in sources)]))
    figures = plots.plot(summary, options.results / "quick" if options.quick else options.results)
    console.print("tables, plots: " + ", ".join(map(str, [path, *figures])), highlight=False)
