"""Protects what a training shows: metrics, the line of bars, the history.

- Each number against what the model's own methods say, and by hand; what is not known is left out; dead clones.
- One wait for the device, however many heads; training goes on as without them.
- Other modules than an AlraoModel: several heads, compiled and wrapped ones; many clones; groups of unequal lr.
"""

import copy
import json
import math

import pytest
import torch
from clones_harness import classifier, regressor, state
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name

import alrao_fast as alrao

WAITS = (
    "item",
    "tolist",
    "numpy",
    "cpu",
    "__float__",
    "__bool__",
    "__int__",
    "nonzero",
    "__index__",
)


class Waits(TorchFunctionMode):
    """Counts what would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = (resolve_name(function) or str(function)).rpartition(".")[2]
        if name in WAITS:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def model(make=classifier, **arguments):
    net = alrao.AlraoModel(nn.Sequential(nn.Linear(5, 6), nn.Tanh()), make(**arguments))
    return net, alrao.AlraoSGD(
        net, lr_range=(1e-2, 1.0), generator=torch.Generator().manual_seed(1)
    )


def train(net, opt, steps=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(7, 5, generator=generator)
        regression = isinstance(net.head, alrao.RegressorClones)
        y = torch.randn(7, 4, generator=generator)
        opt.zero_grad()
        net(x, targets=y if regression else y.argmax(1)).backward()
        opt.step()


@pytest.mark.parametrize("make, score", [(classifier, "accuracy"), (regressor, "squared_error")])
def test_metrics_are_the_models(make, score):
    net, opt = model(make)
    train(net, opt)
    for group in opt.param_groups:
        group["lr"] = 0.25
    found = alrao.metrics(net, opt)
    assert all(type(value) is float for value in found.values())
    assert json.loads(json.dumps(found)) == found
    posterior, means = net.posterior().tolist(), net.clone_metrics()
    best = max(range(3), key=posterior.__getitem__)
    expected = {
        "observations": 5.0,
        "posterior_entropy": -sum(p * math.log(p) for p in posterior),
        "best_clone": float(best),
        "best_posterior": posterior[best],
        "best_lr": net.head.clone_lr[best].item(),
        "mean_lr": net.suggested_lr(),
        "best_loss": means["loss"][best].item(),
        f"best_{score}": means[score][best].item(),
        "dead_clones": 0.0,
        "lr": 0.25,
    }
    for n in range(3):
        expected |= {f"posterior/{n}": posterior[n], f"loss/{n}": means["loss"][n].item()}
        expected[f"{score}/{n}"] = means[score][n].item()
    assert found == pytest.approx({f"alrao/{k}": v for k, v in expected.items()}, rel=1e-7)


def test_by_hand():
    """Three clones, of which the second has half of the posterior and the third died."""
    net, opt = model()
    with torch.no_grad():
        net.head.switch.log_posterior.copy_(torch.tensor([0.25, 0.5, 0.25]).log())
        net.head.weight[2, 0, 0] = math.nan
    found = alrao.metrics(net, opt, prefix="")
    assert found["posterior_entropy"] == pytest.approx(1.5 * math.log(2))
    assert found["best_clone"] == 1 and found["best_lr"] == pytest.approx(0.1)
    assert found["dead_clones"] == pytest.approx(1 / 3)
    # Of the living two, with 1/3 and 2/3: 10^-(2/3 * 1 + 1/3 * 2).
    assert found["mean_lr"] == pytest.approx(10 ** (-4 / 3))


def test_what_is_not_known_is_left_out():
    head = classifier()
    found = alrao.metrics(head, prefix="")
    assert found.keys() == {
        "observations",
        "posterior_entropy",
        "best_clone",
        "best_posterior",
        "dead_clones",
        *(f"posterior/{n}" for n in range(3)),
    }
    assert found["posterior_entropy"] == pytest.approx(math.log(3)) and found["observations"] == 0


def test_a_posterior_that_knows_of_no_clone_has_no_entropy():
    head = classifier()
    head.switch.log_posterior.fill_(-math.inf)
    assert math.isnan(alrao.metrics(head, prefix="")["posterior_entropy"])


def test_reset_begins_the_losses_anew():
    net, opt = model()
    train(net, opt)
    whole = alrao.metrics(net, prefix="", reset=True)
    assert "loss/0" in whole and "loss/0" not in alrao.metrics(net, prefix="")
    train(net, opt, steps=1, seed=5)
    losses = net.clone_metrics()["loss"].tolist()
    assert [alrao.metrics(net, prefix="")[f"loss/{n}"] for n in range(3)] == losses


def test_a_dead_clone_shows():
    net, opt = model()
    with torch.no_grad():
        net.head.weight[0] = math.inf
    train(net, opt)
    found = alrao.metrics(net, opt, prefix="")
    assert found["loss/0"] == math.inf and found["posterior/0"] < 0.5
    assert found["dead_clones"] == pytest.approx(1 / 3) and found["best_clone"] != 0


def test_one_wait_and_no_trace():
    net, opt = model()
    for group in opt.param_groups:
        group["lr"] = torch.tensor(0.5)
    train(net, opt)
    twin_net, twin_opt = copy.deepcopy((net, opt))
    both = nn.ModuleList([net, model()[0]])
    before = state(net.head)
    history = alrao.History(net)
    with Waits() as waits:
        alrao.metrics(both, opt)
        assert waits.seen == ["tolist"]
        alrao.posterior_line(net)
        assert waits.seen == ["tolist"] * 2
        history.record()
        assert waits.seen == ["tolist"] * 2
    for old, new in zip(before, state(net.head)):
        torch.testing.assert_close(old, new, rtol=0, atol=0, equal_nan=True)
    train(net, opt, seed=3)
    train(twin_net, twin_opt, seed=3)
    for a, b in zip(net.parameters(), twin_net.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_other_modules():
    net, opt = model()
    expected = alrao.metrics(net, opt)
    compiled = torch.compile(net, backend="eager")
    for other in (
        net.head,
        nn.Sequential(net),
        compiled,
        torch.optim.swa_utils.AveragedModel(net).module,
    ):
        assert alrao.metrics(other, opt) == pytest.approx(expected)
    several = nn.ModuleDict({"a": net, "b": model(regressor)[0]})
    found = alrao.metrics(several, opt, prefix="x/")
    assert {k for k in found if "best_lr" in k} == {"x/a.head/best_lr", "x/b.head/best_lr"}
    assert found["x/a.head/best_lr"] == expected["alrao/best_lr"] and found["x/lr"] == 1


def test_many_clones_are_summed_up():
    few, many = (alrao.ClassifierClones(4, 3, n) for n in (16, 17))
    assert "alrao/posterior/15" in alrao.metrics(few)
    assert not [name for name in alrao.metrics(many) if "/posterior/" in name]


def test_groups_with_multipliers_of_their_own():
    net, _ = model()
    opt = alrao.AlraoSGD(
        [{"params": net.backbone.parameters()}, {"params": net.head.parameters(), "lr": 0.5}]
    )
    found = alrao.metrics(net, opt, prefix="")
    assert (found["lr/0"], found["lr/1"]) == (1.0, 0.5) and "lr" not in found
    opt.param_groups[0]["lr"] = torch.tensor(0.5)
    assert alrao.metrics(net, opt, prefix="")["lr"] == 0.5


def test_line():
    net, _ = model()
    assert alrao.posterior_line(net) == "0.01 ▃▃▃ 1"
    assert alrao.posterior_line(classifier()) == "▃▃▃"
    net.head.switch.log_posterior.copy_(torch.tensor([-math.inf, -math.inf, 0]))
    assert alrao.posterior_line(net) == "0.01 ▁▁█ 1"
    net.head.switch.log_posterior.fill_(math.nan)
    assert alrao.posterior_line(net) == "0.01 ??? 1"


def test_line_of_rates_in_another_order():
    net, _ = model()
    with torch.no_grad():
        net.head.switch.log_posterior.copy_(torch.tensor([0.0, -math.inf, -math.inf]))
    alrao.AlraoSGD(net, sampler=Descending())
    assert alrao.posterior_line(net) == "0.01 ▁▁█ 1"


class Descending(alrao.LogUniform):
    """A sampler whose first clone has the largest rate."""

    def clone_rates(self, num_clones):
        return torch.logspace(0, -2, num_clones)


def test_history():
    net, opt = model()
    history = alrao.History(net)
    assert len(history) == 0 and history.posterior.shape == (0, 3)
    expected = []
    for steps in (0, 1, 3):
        train(net, opt, steps)
        history.record()
        expected.append(net.posterior())
    assert len(history) == 3
    torch.testing.assert_close(history.posterior, torch.stack(expected), rtol=0, atol=0)
    assert history.observations.tolist() == [0, 1, 4]
    torch.testing.assert_close(history.clone_lr, torch.tensor([0.01, 0.1, 1.0]))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: alrao.metrics(nn.Linear(2, 2)), ValueError, "net: got a Linear without clones"),
        (lambda: alrao.metrics(None), TypeError, "net: got None, expected a torch.nn.Module"),
        (lambda: alrao.metrics(classifier(), 3), TypeError, "opt: got 3, expected an optimizer"),
        (lambda: alrao.metrics(classifier(), prefix=1), TypeError, "prefix: got 1, expected"),
        (lambda: alrao.metrics(classifier(), reset="no"), TypeError, "reset: got 'no', expected"),
        (lambda: alrao.posterior_line("net"), TypeError, "net: got 'net', expected"),
        (
            lambda: alrao.History(nn.Sequential(classifier(), classifier())),
            ValueError,
            r"net: got one with 2 heads \(0, 1\), expected one",
        ),
    ],
    ids=["no-clones", "none", "opt", "prefix", "reset", "line", "heads"],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
