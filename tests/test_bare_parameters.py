"""Bare parameters know their modules: `AlraoSGD(net.parameters())` is `AlraoSGD(net)`. Protects:

- tensors, named pairs, filters, generators, groups in any order, later groups: the model's layouts and the same bits;
- copied, unpickled, converted, assigned and swapped heads and models; which of several models counts;
- clones in a module that is no AlraoModel; the warning for what is left; nothing is kept alive; many threads.
"""

import copy
import gc
import io
import itertools
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn

from alrao_fast import live
from alrao_fast.nn import AlraoModel, ClassifierClones, RegressorClones
from alrao_fast.optim import AlraoAdam, AlraoMuon, AlraoSGD, Constant, LogUniform, PerWeight

pytestmark = pytest.mark.filterwarnings("error")


class Tokens(nn.Module):
    """Layouts unlike dimension 0: an embedding's columns, the units of an LSTM."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.rnn = nn.LSTM(4, 3)

    def forward(self, tokens):
        return self.rnn(self.embedding(tokens))[0]


def build(num_clones=5):
    torch.manual_seed(0)
    return AlraoModel(Tokens(), ClassifierClones(3, 7, num_clones))


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def assert_as_if_passed(net, optimizer, optimizer_type=AlraoSGD, **options):
    """Every rate, and which parameters share one, as where the module itself is given."""
    expected = optimizer_type(net, generator=generator(), **options)
    for name, param in net.named_parameters():
        rate = optimizer.state[param]["rate"]
        assert torch.equal(rate, expected.state[param]["rate"]), name
        assert optimizer.layout_of(param).name == name
        for other in net.parameters():
            shared = rate is optimizer.state[other]["rate"]
            assert shared == (expected.state[param]["rate"] is expected.state[other]["rate"])
    return expected


WAYS = {
    "parameters": lambda net: net.parameters(),
    "list": lambda net: list(net.parameters()),
    "named": lambda net: net.named_parameters(),
    "filter": lambda net: filter(lambda p: p.requires_grad, net.parameters()),
    "groups": lambda net: [
        {"params": net.backbone.parameters()},
        {"params": net.head.parameters()},
    ],
    "head first": lambda net: [
        {"params": net.head.parameters()},
        {"params": net.backbone.parameters()},
    ],
    "decay": lambda net: [
        {"params": (p for p in net.parameters() if p.dim() < 2), "weight_decay": 0.0},
        {"params": (p for p in net.parameters() if p.dim() >= 2), "weight_decay": 0.1},
    ],
    "values": lambda net: [{"params": dict(net.named_parameters()).values()}],
    "single tensors": lambda net: [{"params": p} for p in reversed(list(net.parameters()))],
    "named in groups": lambda net: [{"params": net.named_parameters()}],
    "a module among them": lambda net: [
        {"params": net.head},
        {"params": net.backbone.parameters()},
    ],
}


@pytest.mark.parametrize("optimizer_type", [AlraoSGD, AlraoAdam, AlraoMuon])
@pytest.mark.parametrize("way", WAYS)
def test_as_if_the_model_had_been_passed(way, optimizer_type):
    net = build()
    optimizer = optimizer_type(WAYS[way](net), generator=generator())
    if way != "a module among them":
        assert_as_if_passed(net, optimizer, optimizer_type)
    interval = optimizer_type._from_interval(*optimizer.defaults["lr_range"])
    assert torch.equal(net.head.clone_lr, interval.clone_rates(5))
    rates = [optimizer.state[p]["rate"] for p in (net.head.weight, net.head.bias)]
    assert rates[0] is rates[1] and torch.equal(rates[0], net.head.clone_lr)


def test_whole_training_is_the_same():
    nets = build(), build()
    optimizers = [
        AlraoSGD(nets[0], momentum=0.9, generator=generator()),
        AlraoSGD(nets[1].parameters(), momentum=0.9, generator=generator()),
    ]
    assert (
        optimizers[0].param_groups[0]["rounding_seed"]
        == (optimizers[1].param_groups[0]["rounding_seed"])
    )
    for _ in range(3):
        tokens = torch.randint(7, (5, 2))
        for net, optimizer in zip(nets, optimizers):
            optimizer.zero_grad()
            net(tokens[:-1], targets=tokens[1:]).backward()
            optimizer.step()
    for (name, a), b in zip(nets[0].state_dict().items(), nets[1].state_dict().values()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("sampler", [PerWeight(), Constant(0.5)])
@pytest.mark.parametrize("rule", ["torch", "authors"])
def test_with_options(sampler, rule):
    net = build()
    optimizer = AlraoSGD(
        net.parameters(), sampler=sampler, momentum_rule=rule, generator=generator()
    )
    expected = AlraoSGD(net, sampler=sampler, momentum_rule=rule, generator=generator())
    assert [len(g["params"]) for g in optimizer.param_groups] == [
        len(g["params"]) for g in expected.param_groups
    ]
    assert_as_if_passed(net, optimizer, sampler=sampler, momentum_rule=rule)


def test_a_later_group():
    """Tensors in three steps: as the optimizer would have it that was given the model for its layouts."""
    net = build()
    optimizers = [
        AlraoSGD([net.backbone.embedding.weight], generator=generator(), model=model)
        for model in (None, net)
    ]
    for optimizer in optimizers:
        optimizer.add_param_group({"params": net.backbone.rnn.parameters()})
        optimizer.add_param_group({"params": [net.head.weight]})
        optimizer.add_param_group({"params": [net.head.bias]})
        for params in ([net.head.weight, net.head.bias], net.backbone.rnn.parameters()):
            assert len({id(optimizer.state[p]["rate"]) for p in params}) == 1
    for param in net.parameters():
        assert torch.equal(*(optimizer.state[param]["rate"] for optimizer in optimizers))


def test_frozen_parameters_are_left_out():
    net = build().requires_grad_(False)
    net.head.requires_grad_(True)
    optimizer = AlraoSGD(filter(lambda p: p.requires_grad, net.parameters()))
    assert set(optimizer.state) == set(net.head.parameters())
    assert torch.equal(net.head.clone_lr, LogUniform().clone_rates(5))


def saved_and_loaded(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assigned(net):
    with torch.device("meta"):
        other = build()
    other.load_state_dict(net.state_dict(), assign=True)
    other.head.running = torch.zeros(3, 5, dtype=torch.float64)
    return other


def converted(net):
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return net.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def swapped(net):
    net.head = ClassifierClones(3, 7, 5)
    return net


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        copy.copy,
        lambda net: pickle.loads(pickle.dumps(net)),
        saved_and_loaded,
        assigned,
        converted,
        swapped,
        lambda net: nn.Sequential(net)[0],
    ],
)
def test_copies_and_conversions(change):
    net = change(build())
    optimizer = AlraoSGD(net.parameters(), (1e-3, 1.0), generator=generator())
    assert_as_if_passed(net, optimizer, lr_range=(1e-3, 1.0))
    assert torch.equal(net.head.clone_lr, LogUniform(1e-3, 1.0).clone_rates(5))


def test_parametrized_clones():
    net = build()
    nn.utils.parametrizations.orthogonal(net.head)
    optimizer = AlraoSGD(net.parameters(), generator=generator())
    assert_as_if_passed(net, optimizer)
    assert torch.equal(net.head.clone_lr, LogUniform().clone_rates(5))


def test_models_that_share_a_backbone():
    """The model that holds all of the parameters counts, whichever is older; the other is not even looked at."""
    first = build()
    second = AlraoModel(first.backbone, RegressorClones(3, 2, 4))
    for net, other in itertools.permutations((first, second)):
        optimizer = AlraoSGD(net.parameters(), generator=generator())
        assert_as_if_passed(net, optimizer)
        with pytest.raises(KeyError):
            optimizer.layout_of(other.head.weight)
    # Of both together every parameter has its own.
    params = dict.fromkeys([*second.parameters(), *first.parameters()])
    optimizer = AlraoSGD(list(params), generator=generator())
    assert optimizer.state[first.head.weight]["rate"] is optimizer.state[first.head.bias]["rate"]
    assert optimizer.state[second.head.weight]["rate"] is second_bias(optimizer, second)


def second_bias(optimizer, net):
    return optimizer.state[net.head.bias]["rate"]


class Plain(nn.Module):
    """A network of one's own whose last layer was replaced."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.classifier = ClassifierClones(3, 7, 4)


def test_clones_in_a_plain_module():
    net = Plain()
    with pytest.warns(UserWarning, match=r"1 bare tensors \(params\[0\]\).*model=") as caught:
        optimizer = AlraoSGD(net.parameters(), (1e-3, 1.0))
    assert caught[0].filename == __file__
    expected = LogUniform(1e-3, 1.0).clone_rates(4)
    for param in net.classifier.parameters():
        assert torch.equal(optimizer.state[param]["rate"], expected)
    assert torch.equal(net.classifier.clone_lr, expected)
    assert optimizer.state[net.embedding.weight]["rate"].shape == (7,)
    with_model = AlraoSGD(net.parameters(), (1e-3, 1.0), model=net)
    assert with_model.state[net.embedding.weight]["rate"].shape == (3,)


def test_a_model_inside_a_larger_module():
    net = build()
    outer = nn.ModuleDict({"net": net, "other": nn.Linear(2, 3)})
    with pytest.warns(UserWarning, match="2 bare tensors"):
        optimizer = AlraoSGD(outer.parameters(), generator=generator())
    assert optimizer.state[net.backbone.embedding.weight]["rate"].shape == (4,)
    assert_as_if_passed(net, optimizer)


def test_a_head_alone():
    head = RegressorClones(3, 2, 4)
    AlraoSGD(head.parameters(), (1e-3, 1.0))
    assert torch.equal(head.clone_lr, LogUniform(1e-3, 1.0).clone_rates(4))


def test_nothing_is_kept_alive():
    net = build()
    optimizer = AlraoSGD(net.parameters())
    gc.collect()
    alive = [weakref.ref(x) for x in (net, net.head, optimizer)]
    before = [len(list(entries)) for entries in (live.models, live.heads, live.optimizers)]
    del net, optimizer
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3
    after = [len(list(entries)) for entries in (live.models, live.heads, live.optimizers)]
    assert [b - a for a, b in zip(after, before)] == [1, 1, 1]


def test_order_of_what_is_alive():
    entries = live.Live()
    objects = [nn.Identity() for _ in range(4)]
    for entry in objects:
        entries.enter(entry)
    assert list(entries) == objects
    entries.enter(objects[0])
    assert list(entries) == [*objects[1:], objects[0]]
    del entry, objects[1]
    assert list(entries) == objects[1:] + objects[:1]


def test_threads():
    """Heads come and go in all of them while others look."""
    failures = []

    def work(number):
        try:
            for _ in range(20):
                net = AlraoModel(nn.Linear(2, 3), ClassifierClones(3, 2, 2 + number))
                AlraoSGD(net.parameters(), (1e-3, 1.0))
                assert torch.equal(net.head.clone_lr, LogUniform(1e-3, 1.0).clone_rates(2 + number))
        except Exception as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_modules_cost_no_search(monkeypatch):
    """Where modules are given, what is alive is not looked through."""
    net = build()

    def search(params):
        raise AssertionError("searched")

    monkeypatch.setattr("alrao_fast.optim.rated.owners", search)
    with warnings.catch_warnings():
        AlraoSGD(net)
        AlraoSGD(net.parameters(), model=net)
        AlraoSGD([{"params": net.backbone}]).add_param_group({"params": net.head})
