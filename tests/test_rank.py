"""Protects alrao_fast.rank:

- its order and figures: they are those of a training loop written out here, and sorted by the best validation loss;
- every kind of candidate: backbones, recurrent ones with extras, whole models, regression, several inputs;
- what is said about bad arguments, before anything is trained; the caller's random state; early stopping.
"""

import copy
import math
import statistics
import subprocess
import sys

import pytest
import torch
from torch import nn

import alrao_fast as alrao


def batches(seed, count=4, size=16):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count * size, 6, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 0).long()
    return list(zip(x.split(size), y.split(size)))


TRAIN, VALID = batches(0), batches(1)


def mlp(width):
    return nn.Sequential(nn.Linear(6, width), nn.ReLU())


def blind():
    """Features without any information: at best the classes' frequencies are learnt."""
    return nn.Sequential(nn.Linear(6, 4), nn.Threshold(math.inf, 0.0))


def rank(models, train=TRAIN, valid=VALID, **options):
    options = {"num_classes": 3, "epochs": 3, "progress": False, "device": "cpu", **options}
    return alrao.rank(models, train, valid, **options)


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_is_the_loop_written_out(max_norm):
    row = rank({"mlp": lambda: mlp(8)}, epochs=2, clip_grad_norm=max_norm)[0]
    torch.manual_seed(0)
    net = alrao.AlraoModel(mlp(8), alrao.ClassifierClones(8, 3))
    opt = alrao.AlraoSGD(net, generator=torch.Generator().manual_seed(0))
    for epoch in range(2):
        net.train()
        for x, y in TRAIN:
            opt.zero_grad()
            net(x, targets=y).backward()
            if max_norm:
                alrao.clip_grad_norm_(net, max_norm)
            opt.step()
        net.eval()
        with torch.no_grad():
            loss = statistics.fmean(float(net(x, targets=y)) for x, y in VALID)
        assert row.runs[0].valid_loss[epoch] == pytest.approx(loss, rel=1e-6)
    assert row.parameters == 6 * 8 + 8 + 8 * 3 + 3
    assert row.alrao_parameters == row.parameters + 9 * (8 * 3 + 3)
    if row.runs[0].best_epoch == 2:
        assert row.suggested_lr == pytest.approx(net.suggested_lr())


def test_order_and_seeds():
    ranking = rank({"blind": blind, "mlp": lambda: mlp(32)}, epochs=40, seeds=(3, 5, 8))
    assert [row.name for row in ranking] == ["mlp", "blind"]
    assert [run.seed for run in ranking[0].runs] == [3, 5, 8]
    best = [min(run.valid_loss) for run in ranking[0].runs]
    assert [run.loss for run in ranking[0].runs] == best
    assert ranking[0].loss == pytest.approx(statistics.fmean(best))
    assert ranking[0].spread == pytest.approx(statistics.stdev(best))
    assert 1e-5 <= ranking[0].suggested_lr <= 10
    assert ranking[0].accuracy > ranking[1].accuracy
    lines = str(ranking).splitlines()
    assert len(lines) == 3 and lines[1].split()[:2] == ["1", "mlp"] and "+-" in lines[1]


def test_repeats_and_leaves_the_random_state():
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*(torch.cat(part) for part in zip(*TRAIN))),
        batch_size=16,
        shuffle=True,
    )
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = rank({"a": lambda: nn.Sequential(mlp(8), nn.Dropout(0.5))}, loader)
    assert torch.get_rng_state().equal(before)
    torch.rand(5)
    again = rank(
        {"other": lambda: mlp(3), "a": lambda: nn.Sequential(mlp(8), nn.Dropout(0.5))}, loader
    )
    same = next(row for row in again if row.name == "a")
    assert same.runs[0].valid_loss == first[0].runs[0].valid_loss


class Recurrent(nn.Module):
    """Tokens [T, B], and a number to add -> (features [T, B, 5], state)."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 5)
        self.gru = nn.GRU(5, 5)

    def forward(self, tokens, shift):
        features, state = self.gru(self.embedding(tokens) + shift)
        return features, state


def test_recurrent_with_two_inputs_and_clipping():
    tokens = torch.arange(60).view(20, 3) % 4
    data = [(tokens[:-1], torch.zeros(1), tokens[1:])]
    row = rank(
        {"gru": Recurrent},
        data,
        data,
        num_classes=4,
        lr_range=(1e-3, 10),
        clip_grad_norm=0.25,
        epochs=15,
    )[0]
    assert row.runs[0].valid_loss[-1] < row.runs[0].valid_loss[0] < 2
    assert row.accuracy > 50


def test_ignored_targets_do_not_count():
    x, y = VALID[0]
    padded = [(x, torch.where(torch.arange(len(y)) < 5, y, -100))]
    short = [(x[:5], y[:5])]
    losses = [rank({"a": lambda: mlp(4)}, TRAIN, part)[0].loss for part in (padded, short)]
    assert losses[0] == pytest.approx(losses[1])


def test_regression():
    data = [(x, x[:, :2] * 2.0) for x, _ in TRAIN]
    ranking = rank(
        {
            "mlp": lambda: mlp(32),
            "blind": blind,
        },
        data,
        data[:2] + [(data[2][0][:3], data[2][1][:3])],
        num_classes=None,
        head=lambda features: alrao.RegressorClones(features, 2, 4),
        epochs=10,
    )
    assert [row.name for row in ranking] == ["mlp", "blind"] and ranking[0].accuracy is None


def test_whole_models_and_another_optimizer():
    seen = []

    def optimizer(net, generator):
        seen.append(generator.initial_seed())
        return alrao.AlraoAdam(net, (1e-5, 1e-1), generator=generator)

    def model():
        return alrao.AlraoModel(mlp(8), alrao.ClassifierClones(8, 3, 4))

    row = rank({"a": model}, num_classes=None, optimizer=optimizer, seeds=[4])[0]
    assert set(seen) == {4} and row.alrao_parameters - row.parameters == 3 * (8 * 3 + 3)


def test_patience():
    # Validation on other labels gets worse as training goes on.
    wrong = [(x, (y + 1) % 3) for x, y in TRAIN]
    run = rank({"a": lambda: mlp(16)}, TRAIN, wrong, epochs=50, patience=2)[0].runs[0]
    assert len(run.valid_loss) == run.best_epoch + 2 < 50


def test_a_candidate_that_overflows_comes_last():
    class Overflowing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x):
            return self.layer(x) * (1.0 if self.training else math.inf)

    ranking = rank({"bad": Overflowing, "good": lambda: mlp(4)})
    assert [row.name for row in ranking] == ["good", "bad"]
    assert ranking[1].loss == math.inf and "diverged" in str(ranking)


class Empty(nn.Module):
    def __init__(self):
        raise KeyError("missing")


OTHER = nn.Linear(1, 1)
X, Y = VALID[0]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"models": {3: lambda: mlp(4)}}, TypeError, "models: got the name 3, expected names that"),
        ({"models": {"a": Empty}}, ValueError, r"models\['a'\]: the function failed: 'missing'"),
        (
            {"optimizer": torch.optim.SGD},
            TypeError,
            "optimizer: got <class 'torch.optim.sgd.SGD'>, expected a function",
        ),
        (
            {"optimizer": alrao.AlraoMuon},
            ValueError,
            r"models\['a'\]: optimizer\(model, generator\) failed: lr_range: got <torch",
        ),
        (
            {"optimizer": lambda net, generator: None},
            TypeError,
            r"optimizer: returned None for models\['a'\], expected an AlraoSGD, AlraoAdam or AlraoMuon",
        ),
        (
            {"optimizer": lambda net, generator: alrao.AlraoSGD(OTHER)},
            ValueError,
            r"optimizer: has parameters that models\['a'\] has not",
        ),
        (
            {"optimizer": lambda net, generator: torch.optim.SGD(net.parameters(), lr=0.1)},
            ValueError,
            r"optimizer: gives the clones of models\['a'\] no rates",
        ),
        ({"optimizer": "sgd"}, TypeError, "optimizer: got 'sgd', expected a function"),
        (
            {"clip_grad_norm": -1},
            ValueError,
            "clip_grad_norm: got -1, expected a norm > 0, or None",
        ),
        ({"clip_grad_norm": math.nan}, ValueError, "clip_grad_norm: got nan"),
        ({"clip_grad_norm": "1"}, TypeError, "clip_grad_norm: got '1'"),
        ({"patience": math.nan}, TypeError, "patience: got nan, expected an integer, at least 1"),
        ({"epochs": 2.5}, TypeError, "epochs: got 2.5, expected an integer"),
        ({"epochs": "3"}, TypeError, "epochs: got '3'"),
        ({"seeds": [2**32]}, ValueError, r"seeds\[0\]: got 4294967296, expected an integer from 0"),
        ({"seeds": [0, -1]}, ValueError, r"seeds\[1\]: got -1"),
        ({"seeds": [0.5]}, TypeError, r"seeds\[0\]: got 0.5"),
        ({"seeds": "12"}, TypeError, "seeds: got '12', expected how many, or the seeds"),
        ({"seeds": 2.5}, TypeError, "seeds: got 2.5"),
        ({"seeds": True}, TypeError, "seeds: got True"),
        ({"seeds": [1, 2, 1]}, ValueError, r"seeds: got \[1, 2, 1\], expected each once"),
        ({"device": "nowhere"}, ValueError, "device: got 'nowhere', expected a torch.device"),
        ({"device": 1.5}, TypeError, "device: got 1.5, expected a torch.device"),
        ({"progress": "no"}, TypeError, "progress: got 'no', expected True or False"),
        ({"num_classes": 2.5}, TypeError, "num_classes: got 2.5"),
        (
            {"num_classes": None, "head": alrao.ClassifierClones(4, 3)},
            TypeError,
            "head: got a ClassifierClones, expected a function D -> ClassifierClones",
        ),
        (
            {"num_classes": None, "head": lambda features: nn.Linear(features, 3)},
            ValueError,
            r"models\['a'\]: head\(4\) failed: head: got Linear",
        ),
        ({"train": [{"x": X, "y": Y}]}, TypeError, "train: a batch is a dict, expected"),
        ({"valid": [{"x": X, "y": Y}]}, TypeError, "valid: a batch is a dict, expected"),
        ({"valid": [()]}, TypeError, "valid: a batch has 0 entries, expected"),
        ({"train": [(X[:0], Y[:0])]}, ValueError, "train: a batch is empty"),
        ({"valid": [(X[:0], Y[:0])]}, ValueError, "valid: a batch is empty"),
        (
            {"valid": [(X[:, :2], Y)]},
            ValueError,
            r"models\['a'\]: validation failed on the first batch of valid: mat1 and mat2",
        ),
        (
            {"valid": [(X, Y + 9)]},
            ValueError,
            r"models\['a'\]: validation failed on the first batch of valid: ",
        ),
        (
            {"train": [*TRAIN, (X[:, :2], Y)]},
            RuntimeError,
            r"models\['a'\], epoch 1 of seed 0, train: RuntimeError: mat1 and mat2",
        ),
        (
            {"valid": [*VALID, {"x": X}]},
            RuntimeError,
            r"models\['a'\], epoch 1 of seed 0, valid: TypeError: valid: a batch is a dict",
        ),
        ({"models": {}}, TypeError, "models: got {}"),
        ({"models": [mlp]}, TypeError, "models: got"),
        (
            {"models": {"a": mlp(4)}},
            TypeError,
            r"models\['a'\]: got Sequential, expected a function",
        ),
        ({"models": {"a": lambda: 3}}, TypeError, r"models\['a'\]: built a int"),
        (
            {"models": {"a": lambda: nn.Linear(5, 4)}},
            ValueError,
            r"models\['a'\]: the backbone failed.*mat1 and mat2",
        ),
        (
            {"models": {"ok": lambda: mlp(4), "a": lambda: nn.Flatten(0)}},
            ValueError,
            r"models\['a'\]: the backbone returned \[96\], expected features",
        ),
        ({"num_classes": None}, ValueError, "built a backbone without clones: pass num_classes"),
        ({"num_classes": 2}, ValueError, r"models\['a'\]: a training step failed"),
        ({"head": alrao.ClassifierClones}, ValueError, "num_classes and head: got both"),
        ({"train": iter(TRAIN)}, TypeError, "train: got an iterator"),
        ({"valid": iter(VALID)}, TypeError, "valid: got an iterator"),
        ({"train": 3}, TypeError, "train: got int"),
        ({"train": []}, ValueError, "train: got no batches"),
        ({"valid": []}, ValueError, "valid: got no batches"),
        ({"train": [torch.zeros(3)]}, TypeError, "a batch is a Tensor"),
        (
            {"train": [(torch.zeros(3, 6), [0, 1, 2])]},
            TypeError,
            "holds Tensor, list; expected tensors",
        ),
        ({"epochs": 0}, ValueError, "epochs: got 0"),
        ({"patience": 0}, ValueError, "patience: got 0"),
        ({"seeds": 0}, ValueError, "seeds: got none"),
        ({"lr_range": (1, 0.1)}, ValueError, "lr_range"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"models": {"a": lambda: mlp(4)}, "train": TRAIN, "valid": VALID, **change}
    with pytest.raises(error, match=message):
        rank(arguments.pop("models"), arguments.pop("train"), arguments.pop("valid"), **arguments)


def test_mistakes_show_before_training():
    trained = []

    class Counting(nn.Linear):
        def forward(self, x):
            trained.append(self.training)
            return super().forward(x)

    with pytest.raises(ValueError, match=r"models\['bad'\]: the backbone failed"):
        rank({"ok": lambda: Counting(6, 4), "bad": lambda: nn.Linear(5, 4)})
    assert trained == [False, True, False]  # the width of its features, one step, one validation


def test_what_is_accepted():
    ignored = [(X, torch.full_like(Y, -100)), *VALID]
    options = {"clip_grad_norm": math.inf, "seeds": range(2), "lr_range": [1e-4, 1], "epochs": 1}
    ranking = rank({"a": lambda: mlp(4)}, TRAIN, ignored, **options)
    assert [run.seed for run in ranking[0].runs] == [0, 1]
    with pytest.raises(RuntimeError, match=r"epoch 1 of seed 0, valid: .*got no samples"):
        rank({"a": lambda: mlp(4)}, TRAIN, ignored[:1], epochs=1)


def test_the_command_line_says_where_rank_is():
    done = subprocess.run(
        [sys.executable, "-m", "alrao_fast", "rank"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "call alrao_fast.rank in Python" in done.stderr


def test_bar(capfd):
    rank({"mlp": lambda: mlp(4)}, progress=True, epochs=2)
    pytest.importorskip("tqdm")
    assert "mlp: 100%" in capfd.readouterr().err


def test_batches_are_not_written():
    train = copy.deepcopy(TRAIN)
    rank({"a": lambda: mlp(4)}, train)
    assert all(a.equal(b) for new, old in zip(train, TRAIN) for a, b in zip(new, old))
