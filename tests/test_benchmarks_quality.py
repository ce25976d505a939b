"""The comparison of methods, `python benchmarks quality`. Protects:

- the command from end to end on digits, text and images: records, tables, plots; a second call trains nothing, a rival
  that is not installed is a row that says so and runs once it is;
- the digits' parts are disjoint; a run by hand; diverged runs end early and are called so;
- rates are chosen on the validation set, the whole grid is paid for, gaps over the tasks, all on figures made up here;
- each rival as its authors say: the point of evaluation of Schedule-Free and DoG, rates of 1, schedules that end at 0.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import benchmarks_package
import pytest
import torch

import alrao_fast as alrao

benchmarks_package.load()

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_command(folder: Path, *options: object) -> None:
    from benchmarks.experiments.quality.command import main

    small = ["--seeds", 1, "--epochs", 1, "--results", folder, "--device", "cpu"]
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


def test_digits_end_to_end(tmp_path, no_prodigy, capsys):
    options = ["--tasks", "digits", "--methods", "alrao", "alrao-default", "sgd", "adam", "prodigy"]
    for _ in range(2):
        run_command(tmp_path, *options)
        found = records(tmp_path / "digits.jsonl")
        # Alrao's default interval is the task's own: no run of its own.
        assert len(found) == 1 + 7 + 1 + 1
    missing = next(record for record in found if "missing" in record)
    assert missing["missing"] == "prodigyopt is not installed: pip install prodigyopt"
    run = found[0]
    assert run["case"]["method"] == "alrao" and run["steps"] == 1079 // 32
    assert run["test_loss"] == run["curves"]["test_loss"][-1] > 0 and len(run["clone_rates"]) == 10
    table = (tmp_path / "quality.md").read_text()
    assert "pip install prodigyopt" in table and "sources" in table and "SGD on digits" in table
    assert "prodigyopt is not" in capsys.readouterr().out.replace("\n", " ")
    from PIL import Image

    for name in ("digits_final", "digits_curves"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert len(picture.convert("L").getcolors()) > 20


@pytest.mark.slow
def test_a_rival_runs_once_it_is_installed(tmp_path, no_prodigy):
    options = ["--tasks", "digits", "--methods", "prodigy"]
    run_command(tmp_path, *options, "--methods", "prodigy", "adam")
    no_prodigy.undo()
    pytest.importorskip("prodigyopt")
    run_command(tmp_path, *options)
    last = records(tmp_path / "digits.jsonl")[-1]
    assert last["case"]["method"] == "prodigy" and "curves" in last


@pytest.mark.slow
def test_text_and_images(tmp_path):
    import numpy as np

    text = tmp_path / "text.txt"
    text.write_text("to be, or not to be: that is the question.\n" * 150)
    rng = np.random.default_rng(0)
    folder = tmp_path / "images" / "data"
    folder.mkdir(parents=True)
    options = ["--methods", "alrao", "alrao-default", "adam", "--results", tmp_path]
    run_command(tmp_path, "--tasks", "text", "--text", text, *options)
    found = records(tmp_path / "text.jsonl")
    assert [run["case"]["method"] for run in found] == ["alrao", "alrao-default", "adam"]
    assert found[0]["lr_range"] == [1e-3, 100] and found[1]["lr_range"] == [1e-5, 10]
    assert found[0]["unit"] == "bits per character"
    batches = tmp_path / "batches"
    batches.mkdir()
    import pickle

    for name, count in [*((f"data_batch_{k}", 40) for k in range(1, 6)), ("test_batch", 20)]:
        pixels = rng.integers(256, size=(count, 3072)).astype(np.uint8)
        labels = rng.integers(10, size=count).tolist()
        (batches / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": labels}))
    run_command(tmp_path, "--tasks", "cifar", "--cifar", batches, "--width", 0.1, *options)
    found = records(tmp_path / "cifar.jsonl")
    assert [run["case"]["method"] for run in found] == ["alrao", "adam"]
    assert found[0]["case"]["task"] == "cifar-mobilenet"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--seeds", "0"], "--seeds is 0; expected 1 at least"),
        (["--width", "0"], "--width is 0.0; expected a factor > 0"),
        (["--tasks", "cifar"], "the task cifar needs --cifar PATH"),
        (["--tasks", "text", "--text", "nowhere.d"], "nowhere.d is no text file"),
    ],
)
def test_bad_options(options, message, tmp_path, capsys):
    from benchmarks.experiments.quality.command import main

    with pytest.raises(SystemExit) as ended:
        main([*options, "--results", str(tmp_path)])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_parts_of_the_digits():
    from benchmarks.experiments.tasks import DigitsTask

    task, again = DigitsTask(3, CPU), DigitsTask(3, CPU)
    assert task.x.equal(again.x) and not task.x.equal(DigitsTask(4, CPU).x)
    parts = [task.x, *(x for x, _ in task.parts.values())]
    assert [len(part) for part in parts] == [1079, 359, 359] == list(task.sizes)
    # scikit-learn's digits hold no image twice.
    assert len(torch.cat(parts).unique(dim=0)) == 1797
    first, second = (list(task.batches(3, epoch)) for epoch in (0, 1))
    assert len(first) == task.steps() == 33 and not first[0][0].equal(second[0][0])


def train(name: str, lr: float | None = None, **options):
    from benchmarks.experiments.methods import METHODS
    from benchmarks.experiments.quality.train import train
    from benchmarks.experiments.tasks import DigitsTask

    options = {"epochs": 1, "width": 0.1, "device": CPU, **options}
    return train(METHODS[name], lr, DigitsTask(0, CPU), 0, **options)


def test_a_run_by_hand():
    from benchmarks.experiments.tasks import DigitsTask
    from benchmarks.networks import PlainModel

    task = DigitsTask(0, CPU)
    torch.manual_seed(0)
    net = PlainModel(task.backbone(0.1, 0.0), 26, 10)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    for epoch in range(2):
        for x, y in task.batches(0, epoch):
            opt.zero_grad()
            net(x, targets=y).backward()
            opt.step()
    x, y = task.parts["test"]
    with torch.no_grad():
        loss = float(torch.nn.functional.nll_loss(net(x), y))
    run = train("sgd", 0.1, epochs=2)
    assert run["test_loss"] == pytest.approx(loss, rel=1e-4) and run["steps"] == 66
    assert not run["diverged"] and 0 < run["seconds"] < 60


def test_a_diverged_run_ends_early():
    run = train("sgd", 1e30, epochs=5)
    assert run["diverged"] and run["test_loss"] is None and run["steps"] == 33


def test_alrao_learns_on_digits():
    run = train("alrao", epochs=8, width=1.0)
    assert run["test_accuracy"] > 93 and len(run["curves"]["posterior"]) == 8


def fake(
    task,
    method,
    lr,
    seed,
    valid,
    test,
    *,
    diverged=False,
    per_nat=1.0,
    steps=10,
    lr_range=(1e-5, 10),
):
    case = {"task": task, "method": method, "lr": lr, "seed": seed, "data": "d", "sizes": [1, 1, 1]}
    return {
        "case": {**case, "epochs": 1, "width": 1.0},
        "curves": {"valid_loss": [valid], "test_loss": [test]},
        "test_loss": test,
        "test_accuracy": 90.0 - (test or 0),
        "diverged": diverged,
        "steps": steps,
        "seconds": 2.0,
        "unit": "nats",
        "per_nat": per_nat,
        "classes": 10,
        "lr_range": list(lr_range),
    }


def test_summary_by_hand():
    from benchmarks.experiments.quality.summary import Worst, cost, summarise, worst_cases

    runs = [
        # The better rate on the validation set is the worse one on the test set.
        *(fake("digits", "sgd", 0.1, seed, 0.5, 0.75 + seed / 4) for seed in (0, 1)),
        *(fake("digits", "sgd", 1.0, seed, 0.625, 0.125) for seed in (0, 1)),
        *(fake("digits", "sgd", 10.0, seed, None, None, diverged=True, steps=4) for seed in (0, 1)),
        *(fake("digits", "alrao", None, seed, 1.0, 0.5 + seed) for seed in (0, 1)),
        fake("text", "sgd", 0.1, 0, 1.0, 2.0, per_nat=2.0),
        fake("text", "alrao", None, 0, 1.0, 2.5, per_nat=2.0, lr_range=(1e-3, 100)),
        fake("text", "alrao-default", None, 0, 1.0, 3.0, per_nat=2.0),
        {"case": {"task": "digits", "method": "dog"}, "missing": "no dog"},
    ]
    summary = summarise(runs)
    sgd = summary["digits"]["sgd"]
    assert sgd.lr == 0.1 and sgd.loss == (0.875, pytest.approx(math.sqrt(1 / 32)))
    assert (sgd.runs, sgd.steps, sgd.seconds, sgd.seeds) == (3, 24, 6, 2)
    assert summary["digits"]["dog"] == "no dog" and "dog" not in summary["text"]
    assert summary["text"]["alrao"].loss == (5.0, 0.0)
    # On the digits the default interval is Alrao's own.
    assert summary["digits"]["alrao-default"].loss == summary["digits"]["alrao"].loss
    worst = worst_cases(summary)
    assert worst["sgd"] == Worst(0.0, 0.0)
    assert worst["alrao"] == Worst(0.5, 0.5)
    assert worst["alrao-default"] == Worst(1.0, 1.0)
    assert cost(summary)["sgd"] == (4, 34, 8)


def test_the_last_setting_counts():
    from benchmarks.experiments.quality.summary import summarise

    old = fake("digits", "alrao", None, 0, 1.0, 0.5)
    new = fake("digits", "alrao", None, 0, 1.0, 0.25)
    other = fake("digits", "adam", None, 0, 1.0, 0.5)
    other["case"]["epochs"] = 9
    assert summarise([other, old, new])["digits"].keys() == {"alrao"}
    assert summarise([old, new])["digits"]["alrao"].loss[0] == 0.25


def test_a_diverged_seed_spoils_the_mean():
    from benchmarks.experiments.quality.summary import summarise, worst_cases

    runs = [fake("digits", "alrao", None, seed, 1.0, 0.5) for seed in (0, 1)]
    runs[1] |= {"diverged": True, "test_loss": None}
    summary = summarise([*runs, fake("digits", "adam", None, 0, 1.0, 0.5)])
    assert (
        summary["digits"]["alrao"].loss[0] == math.inf and summary["digits"]["alrao"].diverged == 1
    )
    assert worst_cases(summary)["alrao"].loss == math.inf


def make(name: str, lr: float | None = None):
    from benchmarks.experiments.methods import METHODS, Setting, build
    from benchmarks.experiments.tasks import DigitsTask
    from benchmarks.experiments.trainer import Trainer

    task, method = DigitsTask(0, CPU), METHODS[name]
    net, opt = build(method, Setting(lr, task.lr_range, 0), task, width=0.1)
    return Trainer(method, net, opt, task)


def steps(trainer, count):
    """Some steps of training; the last layer's weight after each."""
    trainer.resume()
    path = []
    for x, y in list(trainer.task.batches(0, 0))[:count]:
        trainer.train_step(x, y)
        path.append(trainer.net.head.weight.detach().clone())
    return path


@pytest.mark.parametrize("name", ["schedulefree-adamw", "schedulefree-sgd"])
def test_schedule_free_is_evaluated_at_its_average(name):
    pytest.importorskip("schedulefree")
    trainer = make(name)
    net = trainer.net
    steps(trainer, 5)
    at_training = [param.detach().clone() for param in net.parameters()]
    evaluated = trainer.evaluated(0, 0)
    assert evaluated is net and not net.training
    assert not any(a.equal(b) for a, b in zip(at_training, net.parameters()))
    trainer.resume()
    assert net.training
    for before, after in zip(at_training, net.parameters()):
        torch.testing.assert_close(before, after.detach())


def test_dog_is_evaluated_at_its_average():
    pytest.importorskip("dog")
    trainer = make("dog")
    path = steps(trainer, 3)
    # Polynomial decay averaging with gamma = 8: the weights of the third average by hand.
    average = path[0]
    for t in (2, 3):
        average = average.lerp(path[t - 1], 9 / (8 + t))
    averaged = trainer.evaluated(0, 0)
    assert averaged is not trainer.net and not averaged.training
    torch.testing.assert_close(averaged.head.weight, average)


@pytest.mark.parametrize(
    "name, module", [("prodigy", "prodigyopt"), ("dadapt", "dadaptation"), ("dog", "dog")]
)
def test_rates_of_one(name, module):
    pytest.importorskip(module)
    assert [group["lr"] for group in make(name).opt.param_groups] == [1.0]


def test_alrao_and_its_schedule(monkeypatch):
    from benchmarks.experiments.quality import train as training

    kept = []
    build = training.build

    def keep(*arguments, **options):
        kept.append(build(*arguments, **options))
        return kept[-1]

    monkeypatch.setattr(training, "build", keep)
    train("alrao-momentum-cosine")
    net, opt = kept[0]
    assert isinstance(net, alrao.AlraoModel) and opt.param_groups[0]["momentum"] == 0.9
    assert opt.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    train("alrao")
    assert kept[1][1].param_groups[0]["lr"] == 1.0


def test_the_same_start_for_every_method():
    backbones = [make(name, lr).net.backbone for name, lr in (("alrao", None), ("sgd", 0.1))]
    assert all(a.equal(b) for a, b in zip(*(backbone.parameters() for backbone in backbones)))


def test_grids():
    from benchmarks.experiments.data import load_text
    from benchmarks.experiments.methods import sgd_grid
    from benchmarks.experiments.tasks import DigitsTask, TextTask

    assert sgd_grid(DigitsTask(0, CPU)) == pytest.approx([10.0**k for k in range(-5, 2)])
    text = TextTask("lstm-chars", load_text(None, "chars"), 2000, CPU)
    assert sgd_grid(text) == pytest.approx([10.0**k for k in range(-5, 3)])
