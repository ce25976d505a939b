"""The command line of `python benchmarks paper`."""

from __future__ import annotations

import argparse
from pathlib import Path

import machine
import torch
from results import Results
from rich.console import Console

from paper import plots, tables
from paper.experiments import DEFAULT_NETWORKS, EXPERIMENTS, NETWORKS, Plan
from paper.images import WHERE, DataMissing, Images, is_images, load_images
from paper.runs import run
from paper.tasks import ImageTask, Task, TextTask
from paper.text import load_text
from paper.training import Runtime

QUICK_IMAGES, QUICK_TOKENS, QUICK_WIDTH, QUICK_EPOCHS = 2000, 100_000, 0.25, 3
FULL_EPOCHS = {"figure3": 30}
MOST_EPOCHS, FULL_SEEDS = 200, 3

DESCRIPTION = """The experiments of the Alrao paper (arXiv 1810.01322): trains what the table or figure needs, prints a
table with the paper's own figures beside ours, and plots. Runs are kept in RESULTS/runs.jsonl and shared between the
commands; an interrupted command goes on where it stopped, to the bit."""


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python benchmarks paper", description=DESCRIPTION)
    add = result.add_argument
    add("experiment", choices=["table2", *EXPERIMENTS])
    add(
        "--quick",
        action="store_true",
        help="small data, a quarter of the width, few epochs: minutes on a CPU",
    )
    add(
        "--data",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="CIFAR-10 (cifar-10-batches-py, or a .npz of JPEG files), or a text file or folder; twice for both",
    )
    add(
        "--models",
        nargs="+",
        choices=NETWORKS,
        help="default: the paper's, as far as there is data",
    )
    add("--seeds", type=int, help=f"runs of each setting (default {FULL_SEEDS}, quick 1)")
    add(
        "--epochs",
        type=int,
        help=f"at most (default {MOST_EPOCHS}, figure3 30, quick {QUICK_EPOCHS})",
    )
    add(
        "--patience",
        type=int,
        default=20,
        help="epochs without a better validation loss (default 20)",
    )
    add("--width", type=float, help="factor of all widths (default 1)")
    add("--wide", type=float, default=3.0, help="figure8: the factor to compare with (default 3)")
    add("--dropout", type=float, default=0.0, help="of the LSTM (default 0)")
    add(
        "--train-images",
        type=int,
        metavar="N",
        help="fewer images; a quarter of them for validation, and for test",
    )
    add(
        "--train-tokens",
        type=int,
        metavar="N",
        help="fewer tokens; an eighth of them for validation, and for test",
    )
    add(
        "--grid",
        type=float,
        nargs="+",
        metavar="LR",
        help="SGD's rates (default: powers of ten over the interval)",
    )
    add(
        "--lr-range",
        type=float,
        nargs=2,
        metavar=("LO", "HI"),
        help="Alrao's interval (default: the paper's)",
    )
    add("--clones", type=int, help="Alrao's clones (default: the paper's, 10 and 6)")
    add("--device", type=torch.device, help="default: a GPU where there is one")
    add("--amp", choices=["bf16", "fp16"], help="automatic mixed precision")
    add("--cuda-graph", action="store_true", help="run Alrao's training step as one CUDA graph")
    add("--threads", type=int, help="of torch on the CPU")
    add("--results", type=Path, default=Path("results/paper"))
    return result


def main(arguments: list[str]) -> None:
    cli = parser()
    options = cli.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console(width=None)
    if options.experiment == "table2":
        table = tables.table2()
        tables.write(table, options.results / "table2.md")
        console.print(table)
        return
    _check(cli, options)
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.cuda_graph and device.type != "cuda":
        cli.error(f"--cuda-graph is for a CUDA device; this run is on {device}")
    try:
        tasks = _load(options, device, console)
    except (DataMissing, ValueError) as problem:
        cli.exit(2, f"{cli.prog}: {problem}\n")
    results = Results(options.results / "runs.jsonl", machine.describe())
    runtime = Runtime(device, options.results / "checkpoints", options.cuda_graph)
    plans = [_plan(options, network, task) for network, task in tasks.items()]
    cases = [case for plan in plans for case in EXPERIMENTS[options.experiment](plan)]
    records = run(cases, tasks, results, runtime)

    name = options.experiment + ("-quick" if options.quick else "")
    table = tables.results_table(name, records, tasks)
    console.print(table)
    console.print(
        "'paper' is what the paper reports, at full size on CIFAR-10 and the Penn Treebank. Measured on:"
    )
    for line in sorted({_measured_on(record["machine"]) for record in records.values()}):
        console.print("  " + line, highlight=False)
    tables.write(table, options.results / f"{name}.md")
    plots.plot(options.experiment, records, tasks, options.results / f"{name}.png")
    console.print(f"table and plot: {options.results / name}.md, .png; runs: {results.path}")


def _check(cli: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for name in (
        "seeds",
        "epochs",
        "patience",
        "clones",
        "threads",
        "train_images",
        "train_tokens",
    ):
        value = getattr(options, name)
        if value is not None and value < 1:
            cli.error(f"--{name.replace('_', '-')} is {value}; expected 1 at least")
    for name in ("width", "wide"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            cli.error(f"--{name} is {value}; expected a factor > 0")
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
    networks = options.models or DEFAULT_NETWORKS[options.experiment]
    pictured = [network for network in networks if not network.startswith("lstm")]
    if pictured and images_at is None:
        text_models = [network for network in networks if network.startswith("lstm")]
        if options.models or not text_models:
            raise DataMissing(
                f"{', '.join(pictured)}: no images. {WHERE}. Without them, --models lstm-chars runs on text"
            )
        console.print(
            f"Left out for lack of images: {', '.join(pictured)}. {WHERE}", highlight=False
        )
        networks = text_models
    images: Images | None = None
    tasks: dict[str, Task] = {}
    for network in networks:
        if network in pictured:
            assert images_at is not None
            images = images or load_images(images_at, options.results / "data")
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
    return Plan(
        network=network,
        task=task,
        seeds=options.seeds or (1 if quick else FULL_SEEDS),
        epochs=options.epochs or (QUICK_EPOCHS if quick else full_epochs),
        patience=options.patience,
        width=options.width or (QUICK_WIDTH if quick else 1.0),
        widths=(1.0, options.wide),
        dropout=options.dropout if task.recurrent else 0.0,
        amp=options.amp,
        # Every other rate will do for a first look.
        grid=options.grid or (task.grid[::2] if quick else task.grid),
        lr_range=tuple(options.lr_range) if options.lr_range else task.lr_range,
        clones=options.clones or task.clones,
    )


def _measured_on(record: dict[str, object]) -> str:
    return (
        f"{record['gpu'] or record['cpu']}, torch {record['torch']}, sources {record['sources']}, "
        f"commit {record['commit']}"
    )
