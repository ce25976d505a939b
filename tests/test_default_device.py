"""torch's default device and dtype change nothing where tensors say where they are and of which dtype. Protects:

- rates, drawn on the CPU, of every sampler, layout and optimizer; whole training steps; checkpoints; the heads, whose
  state keeps its dtypes; what compat draws: bit for bit as without a default;
- heads and their optimizer made on the meta device.
"""

import copy
import io

import pytest
import torch
from torch import nn

import alrao_fast
import alrao_fast.compat as authors
from alrao_fast.compat.gen_hyper import fdet_lr_log, frand_lr_log
from alrao_fast.nn import AlraoModel, ClassifierClones, RegressorClones, Switch
from alrao_fast.optim import (
    AlraoAdam,
    AlraoMuon,
    AlraoSGD,
    Constant,
    Fraction,
    LogUniform,
    PerWeight,
)

DEFAULTS = ["meta device", "set meta device", torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(params=DEFAULTS, ids=str)
def default(request):
    """A function that makes the default hold, until the test's end."""
    entered = []

    def enter():
        if request.param == "meta device":
            entered.append(torch.device("meta"))
            entered[0].__enter__()
        elif request.param == "set meta device":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(request.param)

    yield enter
    if entered:
        entered[0].__exit__(None, None, None)
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


class Backbone(nn.Module):
    """One of each kind of layout that is worked out by tensors."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose1d(4, 4, 1, groups=2)
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=3, add_bias_kv=True)
        self.rnn = nn.LSTM(4, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        x = self.up(x.mT).mT
        x = x + self.attention(x, x[..., :3], x[..., :3])[0]
        return self.norm(self.rnn(x)[0])


def build(head=ClassifierClones):
    torch.manual_seed(0)
    return AlraoModel(Backbone(), head(6, 5, 4))


def batch(head=ClassifierClones):
    x = torch.randn(3, 2, 4)
    return x, torch.randint(5, (3, 2)) if head is ClassifierClones else torch.randn(3, 2, 5)


def assert_same(a, b):
    assert a.device == b.device
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def generator():
    return torch.Generator("cpu").manual_seed(3)


def own_sampler(n, generator):
    """As a user writes it: no word of a device."""
    return torch.rand(n, generator=generator, dtype=torch.float64) * torch.full((n,), 0.5)


class OwnClones:
    def __call__(self, n, generator):
        return torch.ones(n)

    def clone_rates(self, num_clones):
        return torch.full((num_clones,), 0.5)


SAMPLERS = [
    None,
    LogUniform(1e-3, 1.0),
    PerWeight(1e-3, 1.0),
    Fraction(0.5, 0.25),
    Constant(0.25),
    own_sampler,
    OwnClones(),
]


@pytest.mark.parametrize("optimizer_type", [AlraoSGD, AlraoAdam, AlraoMuon])
@pytest.mark.parametrize(
    "sampler", SAMPLERS, ids=lambda s: getattr(s, "__name__", type(s).__name__)
)
def test_rates(default, optimizer_type, sampler):
    net = build()
    expected = optimizer_type(net, sampler=sampler, generator=generator())
    default()
    optimizer = optimizer_type(net, sampler=sampler, generator=generator())
    for name, param in net.named_parameters():
        a, b = expected.state[param]["rate"], optimizer.state[param]["rate"]
        assert a.device == b.device and a.dtype == b.dtype == torch.float32, name
        assert torch.equal(a, b), name
    seeds = [o.param_groups[0]["rounding_seed"] for o in (expected, optimizer)]
    assert seeds[0] == seeds[1]
    assert optimizer.state[net.head.weight]["rate"].device.type == "cpu"
    single = (1e-3, 1e-1)
    for n in (0, 1, 5):
        assert LogUniform(*single).clone_rates(n or 1).device.type == "cpu"
        assert LogUniform(*single)(n, generator()).device.type == "cpu"


def test_without_a_generator(default):
    net = build()
    torch.manual_seed(5)
    expected = AlraoSGD(net)
    default()
    torch.manual_seed(5)
    optimizer = AlraoSGD(net)
    for param in net.parameters():
        assert torch.equal(expected.state[param]["rate"], optimizer.state[param]["rate"])


@pytest.mark.parametrize("optimizer_type", [AlraoSGD, AlraoAdam, AlraoMuon])
@pytest.mark.parametrize("head", [ClassifierClones, RegressorClones])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_training(default, optimizer_type, head, impl):
    options = {AlraoSGD: {"momentum": 0.9}, AlraoAdam: {"amsgrad": True}}.get(optimizer_type, {})
    nets = build(head), build(head)
    x, y = batch(head)
    with alrao_fast.use_backend(impl):
        results = [train(nets[0], optimizer_type, options, x, y)]
        default()
        results.append(train(nets[1], optimizer_type, options, x, y))
    for a, b in zip(*results, strict=True):
        assert_same(a, b)


def train(net, optimizer_type, options, x, y):
    """A training with a checkpoint in the middle; everything that came of it."""
    optimizer = optimizer_type(net, generator=generator(), **options)
    losses = []
    for step in range(4):
        optimizer.zero_grad()
        losses.append(net(x, targets=y))
        losses[-1].backward()
        optimizer.step()
        if step == 1:
            saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
            net.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
    own = net.head.clone_loss(net.backbone(x), lambda out: out.square().mean(-1))
    alrao_fast.describe_rates(optimizer, file=io.StringIO())
    net.eval()
    features = net.backbone(x)
    metrics = net.clone_metrics()
    return [
        *losses,
        own,
        net(x),
        net(x, targets=y),
        net.collapse("best")(x),
        net.collapse("mixture")(x),
        net.head.clone_outputs(features),
        torch.tensor(net.suggested_lr(), device="cpu", dtype=torch.float64),
        *metrics.values(),
        *net.state_dict().values(),
        *(value for state in optimizer.state.values() for value in state.values()),
    ]


@pytest.mark.parametrize("head", [ClassifierClones, RegressorClones])
def test_heads_that_name_their_device_and_dtype(default, head):
    def make():
        torch.manual_seed(0)
        made = head(6, 5, 4, device="cpu", dtype=torch.float32)
        made.switch.update(torch.arange(4.0, device="cpu", dtype=torch.float32))
        assert made.switch.t.item() == 2
        tensors = [*made.parameters(), *made.buffers()]
        made.reset_parameters()
        return [*tensors, *made.buffers()]

    expected = make()
    default()
    for a, b in zip(expected, make(), strict=True):
        assert_same(a, b)


def test_reset_keeps_the_device(default):
    switch, head = Switch(3), build().head
    switch.update(torch.arange(3.0))
    default()
    switch.reset_parameters()
    head.reset_parameters()
    assert switch.t.device.type == "cpu" and switch.t.item() == 1
    assert torch.equal(switch.logw, Switch(3, device="cpu").logw)


def test_heads_without_device_or_dtype_follow_the_default():
    with torch.device("meta"):
        head = ClassifierClones(6, 5, 4)
    assert all(t.is_meta for t in (*head.parameters(), *head.buffers()))
    torch.set_default_dtype(torch.float64)
    try:
        head = ClassifierClones(6, 5, 4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert head.weight.dtype == torch.float64
    dtypes = {name: buffer.dtype for name, buffer in head.named_buffers()}
    assert dtypes == {
        "clone_lr": torch.float32,
        "running": torch.float64,
        "switch.logw": torch.float64,
        "switch.log_posterior": torch.float64,
        "switch.t": torch.int64,
    }


@pytest.mark.parametrize("optimizer_type", [AlraoSGD, AlraoAdam, AlraoMuon])
def test_made_on_the_meta_device(optimizer_type):
    """A large model's way: everything on meta, then memory, values and training."""
    with torch.device("meta"):
        net = build()
        optimizer = optimizer_type(net, generator=generator())
    assert all(p.is_meta for p in net.parameters())
    expected = optimizer_type(build(), generator=generator())
    # What bounds them is the size of weights that are not there yet.
    drawn = [
        [own.get("drawn_rate", own["rate"]) for own in o.state.values()]
        for o in (expected, optimizer)
    ]
    for a, b in zip(*drawn, strict=True):
        assert torch.equal(a, b)
    net.to_empty(device="cpu")
    net.head.reset_parameters()
    for module in net.backbone.modules():
        for name in ("reset_parameters", "_reset_parameters"):
            if hasattr(module, name):
                getattr(module, name)()
    optimizer = optimizer_type(net, generator=generator())
    interval = optimizer_type._from_interval(*optimizer.defaults["lr_range"])
    assert torch.equal(net.head.clone_lr, interval.clone_rates(4))
    x, y = batch()
    loss = net(x, targets=y)
    loss.backward()
    optimizer.step()
    assert loss.isfinite() and net.head.switch.t.item() == 2


@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_compat(default, name, task):
    regression = task == "regression"
    layer = authors.LinearRegressor if regression else authors.LinearClassifier
    criterion = authors.L2LossAdditional() if regression else nn.NLLLoss()

    def make():
        torch.manual_seed(0)
        internal = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        loss = authors.L2LossLog() if regression else criterion
        return authors.AlraoModel(task, loss, internal, 3, layer, 6, 5)

    def run(net):
        torch.manual_seed(0)
        optimizer = authors.init_alrao_optimizer(net, 3, 1e-3, 1.0, name)
        results = [fdet_lr_log(-3, 0)(x), frand_lr_log(-3, 0)(x)]
        for _ in range(3):
            optimizer.zero_grad()
            results.append(criterion(net(x), y))
            results[-1].backward()
            authors.alrao_step(net, optimizer, criterion, y)
        results += [p.detach().clone() for p in (*net.parameters(), *net.buffers())]
        net.switch.reset()
        return [*results, *net.buffers()]

    nets, x = (make(), make()), torch.randn(8, 4)
    y = torch.randn(8, 5) if regression else torch.randint(5, (8,))
    results = [run(nets[0])]
    default()
    results.append(run(nets[1]))
    for a, b in zip(*results, strict=True):
        assert_same(a, b)
