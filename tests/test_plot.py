"""Protects the plots: what they draw is what was recorded; their axes, labels and scales; what they refuse.

- The mesh and the line of the posterior, with its rates, without an optimizer, for one record and one clone.
- The histogram of the features' rates, each shared vector once, and the clones' posterior; rates of 0.
- Axes are taken and returned; matplotlib is imported at the first plot and missed with a cure.
"""

import subprocess
import sys

import pytest
import torch
from clones_harness import classifier
from torch import nn

import alrao_fast as alrao

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def closed():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def trained(steps=6, num_clones=3, **arguments):
    head = alrao.ClassifierClones(6, 4, num_clones)
    net = alrao.AlraoModel(nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6)), head)
    generator = torch.Generator().manual_seed(0)
    opt = alrao.AlraoSGD(net, lr_range=(1e-3, 1.0), generator=generator, **arguments)
    history = alrao.History(net)
    for _ in range(steps):
        opt.zero_grad()
        net(torch.randn(7, 5), targets=torch.randint(4, (7,))).backward()
        opt.step()
        history.record()
    return net, opt, history


def test_posterior():
    net, _, history = trained()
    ax = alrao.plot.posterior(history)
    (mesh,) = ax.collections
    drawn = torch.from_numpy(mesh.get_array().data.reshape(3, 6).copy())
    torch.testing.assert_close(drawn, history.posterior.t(), rtol=0, atol=0)
    assert mesh.norm.vmin == 0 and mesh.norm.vmax == 1
    # Each clone's band has its rate in the middle of the logarithmic axis.
    edges = torch.from_numpy(mesh.get_coordinates()[:, 0, 1].copy())
    torch.testing.assert_close((edges[1:] * edges[:-1]).sqrt(), history.clone_lr.double())
    assert ax.get_yscale() == "log" and ax.get_xlabel() == "observations of the switch"
    line = ax.lines[-1]
    assert line.get_xdata().tolist() == [1, 2, 3, 4, 5, 6]
    assert line.get_ydata()[-1] == pytest.approx(net.suggested_lr())
    ax.figure.canvas.draw()


@pytest.mark.parametrize("steps, num_clones", [(1, 3), (2, 1), (1, 1)])
def test_posterior_of_little(steps, num_clones):
    ax = alrao.plot.posterior(trained(steps, num_clones)[2])
    ax.figure.canvas.draw()
    assert ax.collections[0].get_array().shape == (num_clones, steps)


def test_posterior_without_an_optimizer():
    history = alrao.History(classifier())
    history.record()
    ax = alrao.plot.posterior(history)
    assert ax.get_yscale() == "linear" and ax.get_ylabel() == "clone" and not ax.lines


@pytest.mark.parametrize("rates", [[1.0, 0.01, 0.1], [0.1, 0.1, 0.1]])
def test_posterior_of_rates_in_any_order(rates):
    net, opt, history = trained()
    opt.state[net.head.weight]["rate"].copy_(torch.tensor(rates))
    net.head.follow_optimizer()
    (mesh,) = alrao.plot.posterior(history).collections
    drawn = torch.from_numpy(mesh.get_array().data.reshape(3, 6).copy())
    order = torch.tensor(rates).argsort(stable=True)
    torch.testing.assert_close(drawn, history.posterior.t()[order], rtol=0, atol=0)
    edges = torch.from_numpy(mesh.get_coordinates()[:, 0, 1].copy())
    assert (edges.diff() > 0).all()


def test_rates():
    net, opt, _ = trained()
    ax = alrao.plot.rates(net, opt)
    # The Linear's 6 features, whose weight and bias share a vector, and the LayerNorm's 6.
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert "rates of 12 features: share per bin" in labels
    assert sum(bar.get_height() for bar in ax.patches) == pytest.approx(1)
    (points,) = ax.lines
    assert points.get_ydata().tolist() == net.posterior().tolist()
    assert points.get_xdata().tolist() == pytest.approx([1e-3, 10**-1.5, 1.0])
    assert ax.get_xscale() == "log" and ax.get_xlabel() == "learning rate"
    ax.figure.canvas.draw()


@pytest.mark.parametrize("sampler", [alrao.Fraction(0.5, 0.1), alrao.Constant(0.1)])
def test_rates_of_other_samplers(sampler):
    """Where features have the rate 0 they have no place on the axis, and count in the shares."""
    net, opt, _ = trained(sampler=sampler)
    rates = torch.cat(
        [opt.state[p]["rate"] for p in (net.backbone[0].weight, net.backbone[1].weight)]
    )
    ax = alrao.plot.rates(net, opt)
    ax.figure.canvas.draw()
    shares = sum(bar.get_height() for bar in ax.patches)
    assert shares == pytest.approx((rates > 0).double().mean().item())


@pytest.mark.parametrize(
    ("backbone", "features"),
    [
        # in_proj [24] and out_proj [8]; without biases the three weights have thirds of in_proj.
        (lambda: nn.MultiheadAttention(8, 2, kdim=5, vdim=3), 24 + 8),
        (lambda: nn.MultiheadAttention(8, 2, bias=False, kdim=5, vdim=3), 24 + 8),
        (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), 6),
        (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False), 6),
    ],
)
def test_parts_of_a_vector_are_features_once(backbone, features):
    net = nn.ModuleList([backbone(), classifier()])
    ax = alrao.plot.rates(net, alrao.AlraoSGD(net))
    assert ax.get_legend_handles_labels()[1][0].startswith(f"rates of {features} features")


def test_axes_are_taken_and_returned():
    import matplotlib.pyplot as plt

    net, opt, history = trained()
    figure, (left, right) = plt.subplots(1, 2)
    assert alrao.plot.posterior(history, ax=left) is left
    assert alrao.plot.rates(net, opt, ax=right) is right
    assert len(plt.get_fignums()) == 1
    figure.canvas.draw()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda n, o, h: alrao.plot.posterior(n), TypeError, "history: got .*, expected"),
        (lambda n, o, h: alrao.plot.posterior(alrao.History(n)), ValueError, "without a record"),
        (lambda n, o, h: alrao.plot.rates(n, h), TypeError, "opt: got .*, expected"),
        (lambda n, o, h: alrao.plot.rates(classifier(), o), ValueError, "opt: got an optimizer w"),
        (lambda n, o, h: alrao.plot.rates(nn.Linear(2, 2), o), ValueError, "without clones"),
    ],
    ids=["history", "empty", "opt", "other", "no-clones"],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call(*trained(1))


def test_without_matplotlib():
    code = """
import sys
sys.modules["matplotlib"] = None
import alrao_fast as alrao
history = alrao.History(alrao.ClassifierClones(2, 2))
history.record()
try:
    alrao.plot.posterior(history)
except ImportError as error:
    assert "pip install 'alrao-fast[plot]'" in str(error), error
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
