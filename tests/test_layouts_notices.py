"""What is said of rates that follow no rule: one warning at construction, and `describe_rates`' summary."""

import io
import warnings

import pytest
import torch
from torch import nn

import alrao_fast as alrao


class Dense(nn.Module):
    """[in, out], which no rule knows."""

    def __init__(self, size=4):
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(size, size))
        self.scale = nn.Parameter(torch.ones(size))


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.ones(8, 8))


def warned(make):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    for warning in caught:
        assert warning.filename == __file__
    return [str(w.message) for w in caught]


def test_one_warning_names_every_class_its_share_and_the_cure():
    net = nn.Sequential(Dense(), Dense(), Wide(), nn.Linear(4, 3))
    (said,) = warned(lambda: alrao.AlraoAdam(net))
    assert said.startswith(
        "81% of the trained entries"
    )  # (2 * 16 + 64) / (2 * 20 + 64 + 15) = 0.807
    assert "Wide (table; 54%), Dense (kernel; 27%)" in said
    assert "register_feature_layout(Wide, lambda module: {'table': Feature(dim=0)})" in said


def test_silence():
    norm = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 2), nn.BatchNorm1d(4), nn.Embedding(3, 4))
    for net in (norm, nn.TransformerEncoderLayer(8, 2, 8), nn.PReLU()):
        assert not warned(lambda net=net: alrao.AlraoSGD(net))
    # Less than 1 % of the entries, or none of them trained.
    assert not warned(lambda: alrao.AlraoSGD(nn.Sequential(Dense(), nn.Linear(50, 50))))
    frozen = Dense().requires_grad_(False)
    assert not warned(lambda: alrao.AlraoSGD(nn.Sequential(frozen, nn.Linear(2, 2))))
    # One rate for all, and one for each entry.
    assert not warned(lambda: alrao.AlraoSGD(Dense(), sampler=alrao.Constant(0.1)))
    assert not warned(lambda: alrao.AlraoSGD(Dense(), sampler=alrao.PerWeight()))
    assert warned(lambda: alrao.AlraoSGD(Dense()))
    alrao.register_feature_layout(Dense, lambda m: {"kernel": alrao.Feature(dim=1)})
    try:
        assert not warned(lambda: alrao.AlraoSGD(Dense()))
    finally:
        alrao.register_feature_layout(Dense, None)


def test_describe_rates_sums_up_per_rule_and_class(capsys):
    net = nn.Sequential(Dense(), nn.Linear(4, 3), nn.Linear(3, 4), Dense())
    rows = alrao.describe_rates(net)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:1] + lines[2:]] == [
        ["rule", "module", "parameters", "entries", "share", "features"],
        ["default", "Dense", "4", "40", "56.3%", "16"],
        ["built-in", "Linear", "4", "31", "43.7%", "7"],
    ]
    assert alrao.describe_rates(net, details=True) == rows
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 2
    assert alrao.describe_rates(net, file=None) == rows
    assert alrao.describe_rates(net, details=True, file=None) == rows
    assert capsys.readouterr().out == ""
    text = io.StringIO()
    alrao.describe_rates(net, file=text)
    assert text.getvalue().splitlines() == lines


def test_describe_rates_counts_the_vectors_of_two_models(capsys):
    # Both call theirs "out".
    alrao.describe_rates(alrao.AlraoSGD([nn.Linear(2, 3), nn.Linear(2, 4)]))
    assert capsys.readouterr().out.splitlines()[-1].split() == [
        *("built-in", "Linear", "4", "21", "100.0%", "7")
    ]


def test_describe_rates_refuses_what_is_no_file():
    with pytest.raises(TypeError, match="details: got 3, expected True or False"):
        alrao.describe_rates(Dense(), details=3)
    with pytest.raises(
        TypeError, match=r"file: got 'out\.txt', expected a writable text file or None"
    ):
        alrao.describe_rates(Dense(), file="out.txt")
