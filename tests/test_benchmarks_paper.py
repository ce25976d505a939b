"""The paper's experiments, `python benchmarks paper`. Protects:

- every command from end to end on a few images and a short text: records, table, plot; a second call trains nothing,
  and commands share their runs;
- a run that was interrupted goes on to the same bits, with dropout, crops and a posterior; no checkpoint is left;
- CIFAR-10 from the official batches and from JPEG files, decoded once; what is missing is said, with where to get it;
- the split of the images;
- early stopping; a diverged run; mixed precision; the step that is captured keeps loss and state as the eager one;
- the fraction of features that learn, and table 2 as integers.
"""

from __future__ import annotations

import io
import json
import pickle
import types
from pathlib import Path

import benchmarks_package
import numpy as np
import pytest
import torch

import alrao_fast as alrao

benchmarks_package.load()

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    # The layers are too small for a second thread to help.
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_images(train: int, test: int) -> dict[str, np.ndarray]:
    """Noise around a brightness that tells the class."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", train), ("test", test)):
        labels = rng.integers(10, size=count).astype(np.uint8)
        noise = rng.integers(20, size=(count, 3, 32, 32))
        arrays[f"{part}_x"] = (noise + 20 * labels[:, None, None, None]).astype(np.uint8)
        arrays[f"{part}_y"] = labels
    return arrays


@pytest.fixture(scope="module")
def jpeg_file(tmp_path_factory) -> Path:
    from PIL import Image

    arrays = {}
    made = make_images(160, 40)
    for part in ("train", "test"):
        files = []
        for pixels in made[f"{part}_x"]:
            file = io.BytesIO()
            Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "JPEG", quality=95)
            files.append(np.frombuffer(file.getvalue(), np.uint8))
        arrays[f"{part}_jpeg"] = np.concatenate(files)
        arrays[f"{part}_offsets"] = np.cumsum([0, *map(len, files)])
        arrays[f"{part}_labels"] = made[f"{part}_y"]
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("to be, or not to be: that is the question.\n" * 150)
    return path


def run_command(command: str, folder: Path, *options: object) -> None:
    from benchmarks.experiments.paper.command import main

    small = ["--seeds", 1, "--epochs", 1, "--results", folder, "--device", "cpu"]
    main([command, *map(str, small), *map(str, options)])


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


# Runs that a command adds to those of the commands before it, by the options of `small`: 3 rates, one image network.
QUICK = [
    ("table1", "vgg19", 5),
    ("table1", "lstm-chars", 5),
    ("figure2", "vgg19", 0),
    ("figure4", "vgg19", 0),
]
MORE = [
    ("table1", "lstm-words", 5),
    ("figure3", "vgg19", 3),
    ("figure4", "mobilenet", 1),
    ("figure4", "googlenet", 1),
    ("figure5", "vgg19", 1),
    ("figure6", "vgg19", 1),
    ("figure7", "vgg19", 5),
    ("figure8", "vgg19", 5),
]


@pytest.mark.parametrize(
    "commands",
    [
        pytest.param(QUICK, id="quick"),
        pytest.param([*QUICK, *MORE], id="all", marks=pytest.mark.slow),
    ],
)
def test_commands(commands, tmp_path, jpeg_file, text_file, capsys):
    for command, network, added in commands:
        run_twice(command, network, added, tmp_path, jpeg_file, text_file)
        assert "'paper' is what the paper reports" in capsys.readouterr().out, command
    assert "paper: loss, acc. %" in (tmp_path / "table1.md").read_text()


def run_twice(command, network, added, results, jpeg_file, text_file):
    def count() -> int:
        return len(records(results)) if (results / "runs.jsonl").exists() else 0

    options = ["--data", jpeg_file, "--data", text_file, "--models", network, "--width", 0.1]
    options += ["--grid", 1e-3, 1e-2, 1e-1, "--wide", 2]
    before = count()
    run_command(command, results, *options)
    assert count() - before == added, command
    run_command(command, results, *options)
    assert count() - before == added, command
    for record in records(results)[before:]:
        assert record["best_epoch"] == 1 and record["test_loss"] > 0
        assert 0 <= record["test_accuracy"] <= 100
    from PIL import Image

    with Image.open(results / f"{command}.png") as picture:
        # A picture, not a blank page.
        assert np.asarray(picture.convert("L")).std() > 5
    table = (results / f"{command}.md").read_text()
    assert network in table and table.count("|") > 20
    assert not list((results / "checkpoints").glob("*"))


def test_table1_has_the_papers_figures():
    from benchmarks.experiments.paper.tables import BEST_LR, TABLE1

    assert TABLE1["mobilenet"]["sgd"] == (0.37, 0.01, 90.2, 0.3)
    assert TABLE1["lstm-chars"]["alrao"] == (1.67, 0.01, 64.1, 0.2)
    assert BEST_LR == {"mobilenet": 0.1, "googlenet": 0.01, "vgg19": 0.1, "lstm-chars": 1}


def test_the_papers_figures_stand_beside_the_runs_they_are_of():
    from benchmarks.experiments.paper.cases import Case
    from benchmarks.experiments.paper.tables import results_table

    task = types.SimpleNamespace(classes=50, per_nat=1.0, lr_range=(1e-3, 100.0))
    record = {"valid_loss": [1.0], "test_loss": 1.0, "test_accuracy": 50.0}
    others = dict.fromkeys(("train", "valid", "test", "epochs", "patience"), 1)

    def paper(**fields):
        case = Case("lstm-chars", data="text", **others, **fields)
        return results_table("", {case: record}, {"lstm-chars": task}).rows[0][-1]

    assert paper(method="alrao", lr_range=(1e-3, 100.0)) == "1.670±0.010, 64.1±0.2"
    assert paper(method="alrao", lr_range=(1e-3, 10.0)) == ""
    assert paper(method="alrao", lr_range=(1e-3, 100.0), width=3) == ""
    assert paper(method="adam").startswith("1.587") and paper(method="adam", width=0.25)
    assert paper(method="sgd", lr=1.0).startswith("1.566") and paper(method="sgd", lr=10.0) == ""


def test_table2(tmp_path, capsys):
    from benchmarks.experiments.paper.tables import TABLE2, parameter_counts

    assert {network: parameter_counts(network) for network in TABLE2} == TABLE2
    run_command("table2", tmp_path)
    assert "2,412,212" in (tmp_path / "table2.md").read_text()


@pytest.mark.slow
def test_quick_without_images_says_what_is_left_out(tmp_path, capsys):
    run_command("table1", tmp_path, "--quick", "--train-tokens", 4000, "--grid", 1)
    assert "Left out for lack of images: mobilenet, googlenet, vgg19" in capsys.readouterr().out
    assert {record["case"]["network"] for record in records(tmp_path)} == {"lstm-chars"}


@pytest.mark.parametrize(
    "options, message",
    [
        (["figure3"], "no images. CIFAR-10 is at"),
        (["figure3", "--data", "nowhere.npz"], "nowhere.npz does not exist. CIFAR-10 is at"),
        (["figure4", "--models", "lstm-chars", "--data", "nowhere"], "Penn Treebank"),
        (["figure4", "--epochs", "0"], "--epochs is 0; expected 1"),
        (["figure4", "--lr-range", "1", "0.1"], "--lr-range is [1.0, 0.1]; expected 0 < LO"),
        (["figure4", "--cuda-graph", "--device", "cpu"], "--cuda-graph is for a CUDA device"),
        (["figure4", "--grid", "-1"], "expected rates > 0"),
    ],
)
def test_bad_input(options, message, tmp_path, capsys):
    from benchmarks.experiments.paper.command import main

    with pytest.raises(SystemExit) as stopped:
        main([*options, "--results", str(tmp_path)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def image_task(network: str, count: int = 160):
    from benchmarks.experiments.data import Images
    from benchmarks.experiments.tasks import ImageTask

    arrays = {key: torch.from_numpy(array) for key, array in make_images(count, 40).items()}
    images = Images(
        arrays["train_x"],
        arrays["train_y"].long(),
        arrays["test_x"],
        arrays["test_y"].long(),
        "made",
    )
    return ImageTask(network, images, None, CPU)


def text_task(text_file: Path):
    from benchmarks.experiments.data import load_text
    from benchmarks.experiments.tasks import TextTask

    return TextTask("lstm-chars", load_text(text_file, "chars"), None, CPU)


def make_case(task, network: str, method: str, **options):
    from benchmarks.experiments.paper.cases import Case

    train, valid, test = task.sizes
    if method.startswith("alrao"):
        options = {"lr_range": (1e-3, 1.0), "clones": 3, **options}
    options = {"epochs": 3, "patience": 20, "width": 0.1, **options}
    return Case(network, method, task.data, train, valid, test, **options)


@pytest.mark.parametrize(
    "network, method, options",
    [
        pytest.param("vgg19", "alrao", {}, marks=pytest.mark.slow),
        pytest.param("mobilenet", "alrao-adam", {"amp": "bf16"}, marks=pytest.mark.slow),
        ("lstm-chars", "alrao", {"dropout": 0.5}),
        ("lstm-chars", "adam", {"dropout": 0.5}),
        pytest.param("vgg19", "sgd", {"lr": 0.1, "amp": "fp16"}, marks=pytest.mark.slow),
    ],
)
def test_resumes_to_the_bit(network, method, options, tmp_path, text_file, monkeypatch):
    from benchmarks.experiments.paper import train as training

    task = text_task(text_file) if network == "lstm-chars" else image_task(network)
    case = make_case(task, network, method, **options)
    whole = training.train(case, task, training.Runtime(CPU, tmp_path / "whole"))

    runtime = training.Runtime(CPU, tmp_path / "parts")
    original, calls = training._save, []

    def save_and_stop(state, path):
        original(state, path)
        calls.append(path)
        if len(calls) < 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_save", save_and_stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            training.train(case, task, runtime)
    resumed = training.train(case, task, runtime)
    assert len(calls) == 3 and len(resumed["valid_loss"]) == 3
    assert resumed == whole
    ends = [torch.load(path, weights_only=True) for path in (
        tmp_path / "whole" / f"{case.key()}.pt", tmp_path / "parts" / f"{case.key()}.pt")]  # fmt: skip
    for key, value in ends[0]["net"].items():
        assert torch.equal(value, ends[1]["net"][key]), key


@pytest.mark.slow
def test_learns(tmp_path):
    from benchmarks.experiments.paper.train import Runtime, train

    task = image_task("vgg19", 800)
    case = make_case(task, "vgg19", "alrao", lr_range=(1e-4, 1.0), epochs=4, width=0.25)
    record = train(case, task, Runtime(CPU, tmp_path))
    assert record["test_accuracy"] > 50 and record["train_loss"][-1] < record["train_loss"][0]
    assert all(sum(row) == pytest.approx(1, abs=1e-3) for row in record["posterior"])
    assert record["posterior_epochs"][0] == 0 and record["posterior_epochs"][-1] == 4


@pytest.mark.slow
def test_early_stopping_and_divergence(tmp_path):
    from benchmarks.experiments.paper.train import Runtime, train

    task = image_task("vgg19")
    frozen = make_case(task, "vgg19", "fraction", p=0.5, lr=0.0, epochs=9, patience=2)
    record = train(frozen, task, Runtime(CPU, tmp_path))
    # Running statistics still move, so the loss may improve for some epochs; then two without.
    assert len(record["valid_loss"]) == min(record["best_epoch"] + 2, 9)
    wild = make_case(task, "vgg19", "sgd", lr=1e30, epochs=9)
    record = train(wild, task, Runtime(CPU, tmp_path))
    assert record["train_loss"][-1] is None and len(record["train_loss"]) < 9


def test_fraction_of_the_features(tmp_path):
    from benchmarks.experiments.paper.train import make

    task = image_task("vgg19")
    trainer = make(make_case(task, "vgg19", "fraction", p=0.5, lr=0.1, width=1.0), task, CPU)
    net, opt = trainer.net, trainer.opt
    rates = torch.cat([opt.state[p]["rate"] for p in net.backbone.parameters()])
    assert rates.unique().tolist() == pytest.approx([0.0, 0.1])
    assert 0.4 < float((rates > 0).float().mean()) < 0.6
    assert all((opt.state[p]["rate"] == rates.max()).all() for p in net.head.parameters())


def test_both_formats_and_the_cache(tmp_path, jpeg_file, monkeypatch):
    from benchmarks.experiments import data as images

    made = make_images(50, 10)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for k, name in enumerate([*images.BATCHES, "test_batch"]):
        part = slice(10 * k, 10 * k + 10) if k < 5 else slice(0, 10)
        key = "train" if k < 5 else "test"
        batch = {
            b"data": made[f"{key}_x"][part].reshape(-1, 3072),
            b"labels": made[f"{key}_y"][part].tolist(),
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    read = images.load_images(folder, tmp_path / "cache")
    assert torch.equal(read.train_x, torch.from_numpy(made["train_x"]))
    assert torch.equal(read.test_y, torch.from_numpy(made["test_y"]).long())

    decoded = images.load_images(jpeg_file, tmp_path / "cache")
    expected = torch.from_numpy(make_images(160, 40)["train_x"]).float()
    assert (decoded.train_x.float() - expected).abs().mean() < 6
    monkeypatch.setattr(images, "_decode_npz", None)
    again = images.load_images(jpeg_file, tmp_path / "cache")
    assert torch.equal(again.train_x, decoded.train_x) and again.name == decoded.name

    (folder / "test_batch").write_bytes(pickle.dumps(print))
    with pytest.raises(pickle.UnpicklingError, match="not part of a CIFAR-10 batch"):
        images.load_images(folder, tmp_path / "cache")


def test_split_of_the_images():
    task = image_task("vgg19")
    assert task.sizes == (128, 32, 40)
    held_out = {row.numpy().tobytes() for row in task.parts["valid"][0]}
    inner = task.crops.padded[:, :, 4:-4, 4:-4]
    assert held_out.isdisjoint(row.contiguous().numpy().tobytes() for row in inner)


def steps_of_both_kinds(task, device, **options):
    """Losses and final parameters of two epochs by ordinary and by captured steps."""
    from benchmarks.experiments import trainer as steps
    from benchmarks.experiments.paper.train import make

    for kind in (steps.Step, steps.CapturedStep):
        trainer = make(make_case(task, "", "alrao", width=0.2), task, device)
        net, opt = trainer.net, trainer.opt
        step = kind(net, opt, recurrent=task.recurrent, clip=task.clip, **options)
        losses = []
        for epoch in range(2):
            step.reset_state()
            net.train()
            losses += [float(step(x.to(device), y.to(device))) for x, y in task.batches(0, epoch)]
            net.eval()
        yield losses, [p.detach().clone() for p in net.parameters()]


@pytest.mark.device
@pytest.mark.parametrize("kind, amp", [("text", None), ("images", None), ("text", "bf16")])
def test_captured_step_is_the_eager_one(kind, amp, text_file, monkeypatch):
    """Without a GPU the step is run again in place of a replay: what is tested is what goes in and comes out."""
    from alrao_fast import graphed_step

    def capture(step, warm_up, steps, device):
        warm_up(steps)
        outputs = [None]

        def replay():
            outputs[0] = step()

        return replay, outputs

    class Graphed(graphed_step.GraphedStep):
        def __call__(self, inputs, targets):
            return super().__call__(inputs, targets)[0]

    monkeypatch.setattr(graphed_step, "_capture", capture)
    monkeypatch.setattr(graphed_step, "_device_of", lambda tensors: tensors[0].device)
    monkeypatch.setattr(alrao, "GraphedStep", Graphed)
    task = text_task(text_file) if kind == "text" else image_task("vgg19")
    (losses, params), (captured_losses, captured_params) = steps_of_both_kinds(task, CPU, amp=amp)
    assert losses == captured_losses and len(losses) >= 4
    assert all(torch.equal(a, b) for a, b in zip(params, captured_params))


@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("amp", [None, "bf16", "fp16"])
def test_cuda_graph(amp, text_file):
    eager, captured = steps_of_both_kinds(text_task(text_file), torch.device("cuda"), amp=amp)
    assert eager[0] == pytest.approx(captured[0], rel=1e-2)


def test_clip_bounds_the_step():
    from benchmarks.experiments.trainer import Step

    net = alrao.AlraoModel(torch.nn.Linear(4, 3), alrao.ClassifierClones(3, 2, 2))
    opt = alrao.AlraoSGD(net, sampler=alrao.Constant(1.0))
    before = [p.detach().clone() for p in net.parameters()]
    Step(net, opt, clip=0.01)(100 * torch.randn(8, 4), torch.randint(2, (8,)))
    moved = torch.stack([(a - b.detach()).norm() for a, b in zip(before, net.parameters())]).norm()
    assert float(moved) == pytest.approx(0.01, rel=1e-3)
