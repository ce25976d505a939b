"""The bound of AlraoAdam's rates by the size of a feature's weights. Protects:

- the limits by hand, for every kind of layout: shared vectors, gates, columns, several dimensions, features by number;
- features of zeros, parameters on meta, other dtypes; clones and samplers without an interval are not bounded;
- rates, draws and limits in the state: saved, loaded, kept when the state is cleared, moved with a parameter;
- a narrowed interval stays below the limits.
"""

import copy

import pytest
import torch
from checkpoint_harness import assert_same_state, build, generator, train
from torch import nn

from alrao_fast import (
    AlraoAdam,
    AlraoMuon,
    Constant,
    Feature,
    LogTriangular,
    PerWeight,
    register_feature_layout,
)

BOUND = 0.125


def limits(module, **options):
    opt = AlraoAdam(module, rate_bound=BOUND, generator=generator(0), **options)
    for param in module.parameters():
        own = opt.state[param]
        assert torch.equal(own["rate"], torch.minimum(own["drawn_rate"], own["rate_limit"]))
    return {name: opt.state[p]["rate_limit"] for name, p in module.named_parameters()}


def test_by_hand():
    """A weight [[1, 7], [2, 2]] and a bias (1, 1): squares 51/3 = 17 and 9/3 = 3; an eighth of their roots."""
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 7.0], [2.0, 2.0]]))
        layer.bias.fill_(1.0)
    found = limits(layer)
    expected = torch.tensor([17.0, 3.0]).sqrt() / 8
    torch.testing.assert_close(found["weight"], expected)
    assert found["weight"] is found["bias"]


class Table(nn.Module):
    """Features along two dimensions, in an order of their own, and by number."""

    def __init__(self):
        super().__init__()
        self.pairs = nn.Parameter(torch.randn(4, 3, 5))
        self.named = nn.Parameter(torch.randn(4, 6))


@pytest.fixture
def table():
    numbers = torch.tensor([1, 0, 1, 2])
    rule = {
        "pairs": Feature(dim=(0, 2)),
        "named": Feature(dim=0, num_features=3, vector="n", feature_of=numbers),
    }
    register_feature_layout(Table, lambda module: rule)
    yield Table()
    register_feature_layout(Table, None)


def mean_square(*parts):
    """Of parts `[..., F]` whose last dimension runs over the features."""
    squares = sum(p.detach().double().square().flatten(0, -2).sum(0) for p in parts)
    return squares / sum(p[..., 0].numel() for p in parts)


def close(limit, squares):
    torch.testing.assert_close(limit, (squares.sqrt() * BOUND).float())


def test_every_kind_of_layout(table):
    torch.manual_seed(0)
    lstm, conv = nn.LSTM(3, 5), nn.ConvTranspose2d(4, 6, 3)
    found = limits(lstm)
    parts = [p.detach().view(4, 5, -1).movedim(1, -1) for p in lstm.parameters()]
    close(found["weight_ih_l0"], mean_square(*parts))
    assert found["bias_hh_l0"] is found["weight_ih_l0"]
    embedding = nn.Embedding(7, 3)
    close(limits(embedding)["weight"], mean_square(embedding.weight))
    found = limits(conv.to(memory_format=torch.channels_last))
    weight = conv.weight.detach().movedim(1, -1)
    close(found["weight"], mean_square(weight, conv.bias.detach()[None]))
    found = limits(table)
    close(found["pairs"], table.pairs.detach().double().square().mean(1).flatten())
    rows = table.named.detach().double().square().mean(1)
    three = torch.stack([rows[1], (rows[0] + rows[2]) / 2, rows[3]])
    close(found["named"], three[[1, 0, 1, 2]])


def test_features_of_zeros_and_on_meta_have_the_usual_size():
    layer = nn.Linear(5, 3)
    for param in layer.parameters():
        nn.init.zeros_(param)
    usual = torch.full((3,), BOUND / 18**0.5)
    torch.testing.assert_close(limits(layer)["weight"], usual)
    with torch.no_grad():
        layer.weight[1] = torch.nan
    torch.testing.assert_close(limits(layer)["weight"], usual)
    torch.testing.assert_close(limits(nn.Linear(5, 3, device="meta"))["weight"], usual)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(300, 4).to(dtype)
    found = limits(layer)["weight"]
    assert found.dtype == torch.float32
    weight = torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], 1)
    close(found, mean_square(weight.T))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("sampler", [None, PerWeight(1e-4, 1e-1)])
def test_frozen_parameters_of_other_dtypes(dtype, sampler):
    """Such as quantized weights: they have rates, as AlraoSGD gives them, and the others are trained."""
    layer = nn.Linear(5, 3)
    before = layer.weight.detach().clone()
    layer.codes = nn.Parameter(torch.zeros(3, 4, dtype=dtype), requires_grad=False)
    for kind in (AlraoAdam, AlraoMuon):
        opt = kind(layer, sampler=sampler)
        layer(torch.ones(2, 5)).sum().backward()
        opt.step()
        assert not torch.equal(layer.weight, before)
        assert set(opt.state[layer.codes]) == {"rate", "drawn_rate", "rate_limit"}


def test_a_rate_per_weight_is_bounded_by_the_size_of_the_tensor():
    layer = nn.Linear(5, 3)
    found = limits(layer, sampler=PerWeight(1e-5, 10.0))
    close(found["weight"], layer.weight.detach().double().square().mean().expand(15))


def test_what_is_small_on_purpose_moves():
    """A feature of the size 1e-6 counts as a tenth of what torch's layers would draw."""
    layer = nn.Linear(5, 3)
    for param in layer.parameters():
        nn.init.constant_(param, 1e-6)
    usual = torch.full((3,), 0.1 * BOUND / 18**0.5)
    torch.testing.assert_close(limits(layer)["weight"], usual)


def test_a_bound_of_a_group():
    model = build()
    groups = [
        {"params": model.backbone[0], "rate_bound": None},
        {"params": model.backbone[1], "rate_bound": 0.5},
        {"params": model.head},
    ]
    opt = AlraoAdam(groups, generator=generator(0))
    assert "rate_limit" not in opt.state[model.backbone[0].weight]
    gain = opt.state[model.backbone[1].weight]["rate_limit"]
    torch.testing.assert_close(gain, torch.full((8,), 0.5 * 0.5**0.5))
    assert "rate_bound" not in opt.param_groups[0]
    with pytest.raises(ValueError, match="rate_bound: got -1"):
        opt.add_param_group({"params": nn.Linear(2, 2), "rate_bound": -1})
    with pytest.raises(ValueError, match="total_steps: got 5 in a param group"):
        opt.add_param_group({"params": nn.Linear(2, 2), "total_steps": 5})


def test_who_is_not_bounded():
    model = build()
    opt = AlraoAdam(model, (1e-4, 1e3), generator=generator(0))
    clones = opt.state[model.head.weight]
    assert clones.keys().isdisjoint(("rate_limit", "drawn_rate"))
    sampler = LogTriangular(1e-4, 1e3)
    assert torch.equal(clones["rate"], sampler.clone_rates(len(clones["rate"])))
    for options in ({"sampler": Constant(5.0)}, {"rate_bound": None}):
        opt = AlraoAdam(model, (1e-4, 1e3), generator=generator(0), **options)
        assert all("rate_limit" not in own for own in opt.state.values())
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="rate_bound: got"):
            AlraoAdam(model, rate_bound=wrong)


def test_saved_loaded_cleared_and_moved():
    model = build()
    opt = AlraoAdam(model, total_steps=40, generator=generator(0))
    train(model, opt, range(10))
    again = build(seed=7)
    again.load_state_dict(model.state_dict())
    other = AlraoAdam(again, total_steps=40, generator=generator(1))
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert_same_state(opt, other)
    weight = model.backbone[0].weight
    before = {key: opt.state[weight][key] for key in ("rate", "drawn_rate", "rate_limit")}
    opt.state.clear()
    opt.refresh()
    assert all(opt.state[weight][key] is value for key, value in before.items())
    moved = nn.Parameter(weight.detach().clone())
    model.backbone[0].weight = moved
    opt.param_groups[0]["params"][0] = moved
    opt.refresh()
    assert all(opt.state[moved][key] is value for key, value in before.items())


def test_an_older_checkpoint_keeps_its_rates():
    model = build()
    opt = AlraoAdam(model, rate_bound=None, generator=generator(0))
    train(model, opt, range(2))
    again = build(seed=7)
    again.load_state_dict(model.state_dict())
    other = AlraoAdam(again, generator=generator(1))
    other.load_state_dict(opt.state_dict())
    assert_same_state(opt, other)


def test_a_narrowed_interval_stays_below_the_limits():
    model = build()
    opt = AlraoAdam(model, (1e-3, 100.0), generator=generator(0))
    for progress in (0.0, 0.3, 1.0):
        opt.anneal_rates(progress)
        own = opt.state[model.backbone[0].weight]
        assert (own["rate"] <= own["rate_limit"]).all()
        if progress == 0:
            expected = torch.minimum(own["drawn_rate"], own["rate_limit"])
            torch.testing.assert_close(own["rate"], expected)
    assert (own["rate"] == own["rate_limit"]).any()
