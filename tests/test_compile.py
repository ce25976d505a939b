"""Protects torch.compile of the whole model: one graph, and the same numbers as eager.

- Training forward and backward on each CPU backend, the switch's state and the statistics too, no recompilation from
  step to step; a recurrent backbone; regression; the prediction in eval mode; inductor.
"""

import copy

import pytest
import torch
from torch import nn

from alrao_fast import backends
from alrao_fast.nn import AlraoModel, ClassifierClones, RegressorClones

OP = "switch_mixture"


class WithState(nn.Module):
    """Features, and something else."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 8)

    def forward(self, x):
        hidden = self.linear(x)
        return hidden.tanh(), hidden


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def classifier():
    return AlraoModel(nn.Sequential(nn.Linear(6, 8), nn.Tanh()), ClassifierClones(8, 5, 3))


def regressor():
    return AlraoModel(nn.Sequential(nn.Linear(6, 8), nn.Tanh()), RegressorClones(8, 5, 3))


def recurrent():
    return AlraoModel(WithState(), ClassifierClones(8, 5, 3))


def batch(net, n=7):
    if isinstance(net.head, RegressorClones):
        return torch.randn(n, 6), torch.randn(n, 5)
    y = torch.randint(5, (n,))
    y[2] = -100
    return torch.randn(n, 6), y


def first(out):
    return out[0] if isinstance(out, tuple) else out


def assert_follows_eager(net, compiler, steps=3):
    """Train and predict with the compiled model and with an eager copy; compare everything."""
    eager = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True, backend=compiler)
    for step in range(steps):
        x, y = batch(net)
        # A cache filled by the first step must not count as a change.
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            loss, expected = first(compiled(x, targets=y)), first(eager(x, targets=y))
            loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected)
    for (name, p), q in zip(net.named_parameters(), eager.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    for (name, a), b in zip(net.named_buffers(), eager.buffers()):
        assert a.dtype == b.dtype
        # The losses are float32; what is kept of them is as close as they are.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)
    assert net.head.switch.t.item() == steps + 1
    net.eval(), eager.eval()
    x, _ = batch(net)
    x = x.requires_grad_()
    result, expected = first(compiled(x)), first(eager(x))
    torch.testing.assert_close(result, expected)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (result, expected)]
    torch.testing.assert_close(*grads)
    # Compiled calls, too, remember what the backbone returns.
    best = net.collapse("mixture")
    torch.testing.assert_close(first(best(x)), expected)


@pytest.mark.parametrize("make", [classifier, recurrent, regressor])
def test_one_graph_as_eager(backend, make):
    if backend not in ("cpu", "reference"):
        pytest.skip(f"{backend}: these tests are of the CPU backends")
    with backends.use_backend(backend):
        assert_follows_eager(make(), "aot_eager")


def test_inductor():
    assert_follows_eager(classifier(), "inductor", steps=2)


def test_loss_by_hand():
    """Uniform weights, five classes: the loss is log 5 whatever the posterior."""
    net = classifier()
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.zero_()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x, y = batch(net)
    torch.testing.assert_close(compiled(x, targets=y), torch.tensor(5.0).log())
    torch.testing.assert_close(net.posterior(), torch.full((3,), 1 / 3).double())
