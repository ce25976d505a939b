"""Protects AlraoModel: the call with and without targets, what it says about the clones, whole training runs.

- The loss and the prediction by hand; backbones with extras, keyword arguments, any leading shape.
- posterior, suggested_lr, clone_metrics; training lowers the loss; a checkpoint in mid-training resumes bit for bit.
"""

import copy
import io
import math

import pytest
import torch
from torch import nn

from alrao_fast.nn import AlraoModel, ClassifierClones, RegressorClones
from alrao_fast.optim import AlraoAdam, AlraoMuon, AlraoSGD

OP = "switch_mixture"
pytestmark = pytest.mark.usefixtures("used_backend", "used_device")


class Recurrent(nn.Module):
    """tokens [T, B] -> (features [T, B, 8], state)."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.rnn = nn.GRU(6, 8)

    def forward(self, tokens, state=None, *, scale=1.0):
        features, state = self.rnn(self.embedding(tokens), state)
        return features * scale, state


def mlp(num_clones=4):
    backbone = nn.Sequential(nn.Linear(3, 8), nn.Tanh())
    return AlraoModel(backbone, ClassifierClones(8, 5, num_clones))


def test_by_hand():
    # One clone whose logits for x = 2 are (0, 2 log 3): probabilities 1/10 and 9/10.
    net = AlraoModel(nn.Identity(), ClassifierClones(1, 2, 1, bias=False))
    with torch.no_grad():
        net.head.weight.copy_(torch.tensor([[[0.0], [math.log(3)]]]))
    x = torch.tensor([[2.0]])
    assert net(x, targets=torch.tensor([0])).item() == pytest.approx(math.log(10), abs=1e-6)
    torch.testing.assert_close(net.eval()(x).exp(), torch.tensor([[0.1, 0.9]]))


def test_extras_and_arguments(backend):
    net = AlraoModel(Recurrent(), ClassifierClones(8, 5, 3))
    tokens, targets = torch.randint(5, (2, 7, 4))
    loss, state = net(tokens, targets=targets)
    assert loss.shape == ()
    assert state.shape == (1, 4, 8)
    net.eval()
    log_probs, _ = net(tokens, state, scale=0.5)
    features, expected = net.backbone(tokens, state, scale=0.5)
    torch.testing.assert_close(log_probs, net.head(features))
    assert log_probs.shape == (7, 4, 5)
    again, other = net(tokens, state, scale=0.5, targets=targets)
    assert torch.equal(other, expected)
    torch.testing.assert_close(
        again, nn.functional.nll_loss(log_probs.flatten(0, 1), targets.flatten())
    )


def test_posterior_and_metrics_are_the_heads():
    net = mlp()
    net(torch.randn(6, 3), targets=torch.randint(5, (6,)))
    assert torch.equal(net.posterior(), net.head.switch.posterior())
    metrics = net.clone_metrics(reset=True)
    assert metrics["count"].item() == 6
    assert net.clone_metrics()["count"].item() == 0


def test_suggested_lr():
    net = mlp(num_clones=3)
    with pytest.raises(
        RuntimeError, match="no learning rates yet: make an AlraoSGD, AlraoAdam or AlraoMuon"
    ):
        net.suggested_lr()
    AlraoSGD(net, lr_range=(1e-4, 1.0))
    with pytest.raises(RuntimeError, match="suggested_lr: the switch has made no observation"):
        net.suggested_lr()
    net.head.switch.update(torch.zeros(3))
    assert net.suggested_lr() == pytest.approx(1e-2)
    # All mass on one clone: its rate. A rate of 0 on a clone without mass does not matter.
    net.head.switch.log_posterior.copy_(torch.tensor([-math.inf, -math.inf, 0.0]))
    net.head.clone_lr[0] = 0
    assert net.suggested_lr() == pytest.approx(1.0)


def test_learns(backend):
    """A linearly separable problem, in the loop that every user has."""
    net = mlp(num_clones=5)
    opt = AlraoSGD(net, generator=torch.Generator().manual_seed(0))
    x = torch.randn(256, 3)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    losses = []
    for _ in range(8):
        for part in torch.arange(256).split(32):
            opt.zero_grad()
            loss = net(x[part], targets=y[part])
            loss.backward()
            opt.step()
            losses.append(loss.item())
    assert sum(losses[-8:]) / 8 < 0.5 < losses[0]
    net.eval()
    assert (net(x).argmax(-1) == y).float().mean() > 0.9
    assert 1e-5 < net.suggested_lr() < 10


def checkpoint(net, opt, scheduler):
    file = io.BytesIO()
    torch.save(
        {"net": net.state_dict(), "opt": opt.state_dict(), "scheduler": scheduler.state_dict()},
        file,
    )
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("optimizer", [AlraoSGD, AlraoAdam, AlraoMuon])
def test_resumes_bit_exactly(backend, optimizer):
    options = {"momentum": 0.9} if optimizer is AlraoSGD else {"lr_range": (1e-5, 1e-2)}

    def make(seed):
        torch.manual_seed(seed)
        net = AlraoModel(Recurrent(), ClassifierClones(8, 5, 4))
        opt = optimizer(net, generator=torch.Generator().manual_seed(seed), **options)
        return net, opt, torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=8)

    def train(net, opt, scheduler, data):
        for tokens in data:
            opt.zero_grad()
            net(tokens[:-1], targets=tokens[1:])[0].backward()
            opt.step()
            scheduler.step()

    data = torch.randint(5, (8, 6, 4))
    run = make(1)
    train(*run, data[:4])
    saved = checkpoint(*run)
    train(*run, data[4:])

    resumed = make(2)
    for part, state in zip(resumed, saved.values()):
        part.load_state_dict(state)
    train(*resumed, data[4:])

    for (name, a), b in zip(run[0].state_dict().items(), resumed[0].state_dict().values()):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
    assert run[0].head.switch.t.item() == 9
    assert run[0].suggested_lr() == resumed[0].suggested_lr()
    # The next step, of the optimizer's state too.
    for part in (run, resumed):
        train(*part, data[:1])
    for a, b in zip(run[0].parameters(), resumed[0].parameters()):
        assert torch.equal(a, b)


def test_copies_train_alike():
    net = mlp()
    other = copy.deepcopy(net)
    x, y = torch.randn(6, 3), torch.randint(5, (6,))
    for _ in range(2):
        assert torch.equal(net(x, targets=y), other(x, targets=y))


def test_under_autocast(backend):
    """Features in bfloat16, clones in float32; gradients in the parameters' dtype."""
    net = mlp()
    x, y = torch.randn(6, 3), torch.randint(5, (6,))
    expected = net.eval()(x, targets=y)
    with torch.autocast(x.device.type, torch.bfloat16):
        assert net.backbone(x).dtype == torch.bfloat16
        loss = net(x, targets=y)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    assert {p.grad.dtype for p in net.parameters()} == {torch.float32}


def test_inference_mode(backend):
    """It serves there, and a training loss computed there leaves the model able to train."""
    net = mlp()
    x, y = torch.randn(6, 3), torch.randint(5, (6,))
    with torch.inference_mode():
        net(x, targets=y)
        result = net.eval()(x)
    assert torch.equal(result, net(x))
    net.train()(x, targets=y).backward()
    assert net.head.switch.t.item() == 3


def test_regression():
    net = AlraoModel(nn.Linear(3, 8), RegressorClones(8, 2, 3))
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    net(x, targets=y).backward()
    assert net.eval()(x).shape == (5, 2)
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: AlraoModel(nn.Identity(), nn.Linear(2, 2)),
            TypeError,
            "head: got Linear, expected ClassifierClones, AdaptiveClassifierClones or RegressorClones",
        ),
        (
            lambda: mlp()(torch.randn(6, 3), targets=torch.zeros(5, dtype=torch.long)),
            ValueError,
            r"target: got shape \[5\], expected \[6\]",
        ),
    ],
)
def test_invalid(call, error, message):
    with pytest.raises(error, match=message):
        call()
