"""What AlraoModel takes from its backbone: tensors, sequences, mappings, Hugging Face's outputs.

Protects against features taken from the wrong place, extras lost or out of order, a signature that torch.export and
Hugging Face's Trainer cannot read, and a collapsed model that takes other features than the model did.
"""

import copy
import functools
import inspect
import pickle
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

import alrao_fast as alrao

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3, 0, 1])


class Returns(nn.Module):
    """A linear layer whose output is put into a container."""

    def __init__(self, pack):
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.pack = pack

    def forward(self, x, scale=1.0):
        return self.pack(self.linear(x) * scale)


Pair = namedtuple("Pair", "state features")
PACKS = {
    "tensor": (lambda h: h, None),
    "tuple": (lambda h: (h, "state"), None),
    "list": (lambda h: [h, "state"], None),
    "second": (lambda h: ("state", h), 1),
    "last": (lambda h: ("state", "more", h), -1),
    "namedtuple": (lambda h: Pair("state", h), 1),
    "only entry": (lambda h: {"hidden": h, "length": 3}, None),
    "pooled": (lambda h: {"last_hidden_state": h[:, :2], "pooler_output": h}, None),
    "not pooled": (
        lambda h: OrderedDict(last_hidden_state=h, pooler_output=None, logits=h[0]),
        None,
    ),
    "named": (lambda h: {"hidden": h, "logits": h[0]}, "hidden"),
    "function": (lambda h: {"deep": [h, h[0]]}, lambda out: out["deep"][0]),
}


def make(name):
    torch.manual_seed(0)
    pack, features = PACKS[name]
    return alrao.AlraoModel(Returns(pack), alrao.ClassifierClones(5, 4, 3), features=features)


@pytest.mark.parametrize("name", PACKS)
def test_features_are_found(name):
    net, plain = make(name), make("tensor")
    loss, expected = net(X, targets=Y), plain(X, targets=Y)
    packed = net.backbone(X)
    if isinstance(packed, tuple | list):
        assert type(loss) is (list if isinstance(packed, list) else tuple)
        assert len(loss) == len(packed)
        place = (net.features or 0) % len(packed)
        assert [e for k, e in enumerate(loss) if k != place] == [
            e for k, e in enumerate(packed) if k != place
        ]
        loss = loss[place]
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    loss.backward()
    expected.backward()
    for p, q in zip(net.parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)


@pytest.mark.parametrize("name", [n for n in PACKS if n not in ("pooled", "not pooled")])
@pytest.mark.parametrize("which", ["best", "mixture"])
def test_collapse_takes_the_same_features(name, which):
    net = make(name)
    net(X, targets=Y)
    net.eval()
    expected, got = net(X), net.collapse("mixture")(X)
    assert type(net.collapse(which)(X)) is type(got)
    if isinstance(expected, tuple | list):
        place = (net.features or 0) % len(expected)
        assert len(got) == len(expected)
        expected, got = expected[place], got[place]
    torch.testing.assert_close(got, expected)


class Defaults(nn.Module):
    """Decorated as Hugging Face's base models are: what the configuration sets comes by name."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 5)

    @functools.wraps(lambda self, x=None, cached=None: None)
    def forward(self, *args, **kwargs):
        kwargs["cached"] = kwargs.get("cached") or False
        return self._run(*args, **kwargs)

    def _run(self, x=None, cached=None):
        return {"last_hidden_state": self.linear(x)}


def test_collapse_of_a_backbone_whose_decorator_adds_arguments():
    net = alrao.AlraoModel(Defaults(), alrao.ClassifierClones(5, 4, 3))
    net(X, targets=Y)
    net.eval()
    torch.testing.assert_close(net.collapse("mixture")(X), net(X))


def test_collapse_gives_by_position_what_hooks_look_at():
    net = make("tensor")
    net(X, targets=Y)
    seen = []
    plain = net.collapse("best")
    plain.backbone.register_forward_pre_hook(lambda module, args: seen.append(len(args)))
    plain(X)
    plain(X, 2.0)
    assert seen == [1, 1]


@pytest.mark.parametrize(
    ("name", "targets"),
    [("per token", Y), ("pooled", torch.zeros(6, 2, dtype=torch.long))],
)
def test_targets_of_other_features_than_those_found(name, targets):
    pooled = name == "pooled"
    pack = PACKS["pooled"][0] if pooled else lambda h: {"last_hidden_state": h[:, None], "n": None}
    net = alrao.AlraoModel(Returns(pack), alrao.ClassifierClones(5, 4, 3))
    key = "pooler_output" if pooled else "last_hidden_state"
    with pytest.raises(
        ValueError,
        match=f"^target: got shape .*; x is the '{key}' of the Returns, .* features=<name>",
    ):
        net(X, targets=targets)
    assert net.head.switch.t.item() == 1
    # Where the features were named, or fit, other mistakes stay what they are.
    with pytest.raises(ValueError, match=r"^reduction: got 'most', expected [^;]*$"):
        make("pooled")(X, targets=Y, reduction="most")


def test_labels_are_hugging_faces_targets():
    net, other = make("pooled"), make("pooled")
    loss = other(X, targets=Y)
    out = net(X, labels=Y)
    assert list(out) == ["loss"]
    torch.testing.assert_close(out["loss"], loss, rtol=0, atol=0)
    torch.testing.assert_close(net.posterior(), other.posterior(), rtol=0, atol=0)
    out = net.eval()(X, labels=Y)
    torch.testing.assert_close(out["logits"], net(X))
    with pytest.raises(TypeError, match=r"^labels: got both labels and targets"):
        net(X, labels=Y, targets=Y)


@pytest.mark.parametrize("features", [1.5, [0], True, object()])
def test_features_of_another_kind(features):
    with pytest.raises(TypeError, match=r"^features: got .*, expected the name or the number"):
        alrao.AlraoModel(nn.Linear(3, 5), alrao.ClassifierClones(5, 4, 3), features=features)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ("nothing", "which has no features 'nothing'"),
        (2, "which has no features 2"),
        ("length", "where 'length' is 3"),
        (lambda out: None, r"where features\(output\) is None"),
    ],
    ids=["missing", "number", "no tensor", "function"],
)
def test_features_that_are_not_there(features, message):
    backbone = Returns(PACKS["only entry"][0])
    net = alrao.AlraoModel(backbone, alrao.ClassifierClones(5, 4, 3), features=features)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(
        TypeError, match=f"^backbone: the Returns returned a dict of hidden: .*{message}"
    ):
        net(X, targets=Y)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0, equal_nan=True)


def test_signature_is_the_backbones():
    net = make("tensor")
    names = list(inspect.signature(net.forward).parameters)
    assert names[:2] == ["x", "scale"]
    assert {"targets", "labels", "sample_weight", "num_items_in_batch"} < set(names)
    assert type(net).__name__ == "AlraoModel" and isinstance(net, alrao.AlraoModel)
    torch.testing.assert_close(net.eval()(X, 2.0), net(x=X, scale=2.0))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_keep_the_signature(again):
    net = alrao.AlraoModel(nn.Linear(3, 5), alrao.ClassifierClones(5, 4, 3))
    new = again(net)
    assert type(new) is type(net)
    torch.testing.assert_close(new.eval()(X), net.eval()(X), rtol=0, atol=0)


class Own(alrao.AlraoModel):
    def forward(self, pixels, y=None):
        return super().forward(pixels, targets=y)


def test_a_forward_of_its_own_keeps_its_signature():
    net = Own(nn.Linear(3, 5), alrao.ClassifierClones(5, 4, 3))
    assert type(net) is Own
    assert list(inspect.signature(net.forward).parameters) == ["pixels", "y"]
    assert net(X, Y).dim() == 0


def test_export_with_dynamic_shapes_by_name():
    net = make("tensor").eval()
    program = torch.export.export(
        net, (X,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    )
    x = torch.randn(11, 3)
    torch.testing.assert_close(program.module()(x), net(x))


def test_compiled():
    net = make("pooled")
    expected = copy.deepcopy(net)(X, targets=Y)
    compiled = torch.compile(net, backend="aot_eager")
    torch.testing.assert_close(compiled(X, targets=Y), expected)
