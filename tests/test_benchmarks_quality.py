"""The comparison of methods, `python benchmarks quality`. Protects:

- the command from end to end: records, tables, plots; a second call trains nothing, one with more seeds trains those
  alone, two processes give the figures of one, a rival that is not installed is named and runs once it is;
- every task: parts that share nothing, batches that depend on the seed alone, a network that trains by every kind of
  method; CIFAR from files;
- early stopping: measured on the way of a run that it does not change;
- every method: a step that changes the parameters, the same start, the point of evaluation (Schedule-Free, averages,
  BatchNorm measured anew), schedules, hooks, intervals; a run by hand; diverged runs end early.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pickle
from pathlib import Path

import benchmarks_package
import pytest
import torch

import alrao_fast as alrao

benchmarks_package.load()

from benchmarks.experiments.quality.methods import METHODS  # noqa: E402
from benchmarks.experiments.quality.tasks import KINDS, SmallTask  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_command(folder: Path, *options: object) -> None:
    from benchmarks.experiments.quality.command import main

    small = ["--steps", 4, "--results", folder, "--device", "cpu"]
    main([*map(str, small), *map(str, options)])


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def no_prodigy(monkeypatch):
    from benchmarks.experiments import methods

    def version_of(package):
        return None if package == "prodigyopt" else "1"

    monkeypatch.setattr(methods, "version_of", version_of)
    return monkeypatch


def test_from_end_to_end(tmp_path, no_prodigy, capsys):
    options = [
        "--tasks",
        "digits",
        "graph",
        "--methods",
        "alrao-adam-run",
        "sgd",
        "adam",
        "prodigy",
    ]
    for seeds in (1, 1, 2):
        run_command(tmp_path, *options, "--seeds", seeds)
        found = records(tmp_path / "quality.jsonl")
        # The recipe, and on four intervals that are not its own; the grid; Adam; once, what is missing.
        assert len(found) == 2 * seeds * (1 + 4 + 8 + 1) + 1
    missing = [record for record in found if "missing" in record]
    assert [m["missing"] for m in missing] == [
        "prodigyopt is not installed: pip install prodigyopt"
    ]
    first = found[0]
    named = {"task": "digits", "method": "alrao-adam-run", "lr": None, "seed": 0, "interval": None}
    assert first["case"] == {**named, "steps": 4} and first["steps"] == 4
    assert first["test_loss"] > 0 and len(first["curve"]) == 4 and len(first["posterior"]) == 10
    text = (tmp_path / "quality.md").read_text()
    for wanted in ("pip install prodigyopt", "sources", "(1e-05, 10)", "SGD, best of grid"):
        assert wanted in text, wanted
    assert "median" in capsys.readouterr().out
    from PIL import Image

    for name in ("gaps", "profiles", "interval-alrao-adam-run"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert len(picture.convert("L").getcolors()) > 20


def test_two_processes(tmp_path):
    options = ["--tasks", "digits", "--methods", "alrao", "adam", "--seeds", 2]
    options += ["--intervals-of", "--results"]
    run_command(tmp_path, *options, tmp_path / "one")
    run_command(tmp_path, *options, tmp_path / "two", "--jobs", 2)
    one, two = (records(tmp_path / name / "quality.jsonl") for name in ("one", "two"))
    assert len(one) == 4
    for a, b in zip(one, two, strict=True):
        assert all(a[key] == b[key] for key in ("case", "test_loss", "valid_loss", "bytes"))


@pytest.mark.slow
def test_a_rival_runs_once_it_is_installed(tmp_path, no_prodigy):
    options = ["--tasks", "digits", "--seeds", 1, "--methods", "prodigy"]
    run_command(tmp_path, *options, "adam")
    no_prodigy.undo()
    pytest.importorskip("prodigyopt")
    run_command(tmp_path, *options)
    last = records(tmp_path / "quality.jsonl")[-1]
    assert last["case"]["method"] == "prodigy" and "curve" in last
    assert "missing" not in (tmp_path / "quality.md").read_text()


def test_quick_and_medium():
    from benchmarks.experiments.quality.command import parser, plan

    def cases(*options):
        return [run.case for run in plan(parser().parse_args([*options, "--device", "cpu"]))]

    quick, medium, full = cases("--quick"), cases("--medium"), cases()
    assert {case["task"] for case in quick} == {"digits", "cnn-plain", "graph"}
    assert {case["steps"] for case in quick} == {60} and {case["seed"] for case in quick} == {0}
    assert {case["task"] for case in medium} == KINDS.keys() - {"large"}
    # What has been done for the smaller is part of the larger; the large network is last, of one seed.
    assert all(case in full for case in medium) and {case["seed"] for case in full} == {0, 1, 2}
    large = [k for k, case in enumerate(full) if case["task"] == "large"]
    assert large == list(range(large[0], len(full))) and full[-1]["seed"] == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (["--seeds", "0"], "--seeds is 0; expected 1 at least"),
        (["--jobs", "0"], "--jobs is 0; expected 1 at least"),
        (["--tasks", "cifar"], "the task cifar needs --cifar PATH"),
        (["--cifar", "nowhere.d"], "nowhere.d does not exist"),
    ],
)
def test_bad_options(options, message, tmp_path, capsys):
    from benchmarks.experiments.quality.command import main

    with pytest.raises(SystemExit) as ended:
        main([*options, "--results", str(tmp_path)])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_images_from_a_file(tmp_path):
    import numpy as np

    rng = np.random.default_rng(0)
    for name, count in [*((f"data_batch_{k}", 80) for k in range(1, 6)), ("test_batch", 30)]:
        pixels = rng.integers(256, size=(count, 3072)).astype(np.uint8)
        labels = rng.integers(10, size=count).tolist()
        (tmp_path / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": labels}))
    options = ["--tasks", "cifar", "cifar-plain", "--cifar", tmp_path, "--methods", "alrao", "adam"]
    run_command(tmp_path, *options, "--seeds", 1, "--intervals-of")
    found = [record["case"] for record in records(tmp_path / "quality.jsonl")]
    assert [case["task"] for case in found] == [*["cifar"] * 2, *["cifar-plain"] * 2]


@pytest.fixture(scope="module")
def small_tasks():
    """Every task, for two steps, made once."""
    return {name: SmallTask(kind, 0, CPU, 2) for name, kind in KINDS.items()}


@pytest.mark.parametrize("name", KINDS)
def test_a_task(name, small_tasks):
    task = small_tasks[name]
    first, again, other = (list(task.batches(seed)) for seed in (0, 0, 1))
    assert len(first) == 2 == task.steps()
    assert all(a.equal(b) for a, b in zip(first[0], again[0])) and not first[0][0].equal(
        other[0][0]
    )
    assert not first[0][0].equal(first[1][0]) and len(first[0][1]) == KINDS[name].batch
    assert len(task.train[0]) == task.sizes[0] and min(task.sizes) >= 200
    # No example is in two parts, but for pieces of text that are written twice.
    parts = [task.train, task.parts["valid"], task.parts["test"]]
    rows = [{example.numpy().tobytes() for example in x} for x, _ in parts]
    shared = sum(len(a & b) for a, b in itertools.combinations(rows, 2))
    assert shared <= (5 if name in ("lstm", "transformer", "large") else 0)
    held_out = [y for _, y in parts[1:]]
    if task.regression:
        # Standardised targets: half their variance is what the mean alone leaves.
        assert all(float(y.square().mean()) / 2 == pytest.approx(0.5, abs=0.06) for y in held_out)
    else:
        assert all(0 <= int(y.min()) and int(y.max()) < task.classes for y in held_out)


def train(name: str, task: SmallTask, lr: float | None = None, **options):
    from benchmarks.experiments.quality import train as training

    return training.train(METHODS[name], task, 0, lr=lr, device=CPU, **options)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "large"])
def test_every_task_trains(name, small_tasks):
    for method, lr in (("sgd", 0.01), ("alrao-adam-run", None), ("alrao", None)):
        run = train(method, small_tasks[name], lr)
        assert run["steps"] == 2 and not run["diverged"], method
        assert 0 < run["test_loss"] < 2 * run["guess"] and run["bytes"] > 0


def test_the_large_task(small_tasks):
    net = small_tasks["large"].backbone(1.0, 0.0)
    assert sum(param.numel() for param in net.parameters()) > 2e6


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(name):
    method = METHODS[name]
    if method.missing():
        pytest.skip(method.missing())
    task = SmallTask(KINDS["resnet"], 0, CPU, 3)
    run = train(name, task, next(iter(method.grid)))
    assert run["steps"] == 3 and run["valid_loss"] is not None and len(run["curve"]) == 3
    # Parameters at least, float32; the network has more than 80,000 of them.
    assert run["bytes"] > 4 * 80_000


def test_a_run_by_hand():
    task = SmallTask(KINDS["digits"], 0, CPU, 30)
    from benchmarks.networks import PlainModel

    torch.manual_seed(0)
    net = PlainModel(task.backbone(1.0, 0.0), 256, 10)
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step, (x, y) in enumerate(task.batches(0)):
        opt.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * step / 30))
        opt.zero_grad()
        net(x, targets=y).backward()
        opt.step()
    x, y = task.parts["test"]
    with torch.no_grad():
        loss = float(torch.nn.functional.nll_loss(net(x), y))
    run = train("sgd", task, 0.1)
    assert run["test_loss"] == pytest.approx(loss, rel=1e-4) and run["steps"] == 30
    assert not run["diverged"] and run["seconds"] > 0
    # Momentum beside the parameters.
    assert run["bytes"] == 8 * sum(param.numel() for param in net.parameters())


def test_a_regression_by_hand():
    task = SmallTask(KINDS["autoencoder"], 0, CPU, 1)
    x, y = task.parts["test"]
    # Half the squares of 64 pixels, halved again: three quarters of the variance are explained.
    loss, explained = task.evaluate(lambda x: x / 2, "test")
    assert loss == pytest.approx(float(y.square().mean()) / 8) and explained == pytest.approx(75)
    trainer = make("sgd", "autoencoder", steps=1)
    x, y = next(task.batches(0))
    trained = trainer.net(x, targets=y)
    ours = (trainer.net(x) - y).square().sum() / 2 / 32
    torch.testing.assert_close(trained, ours)


def test_a_diverged_run_ends_early():
    run = train("sgd", SmallTask(KINDS["digits"], 0, CPU, 50), 1e30)
    assert run["diverged"] and run["test_loss"] is None and run["steps"] < 10


@pytest.mark.parametrize("name", ["adam", "adam-averaged", "alrao-adam-run", "schedulefree"])
def test_what_early_stopping_gives(name, monkeypatch):
    from benchmarks.experiments.quality import train as training

    if METHODS[name].missing():
        pytest.skip(METHODS[name].missing())

    def small(steps):
        task = SmallTask(KINDS["cnn"], 0, CPU, steps)
        task.parts = {part: (x[:100], y[:100]) for part, (x, y) in task.parts.items()}
        return task

    measured = train(name, task := small(20))
    stopped, curve = measured["stopped"], measured["valid_curve"]
    assert len(curve) == 10 and stopped["steps"] == 2 * (curve.index(min(curve)) + 1)
    assert stopped["valid_loss"] == pytest.approx(min(curve), rel=1e-3)
    # The run is the same one, to the bit, where nothing is measured on its way.
    monkeypatch.setattr(training.EarlyStopping, "measure", lambda *_: None)
    alone = train(name, task)
    assert all(alone[key] == measured[key] for key in ("curve", "valid_loss", "test_loss"))
    assert alone["valid_curve"] == [] and alone["stopped"] is None
    # And that of so many steps, whatever comes after them, where nothing depends on the length of the run.
    if name == "adam":
        first = train(name, small(stopped["steps"]))
        assert first["test_loss"] == stopped["test_loss"]


def test_the_recipe_learns():
    run = train("alrao-adam-run", SmallTask(KINDS["digits"], 0, CPU, 200))
    assert run["test_accuracy"] > 93


def make(name: str, task: str = "digits", steps: int = 5, **changes):
    from benchmarks.experiments.methods import Setting, build
    from benchmarks.experiments.trainer import Trainer

    method = dataclasses.replace(METHODS[name], **changes)
    small = SmallTask(KINDS[task], 0, CPU, steps)
    lr = next(iter(method.grid))
    net, opt = build(method, Setting(lr, method.lr_range, 0, total_steps=steps), small)
    return Trainer(method, net.train(), opt, small)


def steps(trainer):
    """The run; the last layer's weight after each step."""
    path = []
    for x, y in trainer.task.batches(0):
        trainer.train_step(x, y)
        path.append(trainer.net.head.weight.detach().clone())
    return path


def test_schedule_free_is_evaluated_at_its_average():
    pytest.importorskip("schedulefree")
    trainer = make("schedulefree")
    net = trainer.net
    steps(trainer)
    at_training = [param.detach().clone() for param in net.parameters()]
    with trainer.evaluation(0, 0) as evaluated:
        assert evaluated is net and not net.training
        assert not any(a.equal(b) for a, b in zip(at_training, net.parameters()))
    for before, after in zip(at_training, net.parameters()):
        torch.testing.assert_close(before, after.detach())


@pytest.mark.parametrize("name", ["adam-averaged", "alrao-adam-run"])
def test_an_average_is_evaluated(name):
    trainer = make(name, steps=3)
    path = steps(trainer)
    # Polynomial decay averaging with gamma = 8: the weights of the third average by hand.
    average = path[0]
    for t in (2, 3):
        average = average.lerp(path[t - 1], 9 / (8 + t))
    with trainer.evaluation(0, 0) as net:
        torch.testing.assert_close(net.head.weight, average)
    assert trainer.net.head.weight.equal(path[-1])


def test_the_average_is_as_dogs_authors_have_it():
    dog = pytest.importorskip("dog")
    trainer = make("dog")
    theirs = dog.PolynomialDecayAverager(trainer.net)
    for x, y in trainer.task.batches(0):
        trainer.train_step(x, y)
        theirs.step()
    with trainer.evaluation(0, 0) as net:
        for ours, other in zip(net.parameters(), theirs.averaged_model.parameters()):
            torch.testing.assert_close(ours, other)


def test_normalisation_is_measured_anew_for_an_average():
    trainer = make("adam-averaged", "cnn", steps=4)
    steps(trainer)
    with trainer.evaluation(0, 0) as net:
        norm = next(m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))
        measured = norm.running_mean.clone()
        first = next(m for m in net.modules() if isinstance(m, torch.nn.Conv2d))
        with torch.no_grad():
            means = [first(x).mean((0, 2, 3)) for x, _ in trainer.task.batches(0)]
    torch.testing.assert_close(measured, torch.stack(means).mean(0))


def test_schedules():
    from benchmarks.experiments.trainer import rate_factor

    assert [rate_factor(k, 40, 0.1, False) for k in (0, 1, 3, 4, 39)] == [0.25, 0.5, 1, 1, 1]
    assert rate_factor(20, 40, 0.1, True) == pytest.approx(0.5)
    assert rate_factor(0, 4, 0.05, False) == 1
    trainer = make("adamw", steps=40)
    rate = trainer.opt.param_groups[0]["lr"]
    seen = []
    trainer.method = dataclasses.replace(
        trainer.method,
        after_step=lambda t: seen.append((t.opt.param_groups[0]["lr"], t.done, t.total)),
    )
    steps(trainer)
    assert seen[0] == (pytest.approx(rate / 2), 1, 40) and seen[20][0] == pytest.approx(rate / 2)
    assert seen[-1][0] < 0.01 * rate and seen[-1][1:] == (40, 40)


def test_rates_of_ours():
    for name, law in (
        ("alrao", alrao.LogUniform(1e-5, 10)),
        ("unbounded", alrao.LogTriangular(1e-4, 0.1)),
    ):
        trainer = make(name)
        assert isinstance(trainer.net, alrao.AlraoModel)
        assert torch.equal(trainer.net.head.clone_lr, law.clone_rates(10))


def test_the_length_of_the_run_is_known():
    for name in ("alrao-adam-averaged", "alrao-adam-run"):
        trainer = make(name, steps=40)
        assert trainer.opt.param_groups[0]["warmup_steps"] == 2
        rates = trainer.net.head.clone_lr.clone()
        steps(trainer)
        # Narrowed to a tenth of its width, in the logarithm.
        widths = [float((r[-1] / r[0]).log()) for r in (rates, trainer.net.head.clone_lr)]
        assert widths[1] == pytest.approx(widths[0] * (0.1 if name == "alrao-adam-run" else 1))


def test_the_same_start_for_every_method():
    backbones = [make(name).net.backbone for name in ("alrao", "sgd", "muon")]
    for other in backbones[1:]:
        pairs = zip(backbones[0].parameters(), other.parameters())
        assert all(a.equal(b) for a, b in pairs)


def test_muon_takes_the_hidden_matrices():
    muon = make("muon", "transformer").opt.optimizers[1]
    shapes = {tuple(param.shape) for group in muon.param_groups for param in group["params"]}
    assert shapes == {(192, 64), (64, 64), (256, 64), (64, 256)}


@pytest.mark.parametrize("name", ["prodigy", "dog"])
def test_rates_of_one(name):
    if METHODS[name].missing():
        pytest.skip(METHODS[name].missing())
    assert [group["lr"] for group in make(name).opt.param_groups] == [1.0]
