"""The command line of `python benchmarks paper`."""

import argparse
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import machine
from benchmarks.experiments.data import WHERE, DataMissing, is_images, load_images, load_text
from benchmarks.experiments.paper import plots, tables
from benchmarks.experiments.paper.cases import EXPERIMENTS, NETWORKS, Case, Plan
from benchmarks.experiments.paper.train import Runtime, train
from benchmarks.experiments.runs import Run, check, device_of, run_all
from benchmarks.experiments.tasks import ImageTask, Task, TextTask
from benchmarks.results import Record, Results
from benchmarks.show import save, write

QUICK_IMAGES, QUICK_TOKENS, QUICK_WIDTH, QUICK_EPOCHS = 2000, 100_000, 0.25, 3
FULL_EPOCHS = {"figure3": 30}
MOST_EPOCHS, FULL_SEEDS = 200, 3

DESCRIPTION = """The experiments of the Alrao paper (arXiv 1810.01322): trains what the table or figure needs, prints a
table with the paper's own figures beside ours, and plots. Runs are kept in RESULTS/runs.jsonl and shared between the
commands; an interrupted command goes on where it stopped, to the bit."""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python benchmarks paper", description=DESCRIPTION)
    result.add_argument("experiment", choices=["table2", *EXPERIMENTS])

    def add(name: str, text: str | None, **options: object) -> None:
        result.add_argument(name, help=text, **options)

    data = "CIFAR-10 (cifar-10-batches-py, or a .npz of JPEG files), or a text file or folder; twice for both"
    epochs = f"at most (default {MOST_EPOCHS}, figure3 30, quick {QUICK_EPOCHS})"
    images = "fewer images; a quarter of them for validation, and for test"
    tokens = "fewer tokens; an eighth of them for validation, and for test"
    grid = "SGD's rates (default: powers of ten over the interval)"
    interval = "Alrao's interval (default: the paper's)"
    quick = "small data, a quarter of the width, few epochs: minutes on a CPU"
    add("--quick", quick, action="store_true")
    add("--data", data, type=Path, action="append", default=[], metavar="PATH")
    add("--models", "default: the paper's, as far as there is data", nargs="+", choices=NETWORKS)
    add("--seeds", f"runs of each setting (default {FULL_SEEDS}, quick 1)", type=int)
    add("--epochs", epochs, type=int)
    add("--patience", "epochs without a better validation loss (default 20)", type=int, default=20)
    add("--width", "factor of all widths (default 1)", type=float)
    add("--wide", "figure8: the factor to compare with (default 3)", type=float, default=3.0)
    add("--dropout", "of the LSTM (default 0)", type=float, default=0.0)
    add("--train-images", images, type=int, metavar="N")
    add("--train-tokens", tokens, type=int, metavar="N")
    add("--grid", grid, type=float, nargs="+", metavar="LR")
    add("--lr-range", interval, type=float, nargs=2, metavar=("LO", "HI"))
    add("--clones", "Alrao's clones (default: the paper's, 10 and 6)", type=int)
    add("--device", "default: a GPU where there is one", type=torch.device)
    add("--amp", "automatic mixed precision", choices=["bf16", "fp16"])
    add("--cuda-graph", "run Alrao's training step as one CUDA graph", action="store_true")
    add("--threads", "of torch on the CPU", type=int)
    add("--results", None, type=Path, default=Path("results/paper"))
    return result


def main(arguments: list[str]) -> None:
    cli = parser()
    options = cli.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console(width=None)
    if options.experiment == "table2":
        table = tables.table2().rich(whole=True, plain=True)
        write(table, options.results / "table2.md")
        console.print(table)
        return
    _check(cli, options)
    device = device_of(options)
    if options.cuda_graph and device.type != "cuda":
        cli.error(f"--cuda-graph is for a CUDA device; this run is on {device}")
    try:
        tasks = _load(options, device, console)
    except (DataMissing, ValueError) as problem:
        cli.exit(2, f"{cli.prog}: {problem}\n")
    results = Results(options.results / "runs.jsonl", machine.describe())
    runtime = Runtime(device, options.results / "checkpoints", options.cuda_graph)
    plans = [_plan(options, network, task) for network, task in tasks.items()]
    cases = [case for plan in plans for case in EXPERIMENTS[options.experiment].cases(plan)]
    records = run(cases, tasks, results, runtime)

    name = options.experiment + ("-quick" if options.quick else "")
    table = tables.results_table(name, records, tasks).rich(words=2, whole=True, plain=True)
    console.print(table)
    console.print(
        "'paper' is what the paper reports, at full size on CIFAR-10 and the Penn Treebank. Measured on:"
    )
    for line in sorted({_measured_on(record["machine"]) for record in records.values()}):
        console.print("  " + line, highlight=False)
    write(table, options.results / f"{name}.md")
    draw = plots.PLOTS.get(options.experiment, plots.learning_curves)
    save(draw(records, tasks), options.results / f"{name}.png")
    console.print(f"table and plot: {options.results / name}.md, .png; runs: {results.path}")


def run(
    cases: list[Case], tasks: dict[str, Task], results: Results, runtime: Runtime
) -> dict[Case, Record]:
    """The record of every case, in the order given; what was interrupted goes on from its checkpoint."""

    def wanted(case: Case) -> Run:
        start = partial(train, case, tasks[case.network], runtime)
        done = partial(runtime.checkpoint(case).unlink, missing_ok=True)
        return Run(case.title(), case.record(), case.epochs, start, done=done)

    cases = list(dict.fromkeys(cases))
    return dict(zip(cases, run_all(list(map(wanted, cases)), results, desc="runs")))


def _check(cli: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    counts = ("seeds", "epochs", "patience", "clones", "threads", "train_images", "train_tokens")
    check(cli, options, counts, factors=("width", "wide"))
    if not 0 <= options.dropout < 1:
        cli.error(f"--dropout is {options.dropout}; expected a probability below 1")
    if any(not 0 < rate < float("inf") for rate in options.grid or ()):
        cli.error(f"--grid is {options.grid}; expected rates > 0")
    if options.lr_range and not 0 < options.lr_range[0] <= options.lr_range[1] < float("inf"):
        cli.error(f"--lr-range is {options.lr_range}; expected 0 < LO <= HI")


def _load(options: argparse.Namespace, device: torch.device, console: Console) -> dict[str, Task]:
    """A task for each network to train; those of the default that lack data are left out with a line."""
    images_at = next((path for path in options.data if is_images(path)), None)
    text_at = next((path for path in options.data if not is_images(path)), None)
    networks = options.models or EXPERIMENTS[options.experiment].networks
    of_text = [network for network in networks if network.startswith("lstm")]
    pictured = [network for network in networks if network not in of_text]
    if pictured and images_at is None:
        names = ", ".join(pictured)
        if options.models or not of_text:
            raise DataMissing(
                f"{names}: no images. {WHERE}. Without them, --models lstm-chars runs on text"
            )
        console.print(f"Left out for lack of images: {names}. {WHERE}", highlight=False)
        networks = of_text
    elif pictured:
        images = load_images(images_at, options.results / "data")
    tasks: dict[str, Task] = {}
    for network in networks:
        if network in pictured:
            count = options.train_images or (QUICK_IMAGES if options.quick else None)
            tasks[network] = ImageTask(network, images, count, device)
        else:
            text = load_text(text_at, network.removeprefix("lstm-"))
            count = options.train_tokens or (QUICK_TOKENS if options.quick else None)
            tasks[network] = TextTask(network, text, count, device)
    return tasks


def _plan(options: argparse.Namespace, network: str, task: Task) -> Plan:
    quick = options.quick
    full_epochs = FULL_EPOCHS.get(options.experiment, MOST_EPOCHS)
    base = Case(
        network,
        "alrao",
        task.data,
        *task.sizes,
        epochs=options.epochs or (QUICK_EPOCHS if quick else full_epochs),
        patience=options.patience,
        width=options.width or (QUICK_WIDTH if quick else 1.0),
        dropout=options.dropout if task.recurrent else 0.0,
        amp=options.amp,
        lr_range=tuple(options.lr_range) if options.lr_range else task.lr_range,
        clones=options.clones or task.clones,
    )
    seeds = options.seeds or (1 if quick else FULL_SEEDS)
    # Every other rate will do for a first look.
    grid = options.grid or (task.grid[::2] if quick else task.grid)
    return Plan(base, seeds, (1.0, options.wide), grid)


def _measured_on(record: Record) -> str:
    fields = "torch {torch}, sources {sources}, commit {commit}".format(**record)
    return f"{record['gpu'] or record['cpu']}, {fields}"
