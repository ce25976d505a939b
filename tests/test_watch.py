"""Protects the warning of a training that has died: once for each cause, in its step, naming what is not finite.

- Backbone, inputs, clones and targets are told apart, on every way to observe; ignored samples do not count.
- A healthy training, one with some dead clones and evaluation say nothing; nothing is asked of tracers.
- On a GPU: looks at few observations, none that waits, none while a graph is captured.
- suggested_lr refuses what has no living clone or no posterior.
"""

import copy
import math
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from clones_harness import C, D, N, classifier, concentrate, regressor
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from alrao_fast.nn import AlraoModel, ClassifierClones
from alrao_fast.nn.watch import Watch
from alrao_fast.optim import AlraoSGD

OP = "switch_mixture"
pytestmark = pytest.mark.usefixtures("used_backend", "used_device")


def model(make=classifier):
    return AlraoModel(nn.Sequential(nn.Linear(5, D), nn.Tanh()), make())


def batch(make=classifier):
    return torch.randn(4, 5), torch.randint(C, (4,)) if make is classifier else torch.randn(4, C)


def by_likelihood(net, x, y):
    return net(x, targets=y)


def by_criterion(net, x, y):
    return net.head.clone_loss(net.backbone(x), lambda out: (out - 1).square().sum(-1))


def in_checkpoint(net, x, y):
    return checkpoint(lambda x: net(x, targets=y), x, use_reentrant=False)


@torch.no_grad()
def poison(tensor, value=math.nan):
    tensor.view(-1)[0] = value


@torch.no_grad()
def break_backbone(net, x, y):
    poison(net.backbone[0].weight)
    return r"the backbone has diverged. 4 of 4 samples .* 1 of the 2 parameters behind them"


@torch.no_grad()
def break_inputs(net, x, y):
    poison(x[1:], math.inf)
    net.backbone[1] = nn.Identity()
    return r"1 of 4 samples have features that are not finite, but the 2 parameters behind them are"


@torch.no_grad()
def break_clones(net, x, y):
    net.head.weight[0] = math.nan
    net.head.bias[2] = math.inf
    net.head.weight[1] = 3e38
    net.backbone[0].bias += 9
    return (
        r"every clone is dead for a sample: clones \[0, 2\] have parameters that are not finite and "
        r"clones \[1\] overflow on features up to 1\."
    )


CAUSES = [break_backbone, break_inputs, break_clones]


def loss_of(observe, net, x, y):
    loss = observe(net, x, y)
    loss.backward()
    return loss.item()


def assert_told_once(observe, make, cause, *, late):
    """late: as on a GPU, where the loss of observation 4 is looked at in the step after it."""
    net, (x, y) = model(make), batch(make)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            loss_of(observe, net, x, y)
        pattern = cause(net, x, y)
        if late:
            assert not math.isfinite(loss_of(observe, net, x, y))
    when = "by" if late else "at"
    with pytest.warns(
        RuntimeWarning, match=f"the loss is not finite {when} observation 4: .*{pattern}"
    ):
        assert not math.isfinite(loss_of(observe, net, x, y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            loss_of(observe, net, x, y)


every_way = pytest.mark.parametrize("observe", [by_likelihood, by_criterion, in_checkpoint])


@pytest.mark.emulated
@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("make", [classifier, regressor])
@every_way
def test_each_cause_is_told_once(backend, device, observe, make, cause):
    assert_told_once(observe, make, cause, late=device.type == "cuda")


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("make", [classifier, regressor])
@every_way
def test_each_cause_is_told_once_on_a_gpu(monkeypatch, observe, make, cause):
    """Without one: the losses only say that they are there, and arrive before the next step."""
    look = Watch.look

    def look_there(watch, head, loss, *others):
        with monkeypatch.context() as patch:
            device = FakeDevice(patch)
            device.arrived = True
            # What an earlier look has sent is on a device of its own.
            look(watch, head, device.loss(loss.item(), waits=True), *others)

    monkeypatch.setattr(Watch, "look", look_there)
    assert_told_once(observe, make, cause, late=True)


def test_two_causes_are_told_apart():
    net, (x, y) = model(), batch()
    poison(x)
    with pytest.warns(RuntimeWarning, match="Look for NaN in the inputs"):
        net(x, targets=y)
    break_clones(net, x, y)
    with pytest.warns(RuntimeWarning, match="every clone is dead"):
        net(torch.randn(4, 5), targets=y)


def test_targets():
    net, (x, y) = model(regressor), batch(regressor)
    poison(y)
    with pytest.warns(
        RuntimeWarning, match="clones are finite. 1 samples have targets that are not"
    ):
        net(x, targets=y)
    net = model()
    with pytest.warns(RuntimeWarning, match="clones are finite. Look at the criterion"):
        net.head.clone_loss(net.backbone(x), lambda out: out.sum(-1) * math.inf)


def test_without_a_graph():
    """Nobody knows then what is behind the features."""
    net, (x, y) = model(), batch()
    poison(x)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="has diverged or the inputs are not"):
        net(x, targets=y)
    other = classifier()
    with pytest.warns(RuntimeWarning, match="No parameters are known behind them"):
        other(torch.full((4, D), math.nan), y)


def test_ignored_samples_do_not_count():
    net, (x, y) = model(), batch()
    net.head.weight.data.fill_(math.nan)
    x[1], y[1] = math.nan, -100
    with pytest.warns(RuntimeWarning, match="every clone is dead"):
        net(x, targets=y)


@pytest.mark.parametrize("make", [classifier, regressor])
def test_silence(make):
    """One clone left is enough; evaluation is nobody's death."""
    net, (x, y) = model(make), batch(make)
    with torch.no_grad():
        net.head.weight[1:] = math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            net(x, targets=y).backward()
        poison(net.backbone[0].weight)
        net.eval()(x, targets=y)
        net.head.clone_loss(net.backbone(x), lambda out: (out - 1).square().sum(-1))


def test_a_diverging_training():
    """From beginning to end: the step in which it dies is the one that is named."""
    net = AlraoModel(nn.Sequential(nn.Linear(5, 8), nn.Linear(8, D)), regressor())
    opt = AlraoSGD(net, lr_range=(1e2, 1e4), generator=torch.Generator().manual_seed(0))
    x, y = batch(regressor)
    with pytest.warns(RuntimeWarning, match="the loss is not finite at observation") as told:
        for _ in range(30):
            opt.zero_grad()
            loss = net(x, targets=y)
            if not loss.isfinite():
                break
            loss.backward()
            opt.step()
    assert f"at observation {net.head.switch.t.item()}:" in str(told[0].message)
    assert len(told) == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_fresh_heads_tell_anew(duplicate):
    net, (x, y) = model(), batch()
    net.head.weight.data.fill_(math.nan)
    with pytest.warns(RuntimeWarning):
        net(x, targets=y)
    with pytest.warns(RuntimeWarning):
        duplicate(net)(x, targets=y)
    net.head.reset_parameters()
    net.head.weight.data.fill_(math.nan)
    with pytest.warns(RuntimeWarning):
        net(x, targets=y)


def test_tracers_are_not_asked(backend):
    net, (x, y) = model(), batch()
    graph = make_fx(lambda x: net(x, targets=y))(x)
    assert "_local_scalar_dense" not in graph.code


class FakeDevice:
    """Losses on a GPU whose copies arrive when the test says so."""

    def __init__(self, monkeypatch):
        self.arrived, self.capturing, self.copies = False, False, 0

        def event():
            return SimpleNamespace(record=lambda stream: None, query=lambda: self.arrived)

        monkeypatch.setattr(torch.cuda, "Event", event)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: self)

    def loss(self, value, *, waits=False):
        def item():
            assert waits, "waited for the device"
            return value

        return SimpleNamespace(
            dim=lambda: 0,
            is_cpu=False,
            is_cuda=True,
            device="cuda",
            detach=lambda: value,
            item=item,
        )

    def copy_(self, value, non_blocking):
        assert non_blocking and not self.capturing
        self.copies += 1
        self.value = value

    def item(self):
        assert self.arrived
        return self.value


def test_looks_on_a_gpu(monkeypatch):
    device, watch = FakeDevice(monkeypatch), Watch()
    nothing = torch.zeros(1, D)

    def observe(value):
        watch.look(None, device.loss(value), nothing, None)

    looked = []
    for step in range(1, 257):
        device.arrived = device.copies == len(looked)
        observe(1.0)
        if device.copies > len(looked):
            looked.append(step)
            # It arrives two steps later.
            device.arrived = False
            observe(1.0)
            device.arrived = True
    assert looked[0] == 1
    assert 8 <= len(looked) <= 12


def test_no_look_while_a_graph_is_captured(monkeypatch):
    device, watch = FakeDevice(monkeypatch), Watch()
    device.capturing = True
    for _ in range(5):
        assert watch._value(device.loss(math.inf)) is None
    assert device.copies == 0
    device.capturing = False
    # Observations 6 and 7 are not looked at, 8 is; it arrives at 10.
    for _ in range(4):
        assert watch._value(device.loss(math.inf)) is None
    assert device.copies == 1
    device.capturing = device.arrived = True
    assert watch._value(device.loss(1.0)) is None
    device.capturing = False
    assert watch._value(device.loss(1.0)) == math.inf


@pytest.mark.parametrize("now", [math.inf, 1.0])
def test_what_arrives_from_a_gpu_is_told(monkeypatch, now):
    device, net, (x, y) = FakeDevice(monkeypatch), model(), batch()
    watch, features = Watch(), net.backbone(x)
    watch.look(net.head, device.loss(math.inf), features, y)
    device.arrived = True
    if now == math.inf:
        net.head.weight.data.fill_(math.nan)
        pattern = "not finite by observation 1: every clone is dead"
    else:
        pattern = "not finite by observation 1: this step's loss is finite again"
    with pytest.warns(RuntimeWarning, match=pattern):
        watch.look(net.head, device.loss(now, waits=True), features, y)


def test_suggested_lr_refuses_what_is_dead():
    net = model()
    AlraoSGD(net, lr_range=(1e-4, 1.0))
    net(*batch()[:1], targets=batch()[1])
    concentrate(net.head, -1, -9, -9)
    with torch.no_grad():
        net.head.bias[0] = math.nan
    # The rate of a clone that is dead says nothing.
    p = net.posterior()[1:]
    rates = net.head.clone_lr[1:].double().log()
    assert net.suggested_lr() == pytest.approx(((p * rates).sum() / p.sum()).exp().item())
    net.head.switch.log_posterior[:] = math.nan
    with pytest.raises(
        RuntimeError, match=r"posterior of the clones is \[nan, nan, nan\]: no clone"
    ):
        net.suggested_lr()
    net.head.weight.data[:] = math.inf
    with pytest.raises(RuntimeError, match="every clone has parameters that are not finite"):
        net.suggested_lr()


def test_a_large_vocabulary_is_diagnosed_without_its_logits():
    head = ClassifierClones(2, 1000, N)
    head.bias.data[:] = math.nan
    head.clone_outputs = None
    with pytest.warns(RuntimeWarning, match="every clone is dead"):
        head(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))


@pytest.mark.filterwarnings("ignore:the loss is not finite:RuntimeWarning")
def test_no_rate_is_suggested_where_every_clone_overflows():
    net, (x, y) = model(), batch()
    AlraoSGD(net)
    net(x, targets=y)
    assert math.isfinite(net.suggested_lr())
    with torch.no_grad():
        kept = net.head.weight.clone()
        net.head.weight.fill_(3e38)
    net(x, targets=y)
    with pytest.raises(RuntimeError, match="suggested_lr: the last observed loss is not finite"):
        net.suggested_lr()
    with torch.no_grad():
        net.head.weight.copy_(kept)
    net(x, targets=y)
    assert math.isfinite(net.suggested_lr())
